"""What plugins are built for: the device and the driver that `register` was told of, and what is known by now.

One for the process, as TensorRT's registry is; replaced as a whole, so that a thread never sees half of it.
"""

from __future__ import annotations

import hashlib
import json
import threading
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
from tilewright.tuning_db.shipped import shipped_paths


@dataclass(frozen=True)
class Target:
    """The device that engines are built for, the CUDA version of the driver that runs them, and how many tactics a
    plugin offers at the most."""

    device: Device
    cuda: str
    tactics: int


class _Place(NamedTuple):
    """What numbers of tactics belong to."""

    plugin: str
    attributes: str  # canonical JSON
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    evidence: str


def _written(tensor: Tensor) -> str:
    """A tensor as people write it: `a: fp16[?, 512] LINEAR`."""
    dims = ", ".join(str(dim) if is_static(dim) else "?" for dim in tensor.dims)
    return f"{tensor.name}: {tensor.dtype}[{dims}] {tensor.format}"


@dataclass
class Tactics:
    """The tactics by number of each case that TensorRT has asked about; safe to share between threads."""

    target: Target
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _known: dict[_Place, dict[int, Tactic]] = field(default_factory=dict)

    def of(self, case: Case) -> list[Tactic]:
        """The tactics of a case. Cases that differ in their profile alone share numbers: TensorRT keeps a kernel by its
        number, whatever the profile, so one that comes with a second profile gets a number of its own.

        Raises:
            UnsupportedError, ProblemError, UsageError: as `tactics`.
        """
        found = tactics(case, self.target.device, database_dir(), cuda=self.target.cuda, most=self.target.tactics)
        key = self._key(case)
        with self._lock:
            known = self._known.setdefault(key, {})
            numbers = {(tactic.choice.config, tactic.plan.name): number for number, tactic in known.items()}
            numbered = []
            for tactic in found:
                number = numbers.get((tactic.choice.config, tactic.plan.name)) or len(known) + 1
                known[number] = Tactic(number, tactic.choice, tactic.plan)
                numbered.append(known[number])
        return numbered

    def get(self, case: Case, number: int) -> Tactic:
        """The tactic that `of` gave this number.

        Raises:
            UsageError: it gave none; this plugin was made in another process, or for another device.
        """
        with self._lock:
            tactic = self._known.get(self._key(case), {}).get(number)
        if tactic is not None:
            return tactic
        self.of(case)
        with self._lock:
            tactic = self._known[self._key(case)].get(number)
        if tactic is None:
            known = ", ".join(map(str, self._known[self._key(case)]))
            raise UsageError(
                f"{case.variant.name} has no tactic {number} on {self.target.device.board} (it has {known}): "
                "the timing cache is of another time; delete it"
            )
        return tactic

    def described(self) -> list[dict[str, Any]]:
        """What is known, in plain values: for each case its tensors, and the configuration behind each number."""
        with self._lock:
            return [
                {
                    "plugin": name,
                    "attributes": json.loads(attributes),
                    "inputs": [_written(tensor) for tensor in inputs],
                    "outputs": [_written(tensor) for tensor in outputs],
                    "tactics": {
                        str(number): {
                            "config": tactic.choice.config.to_dict(),
                            "provenance": str(tactic.choice.provenance or "default"),
                            "reason": tactic.choice.reason,
                            "time_us": tactic.choice.time_us,
                            "kernel": tactic.plan.name,
                        }
                        for number, tactic in known.items()
                    },
                }
                for (name, attributes, inputs, outputs, _), known in self._known.items()
            ]

    def _key(self, case: Case) -> _Place:
        attributes = canonical_json(case.attributes)
        return _Place(case.variant.name, attributes, case.inputs, case.outputs, evidence_stamp())


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
        evidence_stamp(),
    )
    return f"tilewright-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}"


def evidence_stamp() -> str:
    """Changes with the databases, other boards' and shipped ones too, and with the pack: with all that numbers
    tactics."""
    pack = active_pack()
    files = sorted(database_dir().glob("*.sqlite*")) + shipped_paths() + ([Path(pack.path)] if pack is not None else [])
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
