"""The 2-D convolution as a plugin: `FusedConv2d`, in NCHW and, where TensorRT's formats allow it, in NHWC memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tilewright.kernels.kernel import Launch
from tilewright.kernels.ops.conv2d.launch import CONV2D
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.conv2d.space import Conv2dConfig
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.tensorrt.expressions import Number, ceil_div, is_static
from tilewright.kernels.tensorrt.operation import (
    Attribute,
    Attributes,
    PluginOperation,
    Tensor,
    Tensors,
    check_fp32,
    check_rank,
    check_shape,
    flag,
)
from tilewright.kernels.tensorrt.types import LINEAR, channels_last
from tilewright.tuning_db.errors import ProblemError, UsageError

WINDOW = (
    "stride_h",
    "stride_w",
    "pad_top",
    "pad_left",
    "pad_bottom",
    "pad_right",
    "dilation_h",
    "dilation_w",
    "groups",
)


class Conv2dPlugin(PluginOperation):
    """`activation(x_scale · w_scale · (x ∗ w) + bias + residual) / out_scale`, x NCHW, w (K, C/groups, R, S)."""

    title = "FusedConv2d"
    kernel = CONV2D
    required = ("x", "w")
    optional = (("bias",), ("residual",), ("x_scale",), ("w_scale",), ("out_scale",))
    attributes = (
        Attribute("activation", "none", "a name of the epilogue's activations, with its parameters"),
        Attribute("residual_last", 0, "1: the residual is added behind the activation, not before it"),
        Attribute("stride_h", 1, "rows from one output pixel's window to the next"),
        Attribute("stride_w", 1, "columns likewise"),
        Attribute("pad_top", 0, "zero rows around x"),
        Attribute("pad_left", 0, "zero columns likewise"),
        Attribute("pad_bottom", 0, "zero rows around x"),
        Attribute("pad_right", 0, "zero columns likewise"),
        Attribute("dilation_h", 1, "distance of neighbouring taps"),
        Attribute("dilation_w", 1, "columns likewise"),
        Attribute("groups", 1, "of channels; as many as there are channels: depthwise"),
        Attribute("precision", "default", "of fp32 operands: ieee or tf32"),
        Attribute("out_dtype", "default", "canonical dtype name of the result"),
    )

    def outputs(self, tensors: Tensors, attributes: Attributes) -> tuple[Tensor, ...]:
        for name in ("x", "w"):
            check_rank(tensors[name], lambda rank: rank == 4, "(N, C, H, W)" if name == "x" else "(K, C/groups, R, S)")
        x, w = tensors["x"], tensors["w"]
        p, q = self._pixels(tensors, attributes)
        return (Tensor("out", (x.dims[0], w.dims[0], p, q), self._probe(tensors, attributes).output_dtype),)

    def check_static(self, tensors: Tensors, attributes: Attributes) -> None:
        tensors["x"].static(1, "C")
        for axis, what in enumerate(("K", "C/groups", "R", "S")):
            tensors["w"].static(axis, what)

    def problem(self, tensors: Tensors, attributes: Attributes) -> Conv2dProblem:
        (n, c, h, w), (k, per_group, r, s) = tensors["x"].shape, tensors["w"].shape
        groups = attributes["groups"]
        if groups < 1 or c != per_group * groups:
            raise ProblemError(f"x has {c} channels and w {per_group} in each of {groups=}: they don't go together")
        problem = Conv2dProblem(
            N=n,
            H=h,
            W=w,
            C=c,
            K=k,
            R=r,
            S=s,
            **self._fields(tensors, attributes),  # type: ignore[arg-type]
        )
        out = (n, k, problem.P, problem.Q)
        for name, shapes in (
            ("bias", ((k,),)),
            ("residual", (out,)),
            ("x_scale", ((), (1,))),
            ("w_scale", ((), (1,), (k,))),
            ("out_scale", ((), (1,))),
        ):
            if name in tensors:
                check_shape(tensors[name], *shapes)
        check_fp32(tensors, "x_scale", "w_scale", "out_scale")
        return problem

    def scalars(self, tensors: Tensors, attributes: Attributes) -> dict[str, Number]:
        (n, c, h, w), k = tensors["x"].dims, tensors["w"].static(0, "K")
        p, q = self._pixels(tensors, attributes)
        groups = self._groups(tensors, attributes)
        return {
            "N": n,
            "H": h,
            "W": w,
            "C": c // groups,
            "K": k // groups,
            "P": p,
            "Q": q,
            "pad_top": attributes["pad_top"],
            "pad_left": attributes["pad_left"],
        }

    def grid(self, tensors: Tensors, attributes: Attributes, config: Config) -> Number:
        assert isinstance(config, Conv2dConfig)
        p, q = self._pixels(tensors, attributes)
        groups = self._groups(tensors, attributes)
        filters = tensors["w"].static(0, "K") // groups
        positions = tensors["x"].dims[0] * ceil_div(p, config.ROWS) * q
        return ceil_div(positions, config.BLOCK_M) * (-(-filters // config.BLOCK_N) * groups)

    def generalized(self, launch: Launch, tensors: Tensors) -> Launch:
        if all(is_static(dim) for dim in tensors["x"].dims[2:]):
            return launch
        # A row of the result is some (W + padding - …) / stride long: nothing divides it for sure.
        weak = {"EVEN_M": False, "EVEN_P": False, "RUN": 1, "PADDED": True}
        return replace(
            launch,
            constexprs=tuple((name, weak.get(name, value)) for name, value in launch.constexprs),
            arguments=tuple(
                argument._replace(aligned=False) if argument.name in ("H", "W", "P", "Q") else argument
                for argument in launch.arguments
            ),
        )

    def broadcasts(self, problem: Problem) -> Mapping[str, object]:
        assert isinstance(problem, Conv2dProblem)
        return {"w_scale": problem.w_scale if problem.K > 1 else None}

    def followers(
        self, tensors: Tensors, outputs: tuple[Tensor, ...], attributes: Attributes
    ) -> Mapping[tuple[str, int], Number]:
        return {("residual", axis): dim for axis, dim in enumerate(outputs[0].dims)}

    def formats(self, tensors: Tensors, outputs: tuple[Tensor, ...], attributes: Attributes) -> list[tuple[str, ...]]:
        linear = super().formats(tensors, outputs, attributes)
        last = {
            tensor.name: channels_last(tensor.dtype, tensor.static(1, "C"))
            for tensor in (*tensors.values(), *outputs)
            if tensor.name in ("x", "residual", "out")
        }
        if None in last.values():
            return linear  # channels that TensorRT would pad, or a dtype that has no such format
        return [*linear, tuple(last.get(tensor.name) or LINEAR for tensor in (*tensors.values(), *outputs))]

    def _pixels(self, tensors: Tensors, attributes: Attributes) -> tuple[Number, Number]:
        """P and Q, rows and columns of the result."""
        for name in WINDOW:
            least = 0 if name.startswith("pad") else 1
            if attributes[name] < least:
                raise UsageError(f"{name}={attributes[name]} must be at least {least}")
        h, w = tensors["x"].dims[2:]
        r, s = tensors["w"].dims[2:]
        pads = [attributes[f"pad_{side}"] for side in ("top", "bottom", "left", "right")]
        rows = h + (sum(pads[:2]) - 1) - (r - 1) * attributes["dilation_h"]
        columns = w + (sum(pads[2:]) - 1) - (s - 1) * attributes["dilation_w"]
        return rows // attributes["stride_h"] + 1, columns // attributes["stride_w"] + 1

    def _groups(self, tensors: Tensors, attributes: Attributes) -> int:
        """Groups of the implicit GEMM; a depthwise kernel has none."""
        groups: int = attributes["groups"]
        return 1 if tensors["w"].static(1, "C/groups") == 1 and groups > 1 else groups

    def _fields(self, tensors: Tensors, attributes: Attributes) -> dict[str, object]:
        """The problem's fields that no size of x and w decides."""
        per_tensor = "w_scale" in tensors and all(dim == 1 for dim in tensors["w_scale"].dims)
        kinds = {name: tensors[name].dtype if name in tensors else None for name in ("bias", "residual")}
        if tensors["w"].dtype != tensors["x"].dtype:
            raise ProblemError(f"x is {tensors['x'].dtype} and w is {tensors['w'].dtype}: they must have one dtype")
        return {
            **{name: attributes[name] for name in WINDOW},
            "dtype": tensors["x"].dtype,
            "layout": "nchw" if tensors["x"].format == LINEAR else "nhwc",
            "w_layout": "kcrs",
            "x_scale": "x_scale" in tensors,
            "w_scale": None if "w_scale" not in tensors else "tensor" if per_tensor else "channel",
            "precision": None if attributes["precision"] == "default" else attributes["precision"],
            "out_dtype": None if attributes["out_dtype"] == "default" else attributes["out_dtype"],
            "activation": attributes["activation"],
            "residual_last": flag(attributes, "residual_last"),
            "out_scale": "out_scale" in tensors,
            **kinds,
        }

    def _probe(self, tensors: Tensors, attributes: Attributes) -> Conv2dProblem:
        """A small problem of the same dtypes and flags: it checks them, and says what the result's dtype is."""
        plain = {name: 0 if name.startswith("pad") else 1 for name in WINDOW}
        fields = {**self._fields(tensors, attributes), **plain}
        return Conv2dProblem(N=1, H=16, W=16, C=16, K=16, R=1, S=1, **fields)  # type: ignore[arg-type]
