"""Problems of the fused GEMM, of every form, and how they are called: shared by its tests."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.kernels.calls import gemm_outs as out_for
from tests.kernels.calls import run_gemm as run
from tests.kernels.conformance import ACTIVATION_NAMES, check
from tilewright.kernels import GemmProblem
from tilewright.kernels.epilogue import FLOATS, QUANTISED
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GROUP_SIZES, SCALE_DTYPES


def conforms(problem, config=None, seed=0):
    """Fails unless the problem's result is the reference's."""
    check(GEMM, problem, lambda arrays, outs: run(problem, arrays, outs["out"], config), out_for(problem), seed=seed)


def one_of(*values):
    """Shorter than the library's name for it."""
    return st.sampled_from(values)


@st.composite
def gemm_problems(draw, size, batches):
    """Any problem there is, of sizes and batches drawn from these."""
    dtype = draw(one_of(*FLOATS, "int8"))
    b_dtype = draw(one_of(None, "int8", "int4")) if dtype in ("fp16", "bf16") else None
    groups = draw(st.integers(0, 4)) if draw(st.booleans()) else 0
    batch = 1 if groups else draw(batches)
    bare = dtype == "int8" and draw(st.booleans())  # sums in int32
    fields = {}
    if not bare:
        out_dtype = draw(one_of(None, *FLOATS, "int8"))
        residual = draw(one_of(None, *FLOATS))
        bias = draw(one_of(None, *FLOATS))
        fields = {
            "a_scale": draw(one_of(None, "tensor", "row")),
            "b_scale": draw(one_of("tensor", "column") if dtype == "int8" else one_of(None, "tensor", "column")),
            "bias": bias,
            "bias_axis": draw(one_of("n", "m")) if bias else "n",
            "residual": residual,
            "residual_broadcast": batch > 1 and residual is not None and draw(st.booleans()),
            "gated": draw(one_of(None, None, "halves", "interleaved")),
            "residual_last": residual is not None and draw(st.booleans()),
            "activation": draw(one_of(*ACTIVATION_NAMES)),
            "alpha": draw(st.booleans()),
            "out_dtype": out_dtype,
            "out_scale": out_dtype == "int8" or (out_dtype in QUANTISED and draw(st.booleans())),
        }
    n = draw(size)
    if fields.get("gated") is not None:
        n += n % 2
    b_broadcast = batch > 1 and draw(st.booleans())
    if b_dtype is not None and (batch == 1 or b_broadcast):
        fields["b_zero"] = draw(st.booleans())
        if draw(st.booleans()):
            fields |= {"b_scale": "group", "group_size": draw(one_of(*GROUP_SIZES))}
            fields["b_scale_dtype"] = draw(one_of(*SCALE_DTYPES))
    return GemmProblem(
        M=draw(size),
        N=n,
        K=draw(size),
        dtype=dtype,
        b_dtype=b_dtype,
        batch=batch,
        groups=groups,
        a_layout=draw(one_of("row", "col")),
        b_layout=draw(one_of("row", "col")),
        a_broadcast=batch > 1 and draw(st.booleans()),
        b_broadcast=b_broadcast,
        precision=draw(one_of("ieee", "tf32")) if dtype == "fp32" else None,
        strided=draw(st.booleans()),
        aligned=draw(st.booleans()),
        end_aligned=draw(st.booleans()),
        **fields,
    )
