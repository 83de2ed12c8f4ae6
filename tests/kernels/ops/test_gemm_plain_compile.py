"""The plain fused GEMM, compiled for GPUs that are not here: instructions, shared memory, spills of its default."""

from __future__ import annotations

import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.kernels import compiling
from tests.kernels.compiling import archs, assert_clean, described
from tests.kernels.conformance import every_value
from tilewright.kernels import GemmConfig, GemmProblem, resolve_device
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.space import SPACE, shared_bytes

ARCHS = (75, 80, 86, 89, 90, 100, 120)
COMMON = (86, pytest.param(90, marks=pytest.mark.smoke))
SQUARE = GemmProblem(4096, 4096, 4096)


def compiled(arch, jobs):
    """What compiling each (problem, configuration or None for the default) for an arch gives."""
    return compiling.compiled(arch, [("gemm", problem, config) for problem, config in jobs])


# Instructions


@pytest.mark.parametrize("arch", archs(*ARCHS, smoke=(86, 90)))
def test_aligned_operands_are_copied_asynchronously_and_multiplied_on_tensor_cores(arch):
    kinds = [] if arch == 75 else ["bf16", *(["fp8e4m3"] if arch >= 89 else [])]
    problems = [
        SQUARE,
        GemmProblem(512, 512, 512, a_layout="col", b_layout="col", residual="fp16"),
        *(replace(SQUARE, dtype=kind, out_dtype=None, b_layout="col") for kind in kinds),
    ]
    tensor = {90: "wgmma", 100: "tcgen05"}.get(arch, "mma.sync")
    skinny = compiled(arch, [(GemmProblem(16, 4096, 4096), None)])
    for reply in compiled(arch, [(problem, None) for problem in problems]) + skinny:
        found = reply["instructions"]
        assert not found["narrow loads"], described(reply)
        if arch == 75:
            assert not any(found[name] for name in ("cp.async", "mma.sync", "wgmma", "tcgen05")), described(reply)
            continue
        # A warp group of wgmma or tcgen05 needs 64 rows.
        expected = "mma.sync" if reply["config"]["BLOCK_M"] < 64 else tensor
        assert found["cp.async"] or found["bulk tensor"], described(reply)
        assert [name for name in ("mma.sync", "wgmma", "tcgen05") if found[name]] == [expected], described(reply)


@pytest.mark.parametrize("arch", COMMON)
def test_any_length_that_is_no_multiple_of_16_elements_leaves_single_loads(arch):
    problems = [
        replace(SQUARE, K=4104),
        replace(SQUARE, N=4104),
        replace(SQUARE, aligned=False),
        replace(SQUARE, strided=True, aligned=False),
    ]
    # Descriptors, Hopper's default, ask for rows of 16 bytes and no more.
    plain = GemmConfig(128, 128, 32, GROUP_M=8, num_warps=8, num_stages=4)
    for reply in compiled(arch, [(problem, plain) for problem in problems]):
        assert reply["instructions"]["narrow loads"], described(reply)
    # The stride is what has to be aligned, and the rows of A are K long whatever M is.
    for reply in compiled(arch, [(replace(SQUARE, K=4104, strided=True), plain), (replace(SQUARE, M=4097), plain)]):
        assert reply["instructions"]["cp.async"], described(reply)


def test_ieee_fp32_runs_on_cuda_cores_and_tf32_on_tensor_cores():
    small = GemmConfig(32, 32, 32, num_stages=2)
    exact = GemmProblem(512, 512, 512, dtype="fp32")
    ieee, tf32 = compiled(86, [(exact, small), (replace(exact, precision="tf32"), small)])
    assert (ieee["instructions"]["mma.sync"], tf32["instructions"]["mma.sync"] > 0) == (0, True)


# Shared memory


def sampled(arch, count, seed):
    """Problems and configurations that fit the arch's reference board, at random."""
    device, draw = resolve_device(f"sm_{arch}"), random.Random(f"{arch} {seed}")
    kinds = [kind for kind in ("fp16", "fp32", "fp8e5m2", "fp8e4m3") if kind != "fp8e4m3" or arch >= 89]
    while count:
        problem = GemmProblem(
            *(draw.choice([33, 512]) for _ in range(3)),
            dtype=draw.choice(kinds if arch > 75 else ["fp16", "fp32"]),
            a_layout=draw.choice(["row", "col"]),
            b_layout=draw.choice(["row", "col"]),
            aligned=draw.random() < 0.8,
        )
        if problem.dtype == "fp32" and arch > 75:
            problem = replace(problem, precision="tf32")
        config = replace(
            draw.choice(
                [GemmConfig(*tile) for tile in itertools.product((16, 32, 64, 128), (16, 32, 64), (16, 32, 64))]
            ),
            num_warps=draw.choice([2, 4, 8]),
            num_stages=draw.choice([1, 2, 3, 4, 5]),
        )
        if GEMM.supported(problem, device) is None and SPACE.fits(problem, config, device) is None:
            count -= 1
            yield problem, config


