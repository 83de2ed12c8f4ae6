"""The forms of the fused GEMM, compiled for GPUs that are not here: instructions, scratch, spills, shared memory."""

from __future__ import annotations

import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.kernels.compiling import archs, assert_clean, assert_specialised, compiled, described
from tests.kernels.conformance import every_value, pairwise
from tilewright.kernels import GemmConfig, GemmProblem, resolve_device
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.space import FLAT, fits

ARCHS = (80, 86, 89, 90, 100, 120)
OF_TENSOR_CORES = ("mma.sync", "wgmma", "tcgen05")
SQUARE = GemmProblem(4096, 4096, 4096)


def replies(arch, jobs):
    """What compiling each (problem, configuration or None for the default) for an arch gives."""
    return compiled(arch, [("gemm", problem, config) for problem, config in jobs])


def unit_of(arch, rows=128):
    """The instruction that multiplies tiles of so many rows."""
    return {90: "wgmma", 100: "tcgen05"}.get(arch, "mma.sync") if rows >= 64 else "mma.sync"


SMOKE = archs(*ARCHS, smoke=(86, 90))


# Instructions


@pytest.mark.parametrize("arch", SMOKE)
def test_int8_is_multiplied_as_int8(arch):
    problems = [
        replace(SQUARE, dtype="int8", out_dtype=None, b_layout="col"),
        GemmProblem(4096, 4096, 4096, dtype="int8", a_scale="row", b_scale="column", bias="fp32", activation="silu"),
    ]
    for reply in replies(arch, [(problem, None) for problem in problems]):
        found = reply["instructions"]
        assert found["int8 mma"], described(reply)
        assert found["cp.async"] or found["bulk tensor"], described(reply)
        # Triton 3.6 has no tcgen05 of int8.
        expected = (("tcgen05",), ("mma.sync",)) if arch == 100 else ((unit_of(arch),),)
        assert tuple(name for name in OF_TENSOR_CORES if found[name]) in expected, described(reply)


@pytest.mark.parametrize("arch", [89, *archs(90, 120, smoke=(90,))])
def test_scaled_fp8_is_multiplied_as_fp8(arch):
    problem = GemmProblem(
        4096,
        4096,
        4096,
        dtype="fp8e4m3",
        b_layout="col",
        a_scale="row",
        b_scale="column",
        out_dtype="fp8e4m3",
        out_scale=True,
    )
    (reply,) = replies(arch, [(problem, None)])
    assert reply["instructions"]["fp8 mma"], described(reply)
    assert reply["over"] is None


WEIGHTS = (
    {"b_dtype": "int4", "b_scale": "group", "group_size": 128, "b_scale_dtype": "fp16"},
    {"b_dtype": "int4", "b_scale": "group", "group_size": 32, "b_zero": True},
    {"b_dtype": "int8", "b_scale": "column"},
    {"dtype": "bf16", "b_dtype": "int4", "b_scale": "column", "b_zero": True},
)


@pytest.mark.parametrize("arch", SMOKE)
def test_weights_are_copied_as_they_are_and_become_operands_in_registers(arch):
    problems = [GemmProblem(m, 4096, 4096, b_layout="col", **fields) for m in (16, 512) for fields in WEIGHTS]
    for reply in replies(arch, [(problem, None) for problem in problems]):
        found = reply["instructions"]
        assert found["cp.async"], described(reply)
        rows = reply["config"]["BLOCK_M"]
        assert [name for name in OF_TENSOR_CORES if found[name]] == [unit_of(arch, rows)], described(reply)
        assert found["shuffles"] <= (unit_of(arch, rows) != "mma.sync"), described(
            reply
        )  # which warp of its group it is
        assert reply["over"] is None, described(reply)


