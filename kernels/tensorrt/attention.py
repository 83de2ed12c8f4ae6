"""Attention as a plugin: `FusedAttention`, over (batch, heads, sequence, head dim) tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tilewright.kernels.constants import checked_constant
from tilewright.kernels.ops.attention.launch import ATTENTION
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.attention.space import AttentionConfig
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.tensorrt.expressions import Number, ceil_div
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
from tilewright.tuning_db.errors import ProblemError, UsageError


class AttentionPlugin(PluginOperation):
    """`softmax(scale · Q·Kᵀ + bias) · V`, q of (B, H, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv)."""

    title = "FusedAttention"
    kernel = ATTENTION
    required = ("q", "k", "v")
    optional = (("bias",), ("alibi_slopes",), ("sinks",), ("q_scale", "k_scale", "v_scale"), ("kv_lens",))
    attributes = (
        Attribute("causal", 0, "1: a query sees no key behind its own place; the last query is at the last key"),
        Attribute("window_left", -1, "keys that a query sees before its own place; -1: all"),
        Attribute("window_right", -1, "keys that it sees behind it; -1: all"),
        Attribute("scale", 0.0, "factor on Q·Kᵀ; 0: 1/√D"),
        Attribute("softcap", 0.0, "scores become softcap · tanh(score / softcap); 0: they stay"),
        Attribute("out_dtype", "default", "canonical dtype name of the result"),
    )

    def outputs(self, tensors: Tensors, attributes: Attributes) -> tuple[Tensor, ...]:
        for name, form in (("q", "(B, H, Sq, D)"), ("k", "(B, Hkv, Skv, D)"), ("v", "(B, Hkv, Skv, Dv)")):
            check_rank(tensors[name], lambda rank: rank == 4, form)
        probe = AttentionProblem(B=1, H=1, Sq=64, Skv=64, D=64, **self._fields(tensors, attributes))  # type: ignore[arg-type]
        return (Tensor("out", (*tensors["q"].dims[:3], tensors["v"].dims[3]), probe.output_dtype),)

    def check_static(self, tensors: Tensors, attributes: Attributes) -> None:
        tensors["q"].static(1, "H")
        for name in ("k", "v"):
            tensors[name].static(1, "Hkv")
        for name in ("q", "k", "v"):
            tensors[name].static(3, "the head dim")

    def problem(self, tensors: Tensors, attributes: Attributes) -> AttentionProblem:
        (b, h, sq, d), (_, heads, skv, _), dv = tensors["q"].shape, tensors["k"].shape, tensors["v"].shape[3]
        check_shape(tensors["k"], (b, heads, skv, d))
        check_shape(tensors["v"], (b, heads, skv, dv))
        fields = self._fields(tensors, attributes)
        if "bias" in tensors:
            bias = tensors["bias"]
            check_rank(bias, lambda rank: rank == 4, "(B or 1, H or 1, Sq or 1, Skv)")
            check_shape(bias, *((x, y, z, skv) for x in (b, 1) for y in (h, 1) for z in (sq, 1)))
            fields |= {"bias_batch": bias.shape[0] > 1, "bias_heads": bias.shape[1] > 1}
            fields |= {"bias_rows": bias.shape[2] > 1 or sq == 1}
        for name, shapes in (
            ("alibi_slopes", ((h,),)),
            ("sinks", ((h,),)),
            ("kv_lens", ((b,),)),
            *((f"{name}_scale", ((), (1,))) for name in "qkv"),
        ):
            if name in tensors:
                check_shape(tensors[name], *shapes)
        return AttentionProblem(B=b, H=h, Sq=sq, Skv=skv, D=d, Hkv=heads, Dv=dv, **fields)  # type: ignore[arg-type]

    def scalars(self, tensors: Tensors, attributes: Attributes) -> dict[str, Number]:
        q, k = tensors["q"].dims, tensors["k"].dims
        windows = {name: attributes[name] for name in ("window_left", "window_right")}
        return {"H": q[1], "Sq": q[2], "Skv": k[2], **windows}

    def grid(self, tensors: Tensors, attributes: Attributes, config: Config) -> Number:
        assert isinstance(config, AttentionConfig)
        b, _, sq, _ = tensors["q"].dims
        h, kv_heads = tensors["q"].static(1, "H"), tensors["k"].static(1, "Hkv")
        heads = h // kv_heads if config.PACK else 1
        return ceil_div(sq * heads, config.BLOCK_M) * (h // heads) * b

    def constants(self, tensors: Tensors, attributes: Attributes) -> tuple[tuple[str, float], ...]:
        scale = attributes["scale"] or 1 / math.sqrt(tensors["q"].static(3, "the head dim"))
        return ("SCALE", scale), *((("SOFTCAP", attributes["softcap"]),) if attributes["softcap"] else ())

    def broadcasts(self, problem: Problem) -> Mapping[str, object]:
        assert isinstance(problem, AttentionProblem)
        return {
            "bias_batch": problem.bias_batch if problem.B > 1 else None,
            "bias_heads": problem.bias_heads if problem.H > 1 else None,
            "bias_rows": problem.bias_rows if problem.Sq > 1 else None,
        }

    def _fields(self, tensors: Tensors, attributes: Attributes) -> dict[str, object]:
        """The problem's fields that no dimension decides."""
        kinds = {tensors[name].dtype for name in ("q", "k", "v")}
        if len(kinds) > 1:
            raise ProblemError(
                f"q, k and v are {', '.join(tensors[name].dtype for name in 'qkv')}: of one dtype, please"
            )
        for name in ("scale", "softcap"):
            if attributes[name] != 0:
                try:
                    checked_constant(name, attributes[name])
                except UsageError as error:
                    raise UsageError(f"{error}, or 0 for the default") from None
        check_fp32(tensors, "alibi_slopes", "sinks", "q_scale", "k_scale", "v_scale")
        if "kv_lens" in tensors and tensors["kv_lens"].dtype != "int32":
            raise ProblemError(f"kv_lens is {tensors['kv_lens'].dtype} and must be int32")
        for name in ("window_left", "window_right"):
            if attributes[name] < -1:
                raise UsageError(f"{name}={attributes[name]} must be at least 0, or -1 for no limit")
        left, right = (None if attributes[name] < 0 else attributes[name] for name in ("window_left", "window_right"))
        return {
            "dtype": tensors["q"].dtype,
            "out_dtype": None if attributes["out_dtype"] == "default" else attributes["out_dtype"],
            "causal": flag(attributes, "causal"),
            "window_left": left,
            "window_right": right,
            "softcap": attributes["softcap"] > 0,
            "bias": tensors["bias"].dtype if "bias" in tensors else None,
            "alibi": "alibi_slopes" in tensors,
            "sinks": "sinks" in tensors,
            "scales": "q_scale" in tensors,
            "kv_lens": "kv_lens" in tensors,
        }
