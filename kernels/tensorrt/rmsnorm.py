"""RMSNorm as a plugin: `FusedRmsNorm`, over the last dimension; with a residual, the sum is a second output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from tilewright.kernels.constants import checked_constant
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM
from tilewright.kernels.ops.rmsnorm.problem import EPS, RmsNormProblem
from tilewright.kernels.ops.rmsnorm.space import RmsNormConfig
from tilewright.kernels.problem import Config
from tilewright.kernels.tensorrt.expressions import Number, ceil_div, product
from tilewright.kernels.tensorrt.operation import (
    Attribute,
    Attributes,
    PluginOperation,
    Tensor,
    Tensors,
    check_fp32,
    check_rank,
    check_shape,
)


class RmsNormPlugin(PluginOperation):
    """`h / √(mean(h²) + eps) · (weight_offset + weight) / out_scale`, h = x + residual, x of (…, N)."""

    title = "FusedRmsNorm"
    kernel = RMSNORM
    required = ("x",)
    optional = (("residual",), ("weight",), ("out_scale",))
    brings: ClassVar[Mapping[str, str]] = {"residual": "residual_out"}
    attributes = (
        Attribute("eps", EPS, "added to the mean of squares"),
        Attribute("weight_offset", 0.0, "added to the weight: 1 for Gemma's"),
        Attribute("out_dtype", "default", "canonical dtype name of the result"),
    )

    def outputs(self, tensors: Tensors, attributes: Attributes) -> tuple[Tensor, ...]:
        x = tensors["x"]
        check_rank(x, lambda rank: rank >= 1, "(…, N)")
        probe = RmsNormProblem(M=16, N=64, **self._fields(tensors, attributes))  # type: ignore[arg-type]
        out = Tensor("out", x.dims, probe.output_dtype)
        if "residual" not in tensors:
            return (out,)
        return out, Tensor("residual_out", x.dims, tensors["residual"].dtype)

    def check_static(self, tensors: Tensors, attributes: Attributes) -> None:
        tensors["x"].static(-1, "N")

    def problem(self, tensors: Tensors, attributes: Attributes) -> RmsNormProblem:
        shape = tensors["x"].shape
        for name, shapes in (("residual", (shape,)), ("weight", (shape[-1:],)), ("out_scale", ((), (1,)))):
            if name in tensors:
                check_shape(tensors[name], *shapes)
        return RmsNormProblem(M=math.prod(shape[:-1]), N=shape[-1], **self._fields(tensors, attributes))  # type: ignore[arg-type]

    def scalars(self, tensors: Tensors, attributes: Attributes) -> dict[str, Number]:
        dims = tensors["x"].dims
        return {"M": product(dims[:-1]), "N": dims[-1]}

    def grid(self, tensors: Tensors, attributes: Attributes, config: Config) -> Number:
        assert isinstance(config, RmsNormConfig)
        return ceil_div(product(tensors["x"].dims[:-1]), config.BLOCK_M)

    def constants(self, tensors: Tensors, attributes: Attributes) -> tuple[tuple[str, float], ...]:
        return ("EPS", attributes["eps"]), ("WEIGHT_OFFSET", attributes["weight_offset"])

    def _fields(self, tensors: Tensors, attributes: Attributes) -> dict[str, object]:
        """The problem's fields that no dimension decides."""
        for name in ("eps", "weight_offset"):
            checked_constant(name, attributes[name])
        check_fp32(tensors, "out_scale")
        return {
            "dtype": tensors["x"].dtype,
            "residual": tensors["residual"].dtype if "residual" in tensors else None,
            "residual_out": "residual" in tensors,
            "weight": tensors["weight"].dtype if "weight" in tensors else None,
            "out_scale": "out_scale" in tensors,
            "out_dtype": None if attributes["out_dtype"] == "default" else attributes["out_dtype"],
        }