def estimates_hold(arch, count, seed):
    device = resolve_device(f"sm_{arch}")
    exact = 0
    for reply in compiled(arch, sampled(arch, count, seed)):
        assert "error" not in reply, (described(reply), reply.get("error"))
        estimate = shared_bytes(GemmProblem.parse(reply["problem"]), GemmConfig.from_dict(reply["config"]), device)
        assert estimate <= reply["resources"]["shared_bytes"], described(reply)
        assert estimate == reply["estimate"]
        exact += estimate == reply["resources"]["shared_bytes"]
    return exact / count


@pytest.mark.parametrize("arch", [pytest.param(86, marks=pytest.mark.slow), 90])
def test_estimated_shared_memory_is_never_over_the_real(arch):
    # Nor is it a poor one: most of the time it is the real figure.
    assert estimates_hold(arch, 8, seed=0) > 0.5


def test_8_bit_operands_that_wgmma_can_not_read_along_k_are_not_copied_ahead():
    config = GemmConfig(128, 64, 64, num_stages=3)
    layouts = list(itertools.product(("row", "col"), repeat=2))
    problems = [replace(SQUARE, dtype="fp8e4m3", out_dtype=None, a_layout=a, b_layout=b) for a, b in layouts]
    a_tile, b_tile = 128 * 64, 64 * 64
    for (a, b), reply in zip(layouts, compiled(90, [(problem, config) for problem in problems]), strict=True):
        copies = (3 if a == "row" else 1), (3 if b == "col" else 1)
        assert reply["resources"]["shared_bytes"] == copies[0] * a_tile + copies[1] * b_tile, described(reply)
        assert reply["estimate"] == reply["resources"]["shared_bytes"], described(reply)


def test_columns_loaded_one_element_at_a_time_may_lie_in_tensor_memory():
    problem = replace(SQUARE, M=33, dtype="fp8e5m2", out_dtype=None, a_layout="col", b_layout="col")
    (reply,) = compiled(100, [(problem, GemmConfig(128, 64, 64, num_stages=2))])
    assert reply["estimate"] == 2 * 64 * 64, described(reply)
    assert reply["estimate"] <= reply["resources"]["shared_bytes"], described(reply)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("arch", ARCHS)
def test_estimated_shared_memory_is_never_over_the_real_in_a_larger_sample(arch, seed):
    estimates_hold(arch, 50, seed)


# The default configuration

SHAPES = {
    "one row": {"M": 1, "N": 4096, "K": 4096},
    "few rows, K ragged": {"M": 16, "N": 4096, "K": 4112},
    "few rows, unaligned": {"M": 17, "N": 4097, "K": 4097},
    "few columns": {"M": 4096, "N": 16, "K": 4096},
    "few columns, unaligned": {"M": 4097, "N": 31, "K": 1001},
    "middle": {"M": 256, "N": 768, "K": 768},
    "middle, ragged": {"M": 200, "N": 304, "K": 528},
    "middle, unaligned": {"M": 201, "N": 303, "K": 527},
    "large": {"M": 4096, "N": 4096, "K": 4096},
    "large, ragged": {"M": 4096, "N": 4112, "K": 4112},
    "large, unaligned": {"M": 4097, "N": 4097, "K": 4097},
    "strided batch": {"M": 2048, "N": 4096, "K": 4096, "batch": 3, "strided": True},
    "strided, unaligned": {"M": 2048, "N": 4096, "K": 4096, "strided": True, "aligned": False},
    "small strided batch, unaligned": {"M": 5, "N": 400, "K": 400, "batch": 2, "strided": True, "aligned": False},
}
KINDS = (("fp16", None), ("bf16", None), ("fp32", "ieee"), ("fp32", "tf32"), ("fp8e4m3", None), ("fp8e5m2", None))
EPILOGUES = ({}, {"bias": "fp32", "residual": "fp16", "activation": "gelu_erf", "alpha": True})
MATRIX = {
    "shape": tuple(SHAPES),
    "kind": KINDS,
    "a_layout": ("row", "col"),
    "b_layout": ("row", "col"),
    "epilogue": EPILOGUES,
}


def supported(arch, rows):
    """The problems of rows of MATRIX that an arch has, each machine code once."""
    device, seen = resolve_device(f"sm_{arch}"), set()
    for row in rows:
        kind, precision = row["kind"]
        layouts = {name: row[name] for name in ("a_layout", "b_layout")}
        problem = GemmProblem(**SHAPES[row["shape"]], dtype=kind, precision=precision, **layouts, **row["epilogue"])
        if GEMM.supported(problem, device) is None:
            code = GEMM.launches(problem, GEMM.default(problem, device))[0].specialization
            if code not in seen:
                seen.add(code)
                yield problem


@pytest.mark.parametrize("arch", archs(86, 90, smoke=(86,)))
def test_the_default_compiles_without_spills(arch):
    # Every shape, dtype, layout and epilogue occurs; all of their combinations are a slow test.
    problems = supported(arch, every_value(MATRIX, seed=arch))
    assert_clean(compiled(arch, [(problem, None) for problem in problems]))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_default_compiles_without_spills_whatever_the_problem(arch):
    rows = [dict(zip(MATRIX, values, strict=True)) for values in itertools.product(*MATRIX.values())]
    problems = list(supported(arch, rows))
    parts = [[(problem, None) for problem in problems[start::4]] for start in range(4)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for replies in threads.map(lambda part: compiled(arch, part), parts):
            assert_clean(replies)
