"""All that the quantised layers of a model need, and the file that it is kept in for a run that was killed.

The file is NumPy's `.npz`, written whole: weights and shifts as arrays, the rest as JSON; and the model itself, whose
ranges were moved between layers, as ONNX beside it. Where weights alone are quantised no ranges are, and there is no
second copy of it; what layers share is written once, and shared again by those of the run that reads it. Nothing in it
is unpickled. It counts only under the key that it was written with.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.graph import DTYPES
from tilewright.tuner.model.precision.grouped import WEIGHT_ONLY, GroupedWeights, group_of
from tilewright.tuner.model.precision.post_training import Quantisation
from tilewright.tuner.model.precision.quantise import QUANTISED, LayerPrecision, Weights
from tilewright.tuner.model.write import write_model
from tilewright.tuning_db.atomic import whole_file

Array = np.ndarray[Any, Any]
FORMAT = 6


@dataclass(frozen=True, slots=True)
class Quantised:
    """What was found for one kind of precision, and the model that it was found for."""

    kind: str
    model: ir.Model  # fused, fp32; its ranges were moved, and it computes what the one before did
    plan: Mapping[str, LayerPrecision]
    reasons: Mapping[str, str]  # of each fused node that stays at the base precision
    method: str  # of calibration; "" where there was nothing to calibrate
    decibel: float  # of the best method: `Quantisation.scores`
    weights: Mapping[str, Weights]
    shifts: Mapping[str, Array]
    grouped: Mapping[str, GroupedWeights] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Quantisation, model: ir.Model) -> Self:
        """From what quantising a model gave."""
        method = "" if found.method is None else str(found.method)
        decibel = 0.0 if found.method is None else found.scores[found.method]
        return cls(found.kind, model, found.plan, found.reasons, method, decibel, found.weights, found.shifts)

    def save(self, file: Path, key: str) -> None:
        """Writes the file, and the model beside it.

        Raises:
            UsageError: they can't be written.
        """
        files = [] if self.kind in WEIGHT_ONLY else write_model(self.model, _model_file(file))
        for old in file.parent.glob(f"{file.stem}.*.data"):
            if old not in files:
                old.unlink()
        about = {
            "format": FORMAT,
            "key": key,
            "model": {each.name: _known_by(each) for each in files},
            "kind": self.kind,
            "method": self.method,
            "decibel": self.decibel,
            "reasons": dict(self.reasons),
            "layers": [sorted(each) for each in (self.weights, self.grouped, self.shifts)],
            "plan": {name: [layer.kind, dict(layer.scales), dict(layer.zeros)] for name, layer in self.plan.items()},
        }
        arrays = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
        for index, (name, weights) in enumerate(self.weights.items()):
            arrays[f"name.{index}"] = np.frombuffer(name.encode(), np.uint8)
            arrays[f"values.{index}"] = weights.values.view(np.uint8)
            arrays[f"scales.{index}"] = weights.scales
        for index, (names, each) in enumerate(_shared(self.grouped)):
            arrays[f"grouped.{index}"] = np.frombuffer(json.dumps(names).encode(), np.uint8)
            arrays[f"integers.{index}"] = each.values  # int8 of 8 bits, uint8 of 4
            arrays[f"steps.{index}"] = each.scales
        for index, (name, shift) in enumerate(self.shifts.items()):
            arrays[f"shifted.{index}"] = np.frombuffer(name.encode(), np.uint8)
            arrays[f"shift.{index}"] = shift
        with whole_file(file) as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, file: Path, key: str, fused: ir.Model | None = None) -> Self | None:
        """What `save` wrote; None if there is no such file, it is damaged, or it was written under another key.
        `fused` is the model that it was found for, where that is not in the file."""
        try:
            # Opened here: NumPy leaves a file open that is no archive.
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                about = json.loads(arrays["about"].tobytes())
                # A run that was killed between the two files leaves a model of another key.
                if (about["format"], about["key"]) != (FORMAT, key):
                    return None
                if any(_known_by(file.with_name(name)) != known for name, known in about["model"].items()):
                    return None
                weights, shifts = {}, {}
                grouped: dict[str, GroupedWeights] = {}
                for name in arrays.files:
                    word, _, index = name.partition(".")
                    if word == "name":
                        values = arrays[f"values.{index}"].view(DTYPES[QUANTISED[about["kind"]]].numpy())
                        weights[arrays[name].tobytes().decode()] = Weights(values, arrays[f"scales.{index}"])
                    elif word == "grouped":
                        values = arrays[f"integers.{index}"]
                        bits = 4 if values.dtype == np.uint8 else 8
                        each = GroupedWeights(values, bits, group_of(len(values), bits), arrays[f"steps.{index}"])
                        grouped |= dict.fromkeys(json.loads(arrays[name].tobytes()), each)
                    elif word == "shifted":
                        shifts[arrays[name].tobytes().decode()] = arrays[f"shift.{index}"]
            if [sorted(each) for each in (weights, grouped, shifts)] != about["layers"]:
                return None
            model = fused if about["kind"] in WEIGHT_ONLY else ir.load(_model_file(file))
            if model is None:
                return None
            plans = about["plan"].items()
            plan = {name: LayerPrecision(kind, scales, zeros) for name, (kind, scales, zeros) in plans}
            words = about["reasons"], about["method"], about["decibel"]
            return cls(about["kind"], model, plan, *words, weights, shifts, grouped)
        except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile, RuntimeError):
            return None  # a `RuntimeError`, as `NotImplementedError` is: of an archive that says it is of another kind


def _shared(grouped: Mapping[str, GroupedWeights]) -> list[tuple[list[str], GroupedWeights]]:
    """Weights, each once, with the names of the layers that have them: the model has one constant for these."""
    found: dict[int, tuple[list[str], GroupedWeights]] = {}
    for name, weights in grouped.items():
        found.setdefault(id(weights), ([], weights))[0].append(name)
    return list(found.values())


def _known_by(file: Path) -> str | int:
    """The hash of a model's file; of its data, which has one in its name, the size."""
    if file.suffix == ".data":
        return file.stat().st_size
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _model_file(file: Path) -> Path:
    return file.with_suffix(".onnx")
