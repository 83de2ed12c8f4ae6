"""What a model computes, as the judge of what was made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from tilewright.tuner.model.verify.compare import Comparison, Reference, SizeError
from tilewright.tuning_db.errors import ModelError, RunError


class Judge(Reference):
    """A reference that has run before anything is compared: neither the model nor its data are at fault where something
    made of it can't be."""

    def compare(
        self, changed: ir.Model | Path, *, layers: Mapping[str, str] | None = None, lowered: bool = True
    ) -> Comparison:
        """As `Reference.compare`; `lowered` says whether more than fp32 rounds in what was made.

        Raises:
            ModelError: the model itself can't be loaded, or a feed doesn't fit.
            RunError: ONNX Runtime failed, or refuses what was made, or outputs don't go together.
        """
        self.work_out()
        try:
            return super().compare(changed, layers=layers)
        except SizeError as error:
            advice = "use --precision fp32, which rounds the least" if lowered else "at no precision can it be fused"
            raise RunError(f"{error}, as rounding changes its size: {advice}; no model was written") from None
        except ModelError as error:
            raise RunError(
                f"what was made of the model can't be held against it, which is a defect of Tilewright: {error}; "
                "no model was written"
            ) from None