@pytest.mark.parametrize("arch", SMOKE)
def test_eight_rows_take_half_the_products_of_sixteen(arch):
    problems = [
        *(GemmProblem(8, 4096, 4096, b_layout="col", **fields) for fields in WEIGHTS[arch == 86 :: 2]),
        GemmProblem(8, 4096, 4096, dtype="bf16", b_layout="col"),
        GemmProblem(8, 4096, 4096, dtype="int8", b_layout="col"),
    ]
    jobs = [
        (problem, GemmConfig(rows, 64, problem.group_size or 128, num_warps=2, PAIRS=problem.b_dtype is not None))
        for problem in problems
        for rows in (16, 8)
    ]
    found = replies(arch, jobs)
    assert_clean(found)
    for sixteen, eight in zip(found[::2], found[1::2], strict=True):
        assert [name for name in OF_TENSOR_CORES if eight["instructions"][name]] == ["mma.sync"], described(eight)
        assert 2 * eight["instructions"]["mma.sync"] == sixteen["instructions"]["mma.sync"], described(eight)
        assert eight["instructions"]["cp.async"], described(eight)


@pytest.mark.parametrize("gated", ["halves", "interleaved"])
@pytest.mark.parametrize("arch", [86, 90])
def test_gated_pairs_cost_no_exchange_between_threads(arch, gated):
    problem = replace(SQUARE, gated=gated, activation="silu")
    (reply,) = replies(arch, [(problem, None)])
    assert reply["instructions"]["shuffles"] <= (arch == 90), described(reply)  # which warp of its group it is
    assert reply["instructions"]["cp.async"] or reply["instructions"]["bulk tensor"], described(reply)
    assert reply["over"] is None, described(reply)


@pytest.mark.parametrize("arch", archs(*ARCHS))
def test_descriptors_are_the_tensor_memory_accelerator_from_sm_90_on(arch):
    tile = GemmConfig(128, 128, 64, num_warps=8, num_stages=3, TMA=True)
    problems = [
        SQUARE,
        replace(SQUARE, a_layout="col", b_layout="col"),
        replace(SQUARE, K=4104, strided=True),
        replace(SQUARE, gated="halves", batch=2),
        replace(SQUARE, groups=8),
        GemmProblem(4096, 4096, 4096, dtype="int8", b_layout="col", b_scale="column"),
    ]
    jobs = [(problem, tile) for problem in problems]
    jobs += [
        (SQUARE, replace(tile, PERSISTENT=True)),
        (SQUARE, replace(tile, num_warps=4, BLOCK_N=64, PERSISTENT=True)),
    ]
    if arch < 90:
        jobs = jobs[::3]  # where there is none, they are loads like others
    for reply in replies(arch, jobs):
        found = reply["instructions"]
        assert "error" not in reply, (described(reply), reply["error"])
        assert bool(found["bulk tensor"]) == (arch >= 90), described(reply)
        assert bool(reply["scratch"]) == (arch >= 90), described(reply)
        if arch >= 90:
            assert not found["cp.async"], described(reply)
            assert reply["over"] is None, described(reply)


@pytest.mark.parametrize("arch", [86, 90])
def test_persistent_blocks_copy_and_multiply_as_others_do(arch):
    tile = GemmConfig(128, 128, 32, num_warps=8, num_stages=3, PERSISTENT=True)
    for reply in replies(arch, [(SQUARE, tile), (replace(SQUARE, batch=3), tile), (replace(SQUARE, groups=3), tile)]):
        found = reply["instructions"]
        assert found["cp.async"], described(reply)
        assert [name for name in OF_TENSOR_CORES if found[name]] == [unit_of(arch)], described(reply)
        assert reply["over"] is None, described(reply)


def test_a_specialised_loop_is_three_groups_of_warps():
    tile = GemmConfig(128, 128, 64, num_warps=4, num_stages=4, PERSISTENT=True, TMA=True, WARP_SPECIALIZE=True)
    scales = {"a_scale": "tensor", "b_scale": "column"}
    for reply in replies(
        90,
        [
            (SQUARE, replace(tile, BLOCK_N=256)),
            (replace(SQUARE, bias="fp16", activation="relu"), replace(tile, BLOCK_M=256)),
            (replace(SQUARE, bias="fp16", residual="fp16", strided=True), tile),
            (replace(SQUARE, gated="halves", activation="silu"), tile),
            (replace(SQUARE, M=4000, N=4072, a_layout="col", b_layout="col"), tile),
            (replace(SQUARE, dtype="fp8e4m3", b_layout="col", **scales), replace(tile, BLOCK_K=128)),
            (replace(SQUARE, dtype="int8", b_layout="col", bias="fp32", out_dtype="bf16", **scales), tile),
        ],
    ):
        assert_specialised(reply)
        assert reply["instructions"]["wgmma"], described(reply)
        assert reply["over"] is None, (described(reply), reply["over"])
    (reply,) = replies(100, [(SQUARE, replace(tile, num_stages=3))])
    assert_specialised(reply)


