"""What a model is fed: its inputs, and sequences of feeds that are made or read when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.graph import dtype_name, static_shape
from tilewright.tuner.model.messages import quoted
from tilewright.tuning_db.errors import ModelError

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]
Batches = Sequence[Feed]


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a model that has to be fed."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def batch(self) -> int:
        """Samples in a feed; of a scalar, 1."""
        return self.shape[0] if self.shape else 1


def model_inputs(model: ir.Model) -> list[Input]:
    """The inputs of a model that have to be fed.

    Raises:
        ModelError: one has an unknown dimension, or a type that arrays don't have.
    """
    inputs = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        name = str(value.name)
        shape = static_shape(value)
        if shape is None:
            raise ModelError(f"input {quoted(name)} has shape {value.shape}: give its dimensions with --shape")
        if value.dtype is None or value.dtype == ir.DataType.STRING or value.dtype.bitwidth < 8:
            raise ModelError(f"input {quoted(name)} is {dtype_name(value)}: a model with such an input can't be run")
        inputs.append(Input(name, shape, np.dtype(value.dtype.numpy())))
    return inputs


class Feeds(Sequence[Feed]):
    """Feeds by number, none of which is kept."""

    def __init__(self, length: int) -> None:
        self._numbers = range(length)

    @abstractmethod
    def feed(self, number: int) -> Feed:
        """One of them, from 0.

        Raises:
            ModelError: it can't be read or doesn't fit the model.
        """

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Feed: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> Feed | Batches:
        at = self._numbers[index]
        return Selected(self, at) if isinstance(at, range) else self.feed(at)


class Selected(Feeds):
    """Some feeds of others."""

    def __init__(self, feeds: Batches, numbers: Sequence[int]) -> None:
        super().__init__(len(numbers))
        self._feeds = feeds
        self._chosen = tuple(numbers)

    def feed(self, number: int) -> Feed:
        """The feed at a place of the selection."""
        return self._feeds[self._chosen[number]]


def spread(total: int, count: int) -> list[int]:
    """`count` of `total` numbers at equal distances, each in the middle of its share."""
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def conform(array: Array, wanted: Input, place: str) -> Array:
    """An array as the input takes it: its dtype, contiguous, memory of its own.

    Floats become floats of any width, for rounding is the input's business; else a number changes its type only where
    it keeps its value, and a float never becomes an integer.

    Raises:
        ModelError: an array of numbers that can't, or with NaN or infinity in it; `place` says where it is from.
    """
    where = f"{place}: {quoted(wanted.name)}"
    if array.dtype.kind == wanted.dtype.kind == "V" and array.dtype.itemsize == wanted.dtype.itemsize:
        array = array.view(wanted.dtype)  # numpy.save keeps the bits of bf16 and fp8, and forgets their name
    given, taken = _kind(array.dtype), _kind(wanted.dtype)
    if given not in KINDS or KINDS.index(given) > KINDS.index(taken):
        raise ModelError(
            f"{where} is {array.dtype} and must be {wanted.dtype}, and the one doesn't go over into the other"
        )
    if given == "float":
        _check_finite(array, where)
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.array(array, dtype=wanted.dtype, order="C")
        if given == "float":
            kept = np.isfinite(result) if wanted.dtype.kind == "f" else np.isfinite(result.astype(np.float32))
        elif taken == "float":
            kept = result.astype(array.dtype) == array
        else:
            kept = result == array
    if not kept.all():
        lost = array[~kept].reshape(-1)[0]
        raise ModelError(f"{where} is {array.dtype} and must be {wanted.dtype}, in which there is no {lost}")
    return result


KINDS = ("truth value", "integer", "float")


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.kind == "V":  # the types of ml_dtypes; a plain void is no number
        return "float" if dtype.name.startswith(("bfloat16", "float8")) else "?"
    return {"b": "truth value", "i": "integer", "u": "integer", "f": "float"}.get(dtype.kind, "?")


def _check_finite(array: Array, where: str) -> None:
    finite = np.isfinite(array.astype(np.float32) if array.dtype.kind == "V" else array)
    if not finite.all():
        bad = array.size - int(np.count_nonzero(finite))
        at = tuple(int(each) for each in np.unravel_index(int(np.argmin(finite)), array.shape))
        raise ModelError(f"{where} has {bad} NaN or infinite of {array.size} numbers, the first at {at}")
