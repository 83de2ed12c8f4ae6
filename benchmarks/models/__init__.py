"""The models that whole-model optimisation is proved on: nine real image classifiers and three transformers, with
numbers that make errors visible, and inputs for them.

    from benchmarks.models import ARCHITECTURES, build, samples

    model = build("resnet50")                    # onnx.ModelProto
    feeds = samples("resnet50", 256, seed=1)     # a list of feeds by input name

Everything follows from the seed: the same versions of NumPy and ONNX Runtime on the same processor give the same bytes.
"""

from __future__ import annotations

from benchmarks.models.architecture import (
    ARCHITECTURES,
    Architecture,
    architecture,
    build,
    build_ir,
    samples,
    write,
)
from benchmarks.models.controls import without

__all__ = ["ARCHITECTURES", "Architecture", "architecture", "build", "build_ir", "samples", "without", "write"]
