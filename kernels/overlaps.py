"""No output of a call lies over an input, or over itself."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from tilewright.kernels.arrays import NOWHERE, ArrayKind, View
from tilewright.kernels.dtypes import dtype
from tilewright.tuning_db.errors import ProblemError, UnsupportedError


class Guard(NamedTuple):
    """What an output must not lie over."""

    place: int  # among the arrays that are there, as that of the others
    name: str
    position: int  # among the outputs
    bytes: int  # from the first element to the end of the last
    # Of each array before it: place, name, bytes, and whether the output may be this very array.
    others: tuple[tuple[int, str, int, bool], ...]

    def check(self, kind: ArrayKind, arrays: Sequence[Any], outs: Sequence[Any], addresses: Sequence[int]) -> None:
        """Does nothing if the output may be written while the other arrays are used: it is apart from each, or is one
        that it may replace. `arrays` are all, `outs` among them; `addresses` are of those that are there.

        Raises:
            ProblemError: they share memory, or it may not be written at all.
        """
        own, _, position, reach, others = self
        if kind.host and not outs[position].flags.writeable:
            raise ProblemError(f"{self.name} is read-only")
        start = addresses[own]
        end = start + reach
        for place, name, size, replaceable in others:
            first = addresses[place]
            if first >= end or start >= first + size or (replaceable and first == start):
                continue  # apart, or each element is read by the block that then writes it
            # Reaching over each other they may still interleave, as the halves of one wide array do.
            there = [array for array in arrays if array is not None]
            if _share_memory(kind, there[place], there[own]):
                raise ProblemError(f"{self.name} may not share memory with {name}")


def guards(
    names: Sequence[str], views: Mapping[str, View], outs: Sequence[Any], in_place: Collection[str]
) -> tuple[Guard, ...]:
    """A guard for each output that the caller gave. `names` are of all arrays in the order of calls, outputs last;
    `in_place` are the inputs that an output may replace, element for element.

    Raises:
        UnsupportedError: an output overlaps itself.
    """
    places = {name: place for place, name in enumerate(each for each in names if each in views)}
    found = []
    for position, out in enumerate(outs):
        if out is None:
            continue
        name = names[len(names) - len(outs) + position]
        refuse_self_overlap(name, views[name])
        others = tuple(
            (place, other, _reach(views[other]), other in in_place and alike(views[other], views[name]))
            for other, place in places.items()
            if place < places[name] and views[other].pointer != NOWHERE
        )
        found.append(Guard(places[name], name, position, _reach(views[name]), others))
    return tuple(found)


def refuse_self_overlap(name: str, view: View) -> None:
    """Does nothing for an output that has every element once.

    Raises:
        UnsupportedError: it hasn't; the message has its strides.
    """
    reach = 1
    for step, length in sorted(zip(view.strides, view.shape, strict=True)):
        if length > 1:
            if step < reach:
                raise UnsupportedError(f"{name} has strides {view.strides} for shape {view.shape}: it overlaps itself")
            reach = step * (length - 1) + reach


def alike(one: View, other: View) -> bool:
    """Whether elements lie alike from the first on, whatever dimensions of one index there are beside."""

    def steps(view: View) -> list[tuple[int, int]]:
        return [pair for pair in zip(view.shape, view.strides, strict=True) if pair[0] > 1]

    return steps(one) == steps(other) and one.dtype == other.dtype


def _reach(view: View) -> int:
    last = sum(max(0, length - 1) * max(0, stride) for length, stride in zip(view.shape, view.strides, strict=True))
    return (last + 1) * math.ceil(dtype(view.dtype).bytes)


def _share_memory(kind: ArrayKind, one: Any, other: Any) -> bool:
    placed: list[np.ndarray[Any, Any]] = []
    for view in (kind.view(one), kind.view(other)):
        size = int(dtype(view.dtype).bytes)
        strides = tuple(stride * size for stride in view.strides)
        place = {"shape": view.shape, "strides": strides, "typestr": f"|V{size}", "data": (view.pointer, True)}
        # NumPy knows how to find out, and reads nothing at these addresses, which may be a GPU's.
        placed.append(np.asarray(SimpleNamespace(__array_interface__={**place, "version": 3})))
    return np.shares_memory(placed[0], placed[1])
