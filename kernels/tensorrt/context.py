"""What plugins are built for: the device and the driver that `register` was told of, and what is known by now.

One for the process, as TensorRT's registry is; replaced as a whole, so that a thread never sees half of it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tilewright.kernels.compile import triton_version
from tilewright.kernels.device import Device
from tilewright.kernels.lookup import code_hash
from tilewright.kernels.pack import active_pack
from tilewright.kernels.tensorrt.case import Case
from tilewright.kernels.tensorrt.expressions import is_static
from tilewright.kernels.tensorrt.operation import PluginVariant, Tensor
from tilewright.kernels.tensorrt.tactics import Tactic, tactics
from tilewright.tuning_db.env import database_dir
from tilewright.tuning_db.errors import UsageError
from tilewright.tuning_db.record import canonical_json
from tilewright.tuning_db.shipped_records import shipped_paths


@dataclass(frozen=True)
class Target:
    """The device that engines are built for, the CUDA version of the driver that runs them, how many tactics a plugin
    offers at the most, and the folder of the databases if not the environment's."""

    device: Device
    cuda: str
    tactics: int
    db: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of the databases."""
        return database_dir(self.db)


class _Place(NamedTuple):
    """What tactics belong to: a case, whatever its profile."""

    plugin: str
    attributes: str  # canonical JSON
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, case: Case) -> _Place:
        """The place of a case."""
        return cls(case.variant.name, canonical_json(case.attributes), case.inputs, case.outputs)


@dataclass
class _Known:
    """The tactics of a place by number, and those of each profile and evidence."""

    numbers: dict[int, Tactic] = field(default_factory=dict)
    of_profile: dict[Hashable, list[Tactic]] = field(default_factory=dict)


def _written(tensor: Tensor) -> str:
    """A tensor as people write it: `a: fp16[?, 512] LINEAR`."""
    dims = ", ".join(str(dim) if is_static(dim) else "?" for dim in tensor.dims)
    return f"{tensor.name}: {tensor.dtype}[{dims}] {tensor.format}"


@dataclass
class Tactics:
    """The tactics by number of each case that TensorRT has asked about; safe to share between threads."""

    target: Target
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _known: dict[_Place, _Known] = field(default_factory=dict)
    _asked: dict[_Place, dict[int, Tactic]] = field(default_factory=dict)  # since `begin`, in order
    _failure: Exception | None = None

    def begin(self) -> None:
        """What is `described` begins here: at a build. An error of before it is forgotten."""
        with self._lock:
            self._asked.clear()
            self._failure = None

    def note_failure(self, error: Exception) -> None:
        """Keeps the first error that a plugin raised, for TensorRT doesn't."""
        with self._lock:
            self._failure = self._failure or error

    def take_failure(self) -> Exception | None:
        """The first error that a plugin raised since `begin`; it is not kept any longer."""
        with self._lock:
            failure, self._failure = self._failure, None
            return failure

    def of(self, case: Case) -> list[Tactic]:
        """The tactics of a case, as the evidence is now.

        Raises:
            UnsupportedError, ProblemError, UsageError: as `tactics`.
        """
        place = _Place.of(case)
        profile = (
            evidence_stamp(self.target.folder),
            *(tuple(sorted(sizes.items())) for sizes in (case.profile.min, case.profile.opt, case.profile.max)),
        )
        with self._lock:
            known = self._known.setdefault(place, _Known())
            found = known.of_profile.get(profile)  # TensorRT asks how many there are, and then which
        if found is None:
            found = tactics(
                case, self.target.device, self.target.folder, cuda=self.target.cuda, most=self.target.tactics
            )
        with self._lock:
            known.of_profile[profile] = found
            for tactic in found:
                known.numbers[tactic.number] = tactic
                self._asked.setdefault(place, {})[tactic.number] = tactic
        return found

    def get(self, case: Case, number: int) -> Tactic:
        """The tactic that `of` gave this number, whatever has been tuned since.

        Raises:
            UsageError: it gave none; this plugin was made in another process, or for another device.
        """
        place = _Place.of(case)
        with self._lock:
            asked = place in self._known and number in self._known[place].numbers
        if not asked:
            self.of(case)
        with self._lock:
            numbers = self._known[place].numbers
            if number in numbers:
                return numbers[number]
            known = ", ".join(map(str, numbers))
        raise UsageError(
            f"{case.variant.name} has no tactic {number} on {self.target.device.board} (it has {known}): the timing "
            "cache is of another time; delete it"
        )

    def described(self) -> list[dict[str, Any]]:
        """What was asked since `begin`, in plain values: for each case its tensors, and the configuration behind each
        number, best evidence first."""
        with self._lock:
            return [
                {
                    "plugin": place.plugin,
                    "attributes": json.loads(place.attributes),
                    "inputs": [_written(tensor) for tensor in place.inputs],
                    "outputs": [_written(tensor) for tensor in place.outputs],
                    "tactics": {
                        str(number): {
                            "config": tactic.choice.config.to_dict(),
                            "provenance": str(tactic.choice.provenance or "default"),
                            "reason": tactic.choice.reason,
                            "time_us": tactic.choice.time_us,
                            "kernel": tactic.plan.name,
                        }
                        for number, tactic in found.items()
                    },
                }
                for place, found in self._asked.items()
            ]


def identity(variant: PluginVariant, attributes: dict[str, Any], target: Target) -> str:
    """What the timings of a plugin's tactics depend on besides its tensors: its attributes, the revisions of kernel and
    compiler, the device, and the evidence that numbers its tactics. TensorRT reuses the timings of equal ones."""
    parts = (
        variant.name,
        canonical_json(attributes),
        code_hash(variant.operation.kernel),
        triton_version(),
        target.device.key,
        target.cuda,
        str(target.tactics),
        evidence_stamp(target.folder),
    )
    return f"tilewright-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}"


def evidence_stamp(folder: Path) -> str:
    """Changes with the databases of a folder, other boards' and shipped ones too, and with the pack: with all that
    numbers tactics."""
    pack = active_pack()
    files = sorted(folder.glob("*.sqlite*")) + shipped_paths() + ([Path(pack.path)] if pack is not None else [])
    return " ".join(filter(None, map(_stamp, files)))


def _stamp(path: Path) -> str:
    # Whoever reads makes and removes an empty log, and an index of it.
    if path.name.endswith("-shm"):
        return ""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{path.name}:{found.st_size}:{found.st_mtime_ns}" if found.st_size else ""


_current: Tactics | None = None


def current() -> Tactics:
    """What plugins are built for now.

    Raises:
        UsageError: `register` was never called.
    """
    if _current is None:
        raise UsageError("the plugins are not registered: call tilewright.kernels.tensorrt.register() first")
    return _current


def set_current(target: Target) -> None:
    """Build for this target from now on. Known tactics stay where it is the one it was."""
    global _current
    if _current is None or _current.target != target:
        _current = Tactics(target)