# Defaults

OPERANDS = (
    {"dtype": "fp16"},
    {"dtype": "fp8e5m2", "a_scale": "row", "b_scale": "column"},
    {"dtype": "int8", "a_scale": "row", "b_scale": "column"},
    {"dtype": "int8", "a_scale": "tensor"},
    *WEIGHTS,
    {"dtype": "bf16", "b_dtype": "int8", "b_scale": "group", "group_size": 64, "b_zero": True},
)
MATRIX = {
    "operands": OPERANDS,
    "shape": (
        (1, 4096, 4096),
        (17, 4096, 4112),
        (64, 4096, 4096),
        (200, 304, 528),
        (201, 606, 527),
        (4096, 4096, 4096),
        (4096, 4112, 4112),
        (4096, 4104, 4096),
    ),
    "layouts": tuple(itertools.product(("row", "col"), repeat=2)),
    "form": (
        {},
        {"groups": 8},
        {"batch": 3, "b_broadcast": True, "strided": True},
        {"aligned": False},
        {"end_aligned": False},
    ),
    "gated": (None, "halves", "interleaved"),
    "epilogue": (
        {},
        {"bias": "fp32", "residual": "fp16", "activation": "gelu_erf", "alpha": True},
        {"bias": "fp16", "bias_axis": "m", "activation": "softplus", "out_dtype": "int8", "out_scale": True},
        {"residual": "bf16", "activation": "softplus"},
    ),
}


def problem_of(row):
    m, n, k = row["shape"]
    layouts = dict(zip(("a_layout", "b_layout"), row["layouts"], strict=True))
    fields = row["operands"] | layouts | row["form"] | row["epilogue"]
    return GemmProblem(m, n, k, gated=row["gated"], **fields)


def distinct(arch, rows):
    """The problems of rows of MATRIX, each machine code once."""
    device, seen = resolve_device(f"sm_{arch}"), set()
    for row in rows:
        problem = problem_of(row)
        code = GEMM.launches(problem, GEMM.default(problem, device))[0].specialization
        if GEMM.supported(problem, device) is None and code not in seen:
            seen.add(code)
            yield problem, None


@pytest.mark.parametrize("kind", ["bf16", "fp8e4m3", pytest.param("fp8e5m2", marks=pytest.mark.slow), "int8"])
def test_large_defaults_of_hopper_do_not_spill(kind):
    square = GemmProblem(4096, 4096, 4096, dtype=kind, b_layout="col")
    scaled = replace(square, a_scale="tensor", b_scale="column", out_dtype="bf16")
    problems = [square, scaled, replace(scaled, bias="fp32"), replace(scaled, bias="fp32", activation="gelu_tanh")]
    problems += [replace(square, a_scale="tensor", b_scale="tensor", out_dtype="bf16", bias="fp16")]
    problems += [replace(scaled, a_scale="row", bias="fp32", gated="halves", activation="silu")]
    # Of little depth another default, of which bf16's stands for all.
    problems += [replace(each, K=1024) for each in problems[: 3 if kind == "bf16" else 1]]
    assert_clean(replies(90, [(problem, None) for problem in problems]))


