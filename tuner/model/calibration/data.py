"""Calibration data: what `--calibration` names, as feeds of a model.

A feed has an array for every input of the model, in the input's shape and dtype, batch and all. What may be given:

- `data.npz`, as `numpy.savez` writes it: one array per input, by the input's name. With one dimension more than the
  input its first axis counts feeds: (S, *shape). With as many its first axis counts samples, of which a feed takes
  the input's batch B = shape[0]: (S·B, *shape[1:]), and what is left over at the end is not used. S is the same for all
  inputs. Arrays that `savez` wrote, not compressed, are read piece by piece.
- a folder: every `.npz` in it is one feed, an array per input, by name; of a model with a single input an `.npy` may be
  one too. Arrays have the input's shape or, where its batch is 1, the shape without it. Files are taken in the order of
  their names.
- `random`: standard normal numbers, and indices below the length of the smallest table that they look up. Scales
  measured on it fit no real input; `Samples.warning` says so.

Pictures are not read: which size, colour order, mean and deviation a model wants, its file doesn't say, and data
prepared otherwise than in training gives wrong ranges without a sign of it.

All of the data is read once at the start, feed by feed, so that what is wrong with it shows before anything is tuned.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.calibration.arrays import ArrayFile, open_npy, open_npz
from tilewright.tuner.model.calibration.feeds import (
    Array,
    Batches,
    Feed,
    Feeds,
    Input,
    Selected,
    conform,
    model_inputs,
    spread,
)
from tilewright.tuner.model.calibration.random_data import RandomFeeds
from tilewright.tuner.model.messages import listed, quoted
from tilewright.tuning_db.errors import ModelError, UsageError

RANDOM = "random"
RANDOM_WARNING = (
    "the calibration data is random: scales measured on noise fit no real input, and errors measured on it say nothing "
    "about accuracy; give real inputs with --calibration data.npz or a folder"
)

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, slots=True)
class Samples:
    """Calibration data.

    Attributes:
        feeds: an array for each input, made or read anew whenever one is asked for.
        origin: where they come from: `file …`, `folder …` or `random`.
        digest: SHA-256 of all that is in them, names, dtypes and shapes too.
        warning: what has to be said about them, or None.
    """

    feeds: Batches
    origin: str
    digest: str
    warning: str | None = None

    def __len__(self) -> int:
        """How many feeds."""
        return len(self.feeds)

    def split(self, evaluation: int) -> tuple[Samples, Samples]:
        """These in two parts that have no feed in common: one to calibrate with, one to measure errors with.

        `evaluation` feeds become the second part, taken at equal distances, since files are often in the order of their
        classes; but at most half of them.

        Raises:
            UsageError: `evaluation` is less than 1.
            ModelError: there are fewer than two feeds.
        """
        if evaluation < 1:
            raise UsageError(f"{evaluation=} must be at least 1")
        if len(self) < 2:
            raise ModelError(
                f"{self.origin} has {len(self)} calibration sample: at least 2 are needed, one to calibrate with and "
                "one to measure errors with"
            )
        chosen = spread(len(self), min(evaluation, len(self) // 2))
        rest = sorted(set(range(len(self))) - set(chosen))
        return self._part(rest, "calibration"), self._part(chosen, "evaluation")

    def _part(self, numbers: Sequence[int], name: str) -> Samples:
        digest = hashlib.sha256(f"{self.digest} {list(numbers)}".encode()).hexdigest()
        return Samples(Selected(self.feeds, numbers), f"{self.origin} ({name})", digest, self.warning)


def load_data(source: str, model: ir.Model, *, count: int, seed: int = 0) -> Samples:
    """Up to `count` feeds of a model from a file, a folder or `random`, see above; of more, those at equal distances.

    Args:
        source: path of an `.npz` file or of a folder, or `random`.
        model: with static shapes; only its inputs are looked at, and for `random` what takes them.
        count: feeds wanted.
        seed: of random data.

    Raises:
        UsageError: `count` is less than 1.
        ModelError: data that isn't there, can't be read, doesn't fit the model, or has NaN or infinity in it; a model
            without inputs, or with one that can't be fed, or with more than half of this machine's memory of them.
    """
    if count < 1:
        raise UsageError(f"{count} calibration samples are too few: at least 1 is needed")
    inputs = model_inputs(model)
    if not inputs:
        raise ModelError(f"model {quoted(str(model.graph.name))} has no inputs: there is nothing to calibrate it with")
    size = sum(math.prod(each.shape) * each.dtype.itemsize for each in inputs)
    if size > _memory() // 2:  # the model's own values take as much again at the least
        raise _too_large(size)
    warning: str | None = None
    feeds: Batches
    path = Path(source)
    if source == RANDOM:
        feeds, origin, warning = RandomFeeds(model, inputs, count, seed), RANDOM, RANDOM_WARNING
    elif path.is_dir():
        feeds, origin = FolderFeeds(path, inputs), f"folder {path}"
    elif path.suffix == ".npz" and path.is_file():
        archive = ArchiveFeeds(path, inputs)
        feeds, origin, warning = archive, f"file {path}", archive.left_over
    else:
        found = "is neither" if path.exists() else "isn't there"
        raise ModelError(f"calibration data {source} {found}: give an .npz file, a folder of them, or {RANDOM}")
    if len(feeds) > count:
        feeds = Selected(feeds, spread(len(feeds), count))
    try:
        digest = _digest(feeds)
    except MemoryError:
        raise _too_large(size) from None
    return Samples(feeds, origin, digest, warning)


class ArchiveFeeds(Feeds):
    """The feeds of an `.npz` file whose arrays' first axes count them."""

    def __init__(self, path: Path, inputs: Sequence[Input]) -> None:
        """
        Raises:
            ModelError: the file can't be read, or its arrays don't fit the inputs or each other.
        """
        self._inputs = inputs
        self._arrays = open_npz(path)
        self._path = path
        self.left_over: str | None = None  # what has to be said about samples that don't fill a feed
        _check_names(self._arrays, inputs, path)
        counts = {each.name: self._count(each) for each in inputs}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{count} of {quoted(name)}" for name, count in counts.items())
            raise ModelError(f"{path} has {said}: every input needs as many")
        super().__init__(next(iter(counts.values())))

    def _count(self, wanted: Input) -> int:
        """How many feeds the array of an input holds."""
        shape, name = self._arrays[wanted.name].shape, quoted(wanted.name)
        if len(shape) == len(wanted.shape) + 1 and shape[1:] == wanted.shape:
            count, rest = shape[0], 0
        elif shape and len(shape) == len(wanted.shape) and shape[1:] == wanted.shape[1:] and wanted.batch:
            count, rest = divmod(shape[0], wanted.batch)
        else:
            forms = [("S", *wanted.shape), (f"S·{wanted.batch}", *wanted.shape[1:])][: 2 if wanted.batch > 0 else 1]
            shown = " or ".join(f"({', '.join(map(str, form))})" for form in forms[: 1 + bool(wanted.shape)])
            raise ModelError(
                f"{self._path}: {name} has shape {shape} and must have {shown}, with S calibration samples"
            )
        if count == 0:
            raise ModelError(
                f"{self._path} has no calibration samples: {name} has shape {shape}, a feed {wanted.shape}"
            )
        if rest:
            self.left_over = f"of the {shape[0]} samples of {name} the last {rest} fill no batch of {wanted.batch}"
        return count

    def feed(self, number: int) -> Feed:
        """One of them, from 0."""
        return {each.name: self._part(each, number) for each in self._inputs}

    def _part(self, wanted: Input, number: int) -> Array:
        array = self._arrays[wanted.name].array()
        if array.ndim > len(wanted.shape):
            part = array[number]
        else:
            part = array[number * wanted.batch : (number + 1) * wanted.batch]
        return conform(part, wanted, f"{self._path}, sample {number}")


