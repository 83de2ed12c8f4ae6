"""`Problem` and `Config`: what is to be computed, and how a kernel is asked to compute it."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from tilewright.kernels.dtypes import DTYPES
from tilewright.tuning_db.errors import ProblemError
from tilewright.tuning_db.record import canonical_json, read_json
from tilewright.tuning_db.text import did_you_mean


class _Value:
    """A frozen dataclass of plain values with one canonical JSON text. Base of `Problem` and `Config`."""

    __slots__ = ()
    ADDED: ClassVar[tuple[str, ...]] = ()
    """Fields that came when results were on record already. At their default they are not in the text, so what it is
    found under stays what it was."""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, in the order a person writes them."""
        return {field.name: getattr(self, field.name) for field in _fields(type(self))}  # type: ignore[arg-type]  # a class is hashable

    def check_types(self) -> None:
        """Checks that every field is of a type that it may have, for a value made in Python, as `from_dict` checks. Of
        NumPy's integers it makes Python's.

        Raises:
            ProblemError: one isn't; the message has its value.
        """
        for name, kinds in field_types(type(self)).items():  # type: ignore[arg-type]  # a class is hashable
            value = getattr(self, name)
            if isinstance(value, np.integer) and int in kinds:
                value = int(value)
                object.__setattr__(self, name, value)  # frozen: the canonical spelling is set once
            _check_type(name, value, kinds)

    def to_json(self) -> str:
        """Canonical JSON: equal values give equal texts, in every process."""
        values = self.to_dict()
        for name, default in _added(type(self)):  # type: ignore[arg-type]  # a class is hashable
            if values[name] == default:
                del values[name]
        return canonical_json(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The value with these fields; fields with a default may be left out.

        Raises:
            ProblemError: a field is unknown, missing or of the wrong type.
        """
        kinds = field_types(cls)  # type: ignore[arg-type]  # a class is hashable, Self included
        for name in values:
            if name not in kinds:
                raise ProblemError(
                    f"{cls.__name__} has no field {name!r}{did_you_mean(name, kinds)} (fields: {', '.join(kinds)})"
                )
        missing = [
            field.name
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
            if field.default is dataclasses.MISSING and field.name not in values
        ]
        if missing:
            raise ProblemError(f"{cls.__name__} is missing {', '.join(missing)}")
        for name, value in values.items():
            _check_type(name, value, kinds[name])
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The value of a text made by `to_json`.

        Raises:
            ProblemError: not such a text.
        """
        try:
            values = read_json(text)
        except ValueError as error:
            raise ProblemError(f"{cls.__name__} expects a JSON object: {error}") from None
        if not isinstance(values, dict):
            raise ProblemError(f"{cls.__name__} expects a JSON object, got {text!r}")
        return cls.from_dict(values)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The value written as a person types it: `"M=4096,N=4096,K=4096,dtype=fp16"`.

        Raises:
            ProblemError: malformed text, or as `from_dict`.
        """
        kinds = field_types(cls)  # type: ignore[arg-type]  # a class is hashable, Self included
        values: dict[str, Any] = {}
        if not text.strip():
            raise ProblemError(f"the text of a {cls.__name__} is empty: write NAME=VALUE, with commas between them")
        for part in text.split(","):
            name, equals, word = (piece.strip() for piece in part.partition("="))
            if not (name and equals and word):
                raise ProblemError(f"{part.strip()!r} in {text!r} is not NAME=VALUE")
            if name in values:
                raise ProblemError(f"{name} is given twice in {text!r}")
            values[name] = _convert(name, word, kinds.get(name, (str,)))
        return cls.from_dict(values)


class Output(NamedTuple):
    """An output array of a problem."""

    shape: tuple[int, ...]
    dtype: str  # canonical name


class Config(_Value):
    """The choices of one kernel: tiles, warps, stages, variants. Subclasses are frozen dataclasses of integers and
    flags, with `num_warps` among them."""

    __slots__ = ()
    num_warps: int


class Problem(_Value, ABC):
    """Every shape, dtype, layout and flag that an op's speed depends on. Subclasses are frozen dataclasses.

    A subclass checks itself when it is made and raises `ProblemError` for what can't be computed, with the values.
    """

    __slots__ = ()
    op: ClassVar[str]

    @abstractmethod
    def inputs(self, seed: int) -> dict[str, np.ndarray[Any, Any]]:
        """Random inputs by argument name, equal for equal seeds, in the problem's dtypes and layouts."""

    @abstractmethod
    def outputs(self) -> dict[str, Output]:
        """Every array of the result, by argument name; the main one first. One with the name of an input overwrites
        it, with the same shape and dtype."""

    @abstractmethod
    def flops(self) -> int:
        """Floating-point (or integer) operations the result needs, a multiply-add counted as two."""

    @abstractmethod
    def bytes_moved(self) -> int:
        """Bytes of device memory at the least: each input read once, each output written once."""

    @property
    @abstractmethod
    def unit(self) -> str:
        """Which rate of the device the arithmetic runs at: a key of `Device.tensor_tflops`, or `fp32`."""

    def __str__(self) -> str:
        """The text that `parse` reads, without the fields that follow from the others."""
        values = self.to_dict()
        for field in _fields(type(self)):
            if field.default is not dataclasses.MISSING:
                fewer = {name: value for name, value in values.items() if name != field.name}
                # Without it there may be no problem at all: a_broadcast without the batch.
                with contextlib.suppress(ProblemError):
                    if type(self)(**fewer) == self:
                        values = fewer
        words = {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}
        return ",".join(f"{name}={word}" for name, word in words.items())


@cache
def _fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a dataclass: its positional ones, which are an op's own, before the keywords that ops share."""
    return tuple(sorted(dataclasses.fields(cls), key=lambda field: bool(field.kw_only)))


@cache
def _added(cls: type) -> tuple[tuple[str, Any], ...]:
    """The `ADDED` fields, each with its default."""
    return tuple((field.name, field.default) for field in _fields(cls) if field.name in cls.ADDED)  # type: ignore[attr-defined]


@cache
def field_types(cls: type) -> dict[str, tuple[type, ...]]:
    """The types that each field of a dataclass may have, by name."""
    hints: dict[str, Any] = {}
    kinds: dict[str, tuple[type, ...]] = {}
    for field in _fields(cls):
        hint = vars(builtins).get(str(field.type))  # of a configuration all: `get_type_hints` takes 0.2 ms
        if hint is None:
            hints = hints or typing.get_type_hints(cls)
            hint = hints[field.name]
        kinds[field.name] = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return kinds


def _check_type(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    # bool is an int to Python, and never a size here.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        if name.endswith("dtype") and value is not None:
            wanted += f", one of {', '.join(DTYPES)}"
        raise ProblemError(f"{name}={value!r} must be {wanted}")


def _convert(name: str, word: str, kinds: tuple[type, ...]) -> Any:
    if bool in kinds and word.lower() in {"true", "false", "yes", "no", "1", "0"}:
        return word.lower() in {"true", "yes", "1"}
    if type(None) in kinds and word.lower() == "none":
        return None
    if int in kinds:
        try:
            return int(word)
        except ValueError:
            raise ProblemError(f"{name}={word!r} must be an integer") from None
    return word