@pytest.mark.parametrize("arch", [86, 90, 100, 120])
def test_large_defaults_of_crowded_ends_do_not_spill(arch):
    """Residuals that are read element by element take an address for each."""
    square = GemmProblem(4096, 4096, 4096, b_layout="col", residual="fp16")
    problems = [
        replace(square, N=4104, activation="relu"),
        replace(square, a_scale="row", activation="tanh", end_aligned=False),
        replace(square, dtype="bf16", residual="bf16", b_scale="column", N=4100, out_dtype="int8", out_scale=True),
    ]
    if arch == 90:
        problems += [replace(square, residual=None, activation="softplus")]
        problems += [replace(square, residual=None, gated="halves", activation=name) for name in ("silu", "softplus")]
        problems += [replace(problems[-2], end_aligned=False)]
        scaled = {"N": 8184, "a_scale": "row", "residual": None, "activation": "hardswish"}
        problems += [replace(square, b_scale="column", out_dtype="fp8e4m3", out_scale=True, **scaled)]
        problems += [replace(square, N=4104, residual=None), GemmProblem(4096, 4104, 4096, "int8", b_layout="col")]
        problems += [replace(problems[-1], a_scale="row", b_scale="column", out_dtype="bf16")]
        halves = {"dtype": "bf16", "gated": "halves", "bias": "fp32", "activation": "silu"}
        problems += [replace(square, **{**scaled, **halves, "residual": "fp16"})]
    if arch == 100:
        scaled = {"dtype": "int8", "a_scale": "row", "b_scale": "column", "residual": None}
        problems += [replace(square, activation="softplus", **scaled)]
        problems += [replace(square, activation="gelu_erf", bias="fp32", alpha=True, end_aligned=False, **scaled)]
    if arch == 86:
        weights = {"b_dtype": "int8", "b_scale": "group", "group_size": 32, "b_zero": True}
        problems += [replace(square, residual=None, gated="halves", **weights)]
    assert_clean(replies(arch, [(problem, None) for problem in problems]))


@pytest.mark.parametrize("arch", archs(86, 90, smoke=(86,)))
def test_defaults_of_forms_compile_without_spills(arch):
    assert_clean(replies(arch, list(distinct(arch, every_value(MATRIX, seed=arch)))))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", ARCHS)
def test_defaults_of_forms_compile_without_spills_whatever_the_pair(arch):
    jobs = list(distinct(arch, pairwise(MATRIX, seed=arch + 1, tries=1)))
    parts = [jobs[start::4] for start in range(4)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for answers in threads.map(lambda part: replies(arch, part), parts):
            assert_clean(answers)


# Shared memory


def sampled(arch, count, seed, rows=(16, 32, 64, 128)):
    """Problems of any form with configurations that fit the arch's reference board, at random, in tiles of so many
    rows."""
    device, draw = resolve_device(f"sm_{arch}"), random.Random(f"{arch} {seed}")
    while count:
        row = {name: draw.choice(values) for name, values in MATRIX.items()}
        config = GemmConfig(
            draw.choice(rows),
            *(draw.choice([16, 32, 64, 128]) for _ in range(2)),
            num_warps=draw.choice([2, 4, 8]),
            num_stages=draw.choice([1, 2, 3, 4]),
            SPLIT_K=draw.choice([1, 1, 4]),
            PERSISTENT=draw.random() < 0.2,
            TMA=draw.random() < 0.3,
        )
        problem = problem_of(row)
        accumulators = config.BLOCK_M * config.BLOCK_N / (32 * config.num_warps)
        if accumulators <= 128 and GEMM.supported(problem, device) is None and fits(problem, config, device) is None:
            count -= 1
            yield problem, config


def estimates_hold(arch, count, seed, **of):
    for reply in replies(arch, list(sampled(arch, count, seed, **of))):
        assert "error" not in reply, (described(reply), reply.get("error"))
        assert reply["estimate"] <= reply["resources"]["shared_bytes"], described(reply)
        # Nor is it far below, where operands are copied ahead.
        if reply["config"]["BLOCK_M"] == FLAT and reply["config"]["num_stages"] > 1:
            assert reply["estimate"] >= reply["resources"]["shared_bytes"] / 4, described(reply)


@pytest.mark.parametrize("arch", [pytest.param(86, marks=pytest.mark.slow), 90])
def test_estimated_shared_memory_is_never_over_the_real(arch):
    estimates_hold(arch, 4, seed=0)
    estimates_hold(arch, 3, seed=0, rows=(FLAT,))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 3))
@pytest.mark.parametrize("arch", ARCHS)
def test_estimated_shared_memory_is_never_over_the_real_in_a_larger_sample(arch, seed):
    estimates_hold(arch, 50, seed)
    estimates_hold(arch, 40, seed, rows=(FLAT,))