class FolderFeeds(Feeds):
    """The feeds of a folder, a file each."""

    def __init__(self, folder: Path, inputs: Sequence[Input]) -> None:
        """
        Raises:
            ModelError: the folder can't be read or has no arrays in it.
        """
        try:
            entries = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        except OSError as error:
            raise ModelError(f"calibration folder {folder} can't be read ({error.strerror})") from None
        self._inputs = inputs
        self._files = [path for path in entries if path.suffix in (".npy", ".npz")]
        super().__init__(len(self._files))
        if not self._files:
            pictures = [path.name for path in entries if path.suffix.lower() in PICTURES]
            found = f"{len(pictures)} pictures, such as {pictures[0]}" if pictures else f"{len(entries)} other files"
            advice = ": prepare each as in training and write it with numpy.save" if pictures else ""
            raise ModelError(f"calibration folder {folder} has no .npy or .npz files, but {found}{advice}")
        lone = [path for path in self._files if path.suffix == ".npy"]
        if lone and len(inputs) != 1:
            names = listed([each.name for each in inputs])
            raise ModelError(f"{lone[0]} is one array, and the model has the inputs {names}: give .npz files")

    def feed(self, number: int) -> Feed:
        """One of them, from 0."""
        path = self._files[number]
        arrays = open_npz(path) if path.suffix == ".npz" else {self._inputs[0].name: open_npy(path)}
        _check_names(arrays, self._inputs, path)
        return {each.name: self._whole(each, arrays[each.name].array(), path) for each in self._inputs}

    @staticmethod
    def _whole(wanted: Input, array: Array, path: Path) -> Array:
        single = wanted.shape[:1] == (1,)
        if single and array.shape == wanted.shape[1:]:
            array = array[None]
        if array.shape != wanted.shape:
            without = f" or, without its batch, {wanted.shape[1:]}" if single else ""
            raise ModelError(
                f"{path}: {quoted(wanted.name)} has shape {array.shape} and must have {wanted.shape}{without}"
            )
        return conform(array, wanted, str(path))


def _check_names(arrays: Mapping[str, ArrayFile], inputs: Sequence[Input], path: Path) -> None:
    names = [each.name for each in inputs]
    for name in names:
        if name not in arrays:
            given = listed(list(arrays)) or "none"
            raise ModelError(
                f"{path} has no array {quoted(name)}: the model's inputs are {listed(names)}, arrays {given}"
            )
    for name in arrays:
        if name not in names:
            raise ModelError(f"{path} has an array {quoted(name)}: the model's inputs are {listed(names)}")


def _digest(feeds: Batches) -> str:
    """Goes through all feeds, which shows whether each can be read and fits."""
    digest = hashlib.sha256()
    for feed in feeds:
        for name, array in feed.items():
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _memory() -> int:
    """Bytes of memory that this process may have: the machine's, or its control group's."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        return min(most, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return most


def _too_large(size: int) -> ModelError:
    return ModelError(
        f"one feed of the model's inputs has {size} bytes, of {_memory()} bytes of memory: it must be less than half, "
        f"so make dimensions smaller (with --shape, where the model leaves them open)"
    )
