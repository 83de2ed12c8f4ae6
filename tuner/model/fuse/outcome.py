"""What fusing did to a model: which chains became one node, which did not, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Match:
    """Some nodes that became one, or part of one."""

    pattern: str
    node: str  # the fused node


@dataclass(frozen=True, slots=True)
class Miss:
    """A node that looked like a pattern's, and why it was left."""

    pattern: str
    node: str
    reason: str


@dataclass(slots=True)
class Log:
    """Collects outcomes while rules are at work. A miss is noted once, however often a rule comes by.

    `after` is the node that would have become part of the fused one. Another pattern may take it yet, as a residual is
    first seen to be no bias: once it has left the graph, `settle` forgets the miss.
    """

    matches: list[Match] = field(default_factory=list)
    misses: dict[tuple[str, str], Miss] = field(default_factory=dict)
    _after: dict[tuple[str, str], ir.Node] = field(default_factory=dict)

    def match(self, pattern: str, node: str) -> None:
        self.matches.append(Match(pattern, node))
        self.misses.pop((pattern, node), None)

    def miss(self, pattern: str, node: str, reason: str, after: ir.Node | None = None) -> None:
        self.misses[pattern, node] = Miss(pattern, node, reason)
        self._after.pop((pattern, node), None)
        if after is not None:
            self._after[pattern, node] = after

    def settle(self) -> None:
        """Forgets the misses of nodes that something has taken in after all."""
        for key, node in self._after.items():
            if node.graph is None:
                self.misses.pop(key, None)


@dataclass(frozen=True, slots=True)
class FusionReport:
    """The outcome of `fuse`."""

    matches: tuple[Match, ...]
    misses: tuple[Miss, ...]
    nodes_before: int
    nodes_after: int
    layers: dict[str, str]  # of each fused node: the plugin
    ends: dict[str, str]  # of each fused node: why its chain goes no further

    def counts(self) -> dict[str, int]:
        """How often each pattern matched."""
        return dict(sorted(Counter(match.pattern for match in self.matches).items()))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "patterns": self.counts(),
            "layers": self.layers,
            "ends": self.ends,
            "left": [{"pattern": miss.pattern, "node": miss.node, "reason": miss.reason} for miss in self.misses],
        }
