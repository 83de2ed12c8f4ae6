"""`Kernel`: one object per op, and `Launch`: one prepared launch of its device code."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, NamedTuple

import numpy as np

from tilewright.kernels.device import Device
from tilewright.kernels.source import called_hash, module_hash, source_hash
from tilewright.kernels.space import C, P, Space
from tilewright.kernels.work import Work
from tilewright.tuning_db.record import Resources
from tilewright.tuning_db.shapes import Near, distance


class Argument(NamedTuple):
    """One run-time parameter of a jit function."""

    name: str
    type: str | None  # in Triton's spelling: "*fp16", "i32", "i64"; None when absent, which removes it from the PTX
    value: int | None = None  # of a scalar
    aligned: bool = False  # pointer: to 16 bytes; scalar: divisible by 16

    @property
    def is_pointer(self) -> bool:
        """Whether an array is passed here."""
        return self.type is not None and self.type.startswith("*")


class Scratch(NamedTuple):
    """Memory that the launcher lends a launch: kept per stream, never shared between streams."""

    name: str
    numpy: str  # NumPy dtype name
    elements: int


@dataclass(frozen=True)
class Launch:
    """One launch of one jit function: everything it is compiled for, its grid and its scalars.

    Arguments keep the jit function's order: input pointers, sizes, output pointers, then constexprs.
    """

    fn: Any
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    # More than 0: the grid's x is at most that many blocks per SM of the device, and a block goes on to the tiles that
    # are a whole grid further.
    blocks_per_sm: int = 0
    # Scratch memory must be all zero at the first launch, and every launch leaves its counters at zero.
    scratch: tuple[Scratch, ...] = ()

    @cached_property
    def specialization(self) -> tuple[Any, ...]:
        """What the compiled code depends on, besides the target: launches that agree here share one binary."""
        arguments = tuple((argument.name, argument.type, argument.aligned) for argument in self.arguments)
        return (source_hash(self.fn), arguments, self.constexprs, self.num_warps, self.num_stages)

    def with_constants(self, constants: tuple[tuple[str, Any], ...]) -> Launch:
        """The launch with other values of some constexprs; names it does not have are left to the op's other launches.

        For numbers that a caller chooses and speed does not depend on, which are therefore no part of a problem.
        """
        chosen = dict(constants)
        return replace(self, constexprs=tuple((name, chosen.get(name, value)) for name, value in self.constexprs))

    def on(self, sms: int) -> Launch:
        """The launch with the grid it has on a device of so many SMs."""
        if self.blocks_per_sm == 0:
            return self
        x, y, z = self.grid
        return replace(self, grid=(min(x, self.blocks_per_sm * sms), y, z))


class Tolerance(NamedTuple):
    """How far a result may be from the reference: |result - reference| <= absolute + relative * |reference|."""

    relative: float
    absolute: float


class Variant(NamedTuple, Generic[P, C]):
    """A feature that is not in the problem but in how it is computed."""

    problem: P
    config: C


@dataclass(frozen=True)
class Kernel(Generic[P, C]):
    """An op: its problems, its configurations, its device code, and what to hold it against."""

    name: str
    problem: type[P]
    space: Space[P, C]
    jit_functions: tuple[Any, ...]
    default: Callable[[P, Device], C]  # legal for every problem, free of spills, never the slowest
    launches: Callable[[P, C], tuple[Launch, ...]]  # in order; arrays are bound by argument name
    # Every output by name, in float64, and how near to it a result must be.
    reference: Callable[[P, Mapping[str, np.ndarray[Any, Any]]], dict[str, np.ndarray[Any, Any]]]
    tolerance: Callable[[P], dict[str, Tolerance]]
    estimate: Callable[[P, C, Device], Resources]  # before anything is compiled
    work: Callable[[P, C], Work]  # what `prediction` needs to know
    near: Callable[[P], Near]  # which other problems' best configurations are worth having for a problem
    supported: Callable[[P, Device], str | None]  # None, or why this device can't run it at all
    # A small problem of the same code paths that neither tile nor split divides: the tails the problem itself may lack.
    ragged: Callable[[P, C], P] | None = None
    # What the support table lists: each feature with a small problem that has it, or one with the configuration to.
    features: Mapping[str, P | Variant[P, C]] = field(default_factory=dict)
    # Values of the stride arguments, from the strides of all arrays, in elements, by name; None: no launch has any.
    strides: Callable[[P, Mapping[str, tuple[int, ...]]], dict[str, int]] | None = None
    # Names of the constexprs that a caller chooses and no problem holds; their values in `launches` are the defaults.
    constants: Callable[[P], tuple[str, ...]] = lambda problem: ()

    @property
    def feature_cases(self) -> list[tuple[str, P, C | None]]:
        """Each feature's name, problem, and configuration if it hangs on one."""
        return [
            (name, *feature) if isinstance(feature, Variant) else (name, feature, None)
            for name, feature in self.features.items()
        ]

    def distance(self, problem: P, other: P) -> float | None:
        """How far the shape of another problem is from that of one, in doublings; None where they don't compare."""
        return distance(self.near(problem), problem.to_json(), other.to_json())

    @cached_property
    def source_hash(self) -> str:
        """Of the device code, every jit function of the op and every device function these call, and of what makes
        launches of it: the module of `launches` with what its functions call of the op's, and that of the problem."""
        module = sys.modules[self.launches.__module__]
        maker = f"{module_hash(module)} {called_hash(module)} {module_hash(sys.modules[self.problem.__module__])}"
        return hashlib.sha256(f"{source_hash(*self.jit_functions)} {maker}".encode()).hexdigest()
