"""`attention` on a GPU against float64: head dims, data types, forms, masks, terms, decode, large offsets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.gpu.conforming import conforms, fault, on_host, skip_unless, to_gpu
from tests.kernels.calls import call
from tests.kernels.conformance import pairwise
from tilewright.kernels import AttentionConfig, AttentionProblem, attention
from tilewright.kernels.device import Device
from tilewright.kernels.ops.attention.launch import ATTENTION
from tilewright.kernels.ops.attention.samples import UNREACHED

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dim", [16, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32", "fp8e4m3", "fp8e5m2"])
def test_every_head_dim_of_every_data_type(cupy: Any, board: Device, kind: str, dim: int) -> None:
    if kind.startswith("fp8") and dim < 32:
        pytest.skip("fp8 dots take 32")
    problem = AttentionProblem(1, 4, 100, 129, dim, Hkv=2, dtype=kind, causal=True)
    skip_unless(ATTENTION, problem, board)
    conforms(cupy, ATTENTION, problem, ATTENTION.default(problem, board))


FORMS: dict[str, dict[str, Any]] = {
    "batch": {},
    "kv_lens": {"kv_lens": True},
    "varlen": {"varlen": True},
    "paged": {"kv_lens": True, "page_size": 16},
    "varlen paged": {"varlen": True, "kv_lens": True, "page_size": 16},
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "left": {"causal": True, "window_left": 40},
    "both": {"window_left": 30, "window_right": 7},
}
TERMS: dict[str, dict[str, Any]] = {
    "none": {},
    "softcap": {"softcap": True},
    "bias": {"bias": "fp16", "bias_heads": True},
    "row of bias": {"bias": "fp32", "bias_batch": True, "bias_rows": False},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "all": {"softcap": True, "bias": "bf16", "bias_batch": True, "bias_heads": True, "alibi": True, "sinks": True},
}
AXES = {
    "dtype": ("fp16", "bf16", "fp32", "fp8e4m3"),
    "form": tuple(FORMS),
    "mask": tuple(MASKS),
    "terms": tuple(TERMS),
    "heads": ((4, 4), (8, 2), (6, 1)),
    "Sq": (1, 2, 17, 129),
    "Skv": (16, 48, 272, 1040),
    "dims": ((64, 64), (128, 128), (40, 40), (96, 64)),
    "memory": ("dense", "strided", "unaligned", "strided unaligned"),
    "lse": (False, True),
}


def problem_of(row: dict[str, Any]) -> AttentionProblem:
    heads, kv_heads = row["heads"]
    d, dv = row["dims"]
    terms = dict(TERMS[row["terms"]])
    if "varlen" in row["form"]:
        terms = {name: value for name, value in terms.items() if not name.startswith("bias")}
    return AttentionProblem(
        B=3,
        H=heads,
        Hkv=kv_heads,
        Sq=row["Sq"],
        Skv=row["Skv"] if "paged" in row["form"] else row["Skv"] - 1,  # pages hold a multiple of 16
        D=d,
        Dv=dv,
        dtype=row["dtype"],
        scales=row["dtype"] == "fp8e4m3",
        lse=row["lse"],
        strided="strided" in row["memory"],
        aligned="unaligned" not in row["memory"],
        **FORMS[row["form"]],
        **MASKS[row["mask"]],
        **terms,
    )


PROBLEMS = list(dict.fromkeys(problem_of(row) for row in pairwise(AXES)))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_equals_the_reference(cupy: Any, board: Device, problem: AttentionProblem) -> None:
    skip_unless(ATTENTION, problem, board)
    # IEEE dots are unrolled whole: predicted configurations of theirs take many seconds to compile, and then may spill.
    conforms(cupy, ATTENTION, problem, ATTENTION.default(problem, board) if problem.dtype == "fp32" else None)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("split", [1, 4, 16])
def test_split_keys_give_the_same_bits_every_time(cupy: Any, split: int, pack: bool) -> None:
    problem = AttentionProblem(2, 8, 1, 1025, 64, Hkv=2, lse=True)
    config = AttentionConfig(16, 32, SPLIT_KV=split, PACK=pack)
    conforms(cupy, ATTENTION, problem, config)
    arrays = {name: to_gpu(cupy, array) for name, array in problem.inputs(0).items()}
    results = [on_host(cupy, attention(**arrays, config=config)) for _ in range(20)]
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    "problem",
    [
        AttentionProblem(1, 8, 512, 512, 128, Hkv=2, causal=True, dtype="bf16"),
        AttentionProblem(4, 32, 1, 4096, 128, Hkv=8, kv_lens=True, page_size=16),
        AttentionProblem(2, 16, 197, 197, 64, strided=True),
    ],
    ids=["Llama, prefill", "Llama, decode", "ViT"],
)
def test_layers_of_real_networks(cupy: Any, problem: AttentionProblem) -> None:
    conforms(cupy, ATTENTION, problem)


def test_scale_and_softcap_of_ones_own_against_torch(torch: Any) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 65, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    scores = 0.3 * q.double() @ k.double().transpose(-1, -2)
    capped = 20 * torch.tanh(scores / 20)
    wanted = (torch.softmax(capped, -1) @ v.double()).cpu().numpy()
    found = attention(q, k, v, scale=0.3, softcap=20.0).double().cpu().numpy()
    np.testing.assert_allclose(found, wanted, rtol=4e-3, atol=4e-3)


FAR = 2**31 + 64
"""Elements from one row to the next: the second row begins where 32 bits end."""


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["sequences", "heads", "tokens"])
def test_offsets_beyond_31_bits(cupy: Any, board: Device, axis: int) -> None:
    """Two of them, 4.3 GB apart."""
    if board.memory_gib < 16:
        pytest.skip(f"{board.board} has {board.memory_gib} GiB of memory; this takes 5")
    shape = [1, 1, 1, 64]
    shape[axis] = 2
    problem = AttentionProblem(*shape[:2], shape[2], shape[2], shape[3])
    arrays = problem.inputs(0)
    memory = cupy.empty(FAR + 4 * 64, np.float16)
    far, rows = {}, {}
    for place, name in enumerate(("q", "k", "v", "out")):
        strides = [2 * FAR if position == axis else 128 for position in range(3)]
        far[name] = cupy.ndarray(tuple(shape), np.float16, memory[64 * place :].data, strides=(*strides, 2))
        # By contiguous pieces: CuPy's own kernels are not what is looked at here.
        rows[name] = [memory[start : start + 64] for start in (64 * place, FAR + 64 * place)]
        values = arrays[name].reshape(2, 64) if name in arrays else np.full((2, 64), np.nan, np.float16)
        for row, value in zip(rows[name], values, strict=True):
            row.set(np.ascontiguousarray(value))
    out = attention(far["q"], far["k"], far["v"], out=far["out"])
    assert out is far["out"]
    found = np.stack([on_host(cupy, row) for row in rows["out"]])
    del far, rows, row, out, memory
    cupy.get_default_memory_pool().free_all_blocks()
    assert not fault(ATTENTION, problem, ATTENTION.reference(problem, arrays), {"out": found})


def test_pages_beyond_31_bits(cupy: Any, board: Device) -> None:
    """The last blocks of a cache of 2.15 G elements, 4.3 GB, for keys and the same again for values."""
    if board.memory_gib < 24:
        pytest.skip(f"{board.board} has {board.memory_gib} GiB of memory; this takes 9")
    problem = AttentionProblem(2, 8, 1, 64, 128, page_size=16, kv_lens=True)
    arrays = problem.inputs(0)
    moved = {name: to_gpu(cupy, array) for name, array in arrays.items()}
    own = len(arrays["k"])
    blocks = FAR // (16 * 8 * 128) + 1 + own
    for name in "kv":
        cache = cupy.empty((blocks, 16, 8, 128), np.float16)
        cache[-own:] = moved[name]
        moved[name] = cache
    table = arrays["block_table"]
    moved["block_table"] = to_gpu(cupy, np.where(table == UNREACHED, table, table + (blocks - own)).astype(np.int32))
    found = on_host(cupy, call(problem, moved)["out"])
    moved.clear()
    del cache
    cupy.get_default_memory_pool().free_all_blocks()
    assert not fault(ATTENTION, problem, ATTENTION.reference(problem, arrays), {"out": found})
