"""The GEMM as a plugin: `FusedGemm`, with scales, zero points, bias, residual and a quantised result as inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from tilewright.kernels.epilogue import GATED
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.packing import packed_rows
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.tensorrt.expressions import Number, ceil_div, is_static, product
from tilewright.kernels.tensorrt.operation import (
    Attribute,
    Attributes,
    PluginOperation,
    Tensor,
    Tensors,
    check_fp32,
    check_rank,
    check_shape,
    choice,
    flag,
)
from tilewright.tuning_db.errors import ProblemError


class _Form(NamedTuple):
    """How the operands' dimensions make one product."""

    lead: tuple[Number, ...]  # of the result
    rows: Number  # of one matrix of the result, before leading dimensions are folded into it
    M: Number
    N: Number
    K: Number
    batch: Number
    a_broadcast: bool
    b_broadcast: bool


class GemmPlugin(PluginOperation):
    """`activation(a_scale · b_scale · (A·B) + bias + residual) / out_scale`, A (…, M, K), B (K, N) or (…, K, N)."""

    title = "FusedGemm"
    kernel = GEMM
    required = ("a", "b")
    optional = (("a_scale",), ("b_scale",), ("b_zero",), ("bias",), ("residual",), ("out_scale",))
    needs: ClassVar[Mapping[str, str]] = {"b_zero": "b_scale"}
    attributes = (
        Attribute("activation", "none", "a name of the epilogue's activations, with its parameters"),
        Attribute("residual_last", 0, "1: the residual is added behind the activation, not before it"),
        Attribute("gated", "none", "halves or interleaved: how the columns of gate and up lie in N"),
        Attribute("trans_a", 0, "1: a is (…, K, M)"),
        Attribute("trans_b", 0, "1: b is (…, N, K)"),
        Attribute("weights", "none", "int4: b holds packed int4, two in a byte, under a of fp16 or bf16"),
        Attribute("group_size", 0, "rows of B that share a scale, of int8 and int4 weights; 0: all"),
        Attribute("precision", "default", "of fp32 operands: ieee or tf32"),
        Attribute("out_dtype", "default", "canonical dtype name of the result"),
    )

    def outputs(self, tensors: Tensors, attributes: Attributes) -> tuple[Tensor, ...]:
        form = self._form(tensors, attributes)
        columns = form.N // 2 if self._gated(attributes) else form.N
        return (Tensor("out", (*form.lead, form.rows, columns), self._probe(tensors, attributes).output_dtype),)

    def check_static(self, tensors: Tensors, attributes: Attributes) -> None:
        a, b, turned = tensors["a"], tensors["b"], flag(attributes, "trans_b")
        if self._gated(attributes):
            b.static(-2 if turned else -1, "N of gated columns")
        if self._weights(tensors, attributes):
            b.static(-1 if turned else -2, "K of quantised weights")
            a.static(-2 if flag(attributes, "trans_a") else -1, "K of quantised weights")
        depths = (a, -2 if flag(attributes, "trans_a") else -1), (b, -1 if turned else -2)
        if any(is_static(tensor.dims[axis]) for tensor, axis in depths):
            for (tensor, axis), (other, _) in zip(depths, depths[::-1], strict=True):
                tensor.static(axis, f"K, as in {other.name}")

    def problem(self, tensors: Tensors, attributes: Attributes) -> GemmProblem:
        form = self._form(tensors, attributes)
        a, b = tensors["a"], tensors["b"]
        m, n, k, batch, rows = (int(size) for size in (form.M, form.N, form.K, form.batch, form.rows))  # type: ignore[arg-type]
        depth = b.shape[-1 if flag(attributes, "trans_b") else -2]
        wanted = packed_rows(k) if self._weights(tensors, attributes) == "int4" else k
        if depth != wanted:
            raise ProblemError(f"a is {a.shape} and b is {b.shape}: b must have {wanted} rows for K={k}")
        if not (form.a_broadcast or form.b_broadcast) and batch > 1 and a.shape[:-2] != b.shape[:-2]:
            raise ProblemError(
                f"a is {a.shape} and b is {b.shape}: their leading dimensions must be equal, or 1 of one"
            )
        columns = n // 2 if self._gated(attributes) else n
        lead = tuple(int(dim) for dim in form.lead)  # type: ignore[arg-type]
        if "residual" in tensors:
            one = (1,) * max(0, len(tensors["residual"].dims) - 2)
            check_shape(
                tensors["residual"], (*lead, rows, columns), *([(*one, rows, columns)] if len(one) <= len(lead) else [])
            )
        if "bias" in tensors:
            check_shape(tensors["bias"], (n,), (rows, 1))
        self._check_scales(tensors, attributes, (m, n, k), batch)
        # Of one matrix there is nothing to broadcast.
        many = batch > 1
        return GemmProblem(
            M=m,
            N=n,
            K=k,
            batch=batch,
            a_broadcast=form.a_broadcast and many,
            b_broadcast=form.b_broadcast and many,
            residual_broadcast=many and "residual" in tensors and math.prod(tensors["residual"].shape[:-2]) == 1,
            bias_axis="m" if _per_row(tensors.get("bias")) else "n",
            **self._fields(tensors, attributes),  # type: ignore[arg-type]
        )

    def scalars(self, tensors: Tensors, attributes: Attributes) -> dict[str, Number]:
        form = self._form(tensors, attributes)
        return {"M": form.M, "N": form.N, "K": form.K, "batch": form.batch}

    def grid(self, tensors: Tensors, attributes: Attributes, config: Config) -> Number:
        assert isinstance(config, GemmConfig)
        form = self._form(tensors, attributes)
        return ceil_div(form.M, config.BLOCK_M) * ceil_div(form.N, config.BLOCK_N) * form.batch

    def broadcasts(self, problem: Problem) -> Mapping[str, object]:
        assert isinstance(problem, GemmProblem)
        many, rows = problem.batch > 1, problem.M * (1 if problem.a_broadcast else problem.batch)
        return {
            "a_broadcast": problem.a_broadcast if many else None,
            "b_broadcast": problem.b_broadcast if many else None,
            "residual_broadcast": problem.residual_broadcast if many else None,
            "a_scale": problem.a_scale if rows > 1 else None,
            "b_scale": problem.b_scale if problem.N > 1 else None,
        }

    def followers(
        self, tensors: Tensors, outputs: tuple[Tensor, ...], attributes: Attributes
    ) -> Mapping[tuple[str, int], Number]:
        form = self._form(tensors, attributes)
        # One dimension of scales counts the rows of all matrices that are folded into one.
        folded = "a_scale" in tensors and len(tensors["a_scale"].dims) == 1 and form.batch == 1
        return {("a_scale", 0): form.M} if folded else {}

    def _form(self, tensors: Tensors, attributes: Attributes) -> _Form:
        a, b = tensors["a"], tensors["b"]
        check_rank(a, lambda rank: rank >= 2, "(…, M, K), or (…, K, M) with trans_a=1")
        check_rank(b, lambda rank: rank >= 2, "(…, K, N), or (…, N, K) with trans_b=1")
        turned_a, turned_b = flag(attributes, "trans_a"), flag(attributes, "trans_b")
        m, k = (a.dims[-1], a.dims[-2]) if turned_a else (a.dims[-2], a.dims[-1])
        n = b.dims[-2] if turned_b else b.dims[-1]
        lead_a, lead_b = a.dims[:-2], b.dims[:-2]
        rank = max(len(lead_a), len(lead_b))
        one_a, one_b = all(dim == 1 for dim in lead_a), all(dim == 1 for dim in lead_b)
        if one_b:
            lead = (1,) * (rank - len(lead_a)) + lead_a
            # What every matrix of the result has again, a matrix of all their rows can't have.
            repeated = _per_row(tensors.get("bias")) or _one_matrix(tensors.get("residual"))
            if not turned_a and (one_a or not repeated):
                # One B under many A: their rows follow each other.
                return _Form(lead, m, product(lead_a) * m, n, k, 1, False, False)
            return _Form(lead, m, m, n, k, product(lead_a), False, True)
        if one_a:
            return _Form((1,) * (rank - len(lead_b)) + lead_b, m, m, n, k, product(lead_b), True, False)
        shorter, longer = (lead_a, lead_b) if len(lead_a) < len(lead_b) else (lead_b, lead_a)
        if len(lead_a) != len(lead_b) and all(map(is_static, shorter)):
            raise ProblemError(
                f"a has {len(a.dims)} dimensions and b {len(b.dims)}: as many, or b one matrix, or a one"
            )
        # While TensorRT asks for data types, no dimension is known: of two ranks the shorter's are taken for 1.
        return _Form(longer, m, m, n, k, product(longer), False, False)

    def _gated(self, attributes: Attributes) -> str | None:
        known = {"none": None, **{name: name for name in GATED}}
        return choice(attributes, "gated", known)  # type: ignore[no-any-return]

    def _weights(self, tensors: Tensors, attributes: Attributes) -> str | None:
        packed = choice(attributes, "weights", {"none": None, "int4": "int4"})
        if packed is not None:
            if tensors["b"].dtype not in ("int8", "uint8"):
                raise ProblemError(f"b is {tensors['b'].dtype}: weights='int4' are packed in bytes, INT8 or UINT8")
            return "int4"
        same = tensors["b"].dtype == tensors["a"].dtype
        return None if same else tensors["b"].dtype

    def _fields(self, tensors: Tensors, attributes: Attributes) -> dict[str, object]:
        """The problem's fields that no dimension decides."""
        a_scale, b_scale = tensors.get("a_scale"), tensors.get("b_scale")
        grouped = attributes["group_size"] > 0
        per_tensor = {name: _one(tensor) for name, tensor in tensors.items() if name in ("a_scale", "b_scale")}
        kinds = {name: tensors[name].dtype if name in tensors else None for name in ("bias", "residual")}
        return {
            "dtype": tensors["a"].dtype,
            "b_dtype": self._weights(tensors, attributes),
            "a_layout": "col" if flag(attributes, "trans_a") else "row",
            "b_layout": "col" if flag(attributes, "trans_b") else "row",
            "a_scale": a_scale and ("tensor" if per_tensor["a_scale"] else "row"),
            "b_scale": b_scale and ("group" if grouped else "tensor" if per_tensor["b_scale"] else "column"),
            "group_size": attributes["group_size"],
            "b_scale_dtype": b_scale.dtype if b_scale and grouped else "fp32",
            "b_zero": "b_zero" in tensors,
            "gated": self._gated(attributes),
            "precision": None if attributes["precision"] == "default" else attributes["precision"],
            "out_dtype": None if attributes["out_dtype"] == "default" else attributes["out_dtype"],
            "activation": attributes["activation"],
            "residual_last": flag(attributes, "residual_last"),
            "out_scale": "out_scale" in tensors,
            **kinds,
        }

    def _probe(self, tensors: Tensors, attributes: Attributes) -> GemmProblem:
        """A small problem of the same dtypes and flags: it checks them, and says what the result's dtype is."""
        return GemmProblem(M=16, N=128, K=128, **self._fields(tensors, attributes))  # type: ignore[arg-type]

    def _check_scales(self, tensors: Tensors, attributes: Attributes, sizes: tuple[int, int, int], batch: int) -> None:
        (m, n, k), size = sizes, attributes["group_size"]
        groups = math.ceil(k / size) if size else 1
        a = tensors["a"].shape
        rows = (*a[:-2], a[-1] if flag(attributes, "trans_a") else a[-2])
        for name, shapes in (
            ("a_scale", ((), (1,), rows, *([(m,)] if batch == 1 else []))),
            ("b_scale", ((groups, n),) if size else ((), (1,), (n,))),
            ("b_zero", ((groups, n), *([(n,)] if groups == 1 else []))),
            ("out_scale", ((), (1,))),
        ):
            if name in tensors:
                check_shape(tensors[name], *shapes)
        check_fp32(tensors, "a_scale", "out_scale", *(() if size else ("b_scale",)))
        if "b_zero" in tensors and tensors["b_zero"].dtype != tensors["b"].dtype:
            raise ProblemError(f"b_zero is {tensors['b_zero'].dtype} and must be that of b, {tensors['b'].dtype}")


def _per_row(bias: Tensor | None) -> bool:
    """Whether it is a bias along M."""
    return bias is not None and len(bias.dims) == 2


def _one_matrix(residual: Tensor | None) -> bool:
    """Whether it is a residual for every matrix of the batch."""
    return residual is not None and all(dim == 1 for dim in residual.dims[:-2])


def _one(tensor: Tensor) -> bool:
    """Whether a tensor has one element, whatever the dynamic dimensions are."""
    return all(dim == 1 for dim in tensor.dims)
