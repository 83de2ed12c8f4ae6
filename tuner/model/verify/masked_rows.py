"""Rows of attention that see no key, as those of padding in front of a sequence: what a model makes of them means
nothing, and they are left out where two models are compared.

A causal mask and one of padding hide every key of a query that is padding itself. Of such a row a model makes the mean
of values; of which values, or whether NaN, depends on how it applies its masks (docs/models.md). Rows keep their place
from layer to layer, and no other row reads those, since the same mask hides them as keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.fuse.masks import Band
from tilewright.tuner.model.fuse.scores import LOW
from tilewright.tuner.model.graph import fused_nodes, is_constant, op_of, plugin_inputs, plugin_settings, static_shape

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class MaskedRows:
    """The rows of one feed that see no key, by their shape (B, S): those of an encoder and of a decoder may be two."""

    rows: Mapping[tuple[int, int], Array] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(int(np.count_nonzero(rows)) for rows in self.rows.values())

    def of(self, shape: tuple[int, ...]) -> Array | None:
        """Which elements of a value are of such rows, as an array that goes together with its shape; None: none is.

        A value has them as (B, S, …), as (B, H, S, D), or as (B·S, …); of any other shape nothing is left out.
        """
        for (batch, length), rows in self.rows.items():
            if not rows.any():
                continue
            if len(shape) == 4 and shape[0] == batch and shape[2] == length:
                return rows[:, None, :, None]
            if len(shape) > 1 and shape[:2] == (batch, length):
                return rows.reshape(*rows.shape, *(1 for _ in shape[2:]))
            if shape and shape[0] == batch * length:
                return rows.reshape(-1, *(1 for _ in shape[1:]))
        return None


@dataclass(frozen=True, slots=True)
class Masking:
    """What decides on the rows of an attention: its bias, which the model works out, and the band of keys seen."""

    bias: str
    band: Band
    shape: tuple[int, int, int]  # B, Sq, Skv

    def rows(self, bias: Array) -> Array:
        """The rows, of shape (B, Sq), whose keys are all hidden in some head."""
        batch, queries, keys = self.shape
        hidden = (bias <= LOW) | ~self.band.seen(queries, keys)
        rows = np.asarray(hidden.all(axis=-1))
        return np.broadcast_to(rows.any(axis=1), (batch, queries))


def maskings(model: ir.Model) -> list[Masking]:
    """Those of a fused model's attentions whose bias depends on the inputs, each once."""
    found = dict[Masking, None]()
    for node in fused_nodes(model):
        if op_of(node) != "attention" or "bias" not in (inputs := plugin_inputs(node)) or is_constant(inputs["bias"]):
            continue
        q, k = static_shape(inputs["q"]), static_shape(inputs["k"])
        assert q is not None
        assert k is not None
        band = Band.of(plugin_settings(node))
        found[Masking(str(inputs["bias"].name), band, (q[0], q[2], k[2]))] = None
    return list(found)


def masked_rows(found: Sequence[Masking], values: Mapping[str, Array]) -> MaskedRows:
    """The rows that some attention hides, from the values of the biases for one feed."""
    by_shape: dict[tuple[int, int], Array] = {}
    for masking in found:
        rows = masking.rows(values[masking.bias])
        shape = (rows.shape[0], rows.shape[1])
        by_shape[shape] = by_shape[shape] | rows if shape in by_shape else rows
    return MaskedRows(by_shape)
