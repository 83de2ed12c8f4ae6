"""Compiled convolutions for GPUs that are not here: instructions, registers, spills, parameters."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tests.kernels.compiling import archs, assert_clean, compiled, described
from tests.kernels.conformance import covering, every_value
from tilewright.kernels import resolve_device
from tilewright.kernels.compile import HIDDEN_POINTERS
from tilewright.kernels.lookup import predicted_best
from tilewright.kernels.ops.conv2d.launch import CONV2D
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.conv2d.space import SPACE, Conv2dConfig

ARCHS = (80, 86, 89, 90, 100, 120)
PADDED: dict[str, Any] = {"pad_top": 1, "pad_left": 1, "pad_bottom": 1, "pad_right": 1}
TAPS = Conv2dProblem(N=32, H=56, W=56, C=64, K=64, R=3, S=3, **PADDED)
INT8 = replace(TAPS, dtype="int8", out_dtype="int8", x_scale=True, w_scale="channel", out_scale=True)
WIDE = Conv2dConfig(128, 64, 32)
TENSOR = {90: "wgmma", 100: "tcgen05"}


# Instructions


@pytest.mark.parametrize("arch", archs(*ARCHS, smoke=(86,)))
def test_channels_in_nhwc_are_copied_asynchronously_and_multiplied_on_tensor_cores(arch: int) -> None:
    forty = replace(TAPS, C=40)  # 80 bytes a pixel, which is 16 five times
    problems = [(TAPS, WIDE), (replace(TAPS, N=1, bias="fp32", residual="fp16"), None), (forty, None), (INT8, WIDE)]
    if arch >= 89:
        problems.append((replace(TAPS, dtype="fp8e4m3", out_dtype=None), WIDE))
    for reply in compiled(arch, [("conv2d", problem, config) for problem, config in problems]):
        found = reply["instructions"]
        assert found["cp.async"], described(reply)
        assert not found["narrow loads"] or "residual" in reply["problem"], described(reply)
        assert reply["over"] is None, described(reply)
        used = [name for name in ("mma.sync", "wgmma", "tcgen05") if found[name]]
        assert len(used) == 1, described(reply)
        if "int8" not in reply["problem"]:
            assert used == [TENSOR.get(arch, "mma.sync")], described(reply)
        else:
            assert found["int8 mma"], described(reply)


@pytest.mark.parametrize("arch", [86, 90])
def test_what_can_not_be_copied_asynchronously_still_goes_to_tensor_cores(arch: int) -> None:
    stem = Conv2dProblem(N=32, H=224, W=224, C=3, K=64, R=7, S=7, stride_h=2, stride_w=2, **PADDED)
    nchw = replace(TAPS, layout="nchw", w_layout=None)
    problems = (nchw, stem, replace(TAPS, C=33), replace(TAPS, aligned=False))
    for reply in compiled(arch, [("conv2d", problem, None) for problem in problems]):
        assert reply["instructions"]["narrow loads"], described(reply)
        assert reply["instructions"][TENSOR.get(arch, "mma.sync")], described(reply)


def test_depthwise_has_no_dot_and_reads_channels_in_nhwc_widely() -> None:
    layouts = ("nhwc", "nchw")
    problems = [replace(TAPS, groups=64, layout=layout, w_layout=None) for layout in layouts]
    for layout, reply in zip(layouts, compiled(86, [("conv2d", each, None) for each in problems]), strict=True):
        assert not any(reply["instructions"][name] for name in ("mma.sync", "cp.async"))
        assert bool(reply["instructions"]["wide loads"]) == (layout == "nhwc"), described(reply)
        assert reply["resources"]["shared_bytes"] == 0
        assert reply["name"] == "depthwise_kernel"


@pytest.mark.smoke
def test_depthwise_compiles_where_tiles_need_no_mask() -> None:
    plain = Conv2dProblem(N=8, H=34, W=34, C=64, K=64, R=3, S=3, groups=64)
    problems = (plain, replace(plain, layout="nchw", w_layout=None), replace(plain, H=33), replace(plain, W=33))
    tile = Conv2dConfig(32, 32, 16, num_stages=1)
    odd = replace(plain, C=33, K=33, groups=33)
    jobs = [("conv2d", each, config) for each in (*problems, odd) for config in (tile, replace(tile, ROWS=2))]
    assert_clean(compiled(86, jobs))


def test_ieee_fp32_runs_on_cuda_cores_and_tf32_on_tensor_cores() -> None:
    exact = replace(TAPS, dtype="fp32", out_dtype=None)
    small = Conv2dConfig(32, 32, 32, num_stages=2)
    problems = (exact, replace(exact, precision="tf32"))
    ieee, tf32 = compiled(86, [("conv2d", problem, small) for problem in problems])
    assert (ieee["instructions"]["mma.sync"], tf32["instructions"]["mma.sync"] > 0) == (0, True)
    assert ieee["instructions"]["cp.async"]
    assert tf32["instructions"]["cp.async"]


# Parameters


@pytest.mark.smoke
def test_the_entry_has_the_present_arguments_and_two_hidden_pointers() -> None:
    fused = replace(INT8, bias="fp32", residual="fp16", alpha=True, activation="silu")
    split = Conv2dConfig(64, 64, 32, SPLIT_K=2)
    jobs = [(TAPS, None), (fused, None), (TAPS, split), (replace(TAPS, groups=64), None)]
    replies = compiled(86, [("conv2d", problem, config) for problem, config in jobs])
    for reply in replies:
        expected = [".u32" if kind == "i32" else ".u64" for kind in reply["arguments"]] + [".u64"] * HIDDEN_POINTERS
        assert [kind.replace(".b", ".u") for kind in reply["parameters"]] == expected, described(reply)
        assert reply["scratch"] == 0
    # x, w and out, nine sizes, two hidden; six more of the epilogue; workspace and counters.
    assert [len(reply["parameters"]) for reply in replies] == [14, 20, 16, 14]


def test_layers_of_other_sizes_share_one_kernel() -> None:
    def code(**change: int) -> Any:
        (launch,) = CONV2D.launches(replace(TAPS, **change), WIDE)
        return launch.specialization

    assert code() == code(N=64, C=256, K=128) == code(H=112, W=112)
    for other in ({"R": 1}, {"stride_h": 2}, {"C": 40}, {"groups": 2}, {"pad_top": 0, "pad_left": 0, "H": 58, "W": 58}):
        assert code() != code(**other), other
    # How far the padding reaches is an argument.
    assert code() == code(pad_top=2)


# Spills

SHAPES: dict[str, dict[str, Any]] = {
    "3x3": {"N": 32, "H": 56, "W": 56, "C": 64, "K": 64, "R": 3, "S": 3, **PADDED},
    "3x3/2": {"N": 32, "H": 56, "W": 56, "C": 128, "K": 128, "R": 3, "S": 3, "stride_h": 2, "stride_w": 2, **PADDED},
    "late": {"N": 1, "H": 7, "W": 7, "C": 512, "K": 512, "R": 3, "S": 3, **PADDED},
    "stem": {"N": 32, "H": 224, "W": 224, "C": 3, "K": 64, "R": 7, "S": 7, "stride_h": 2, "stride_w": 2, **PADDED},
    "patches": {"N": 8, "H": 224, "W": 224, "C": 3, "K": 768, "R": 16, "S": 16, "stride_h": 16, "stride_w": 16},
    "1x1/2": {"N": 32, "H": 56, "W": 56, "C": 256, "K": 512, "R": 1, "S": 1, "stride_h": 2, "stride_w": 2},
    "1x1": {"N": 2, "H": 14, "W": 14, "C": 256, "K": 512, "R": 1, "S": 1},
    "SDXL": {"N": 2, "H": 128, "W": 128, "C": 320, "K": 320, "R": 3, "S": 3, **PADDED},
    "odd": {"N": 3, "H": 13, "W": 17, "C": 33, "K": 35, "R": 3, "S": 2, "pad_top": 1, "dilation_h": 2},
    "odd, many channels": {"N": 3, "H": 13, "W": 17, "C": 133, "K": 135, "R": 5, "S": 5, "pad_top": 2},
    "eights": {"N": 3, "H": 28, "W": 28, "C": 40, "K": 72, "R": 3, "S": 3, **PADDED},
    "one channel": {"N": 2, "H": 28, "W": 28, "C": 1, "K": 32, "R": 5, "S": 5, **PADDED},
    "32 groups": {"N": 8, "H": 28, "W": 28, "C": 256, "K": 256, "R": 3, "S": 3, "groups": 32, **PADDED},
    "4 groups": {"N": 8, "H": 28, "W": 28, "C": 256, "K": 256, "R": 3, "S": 3, "groups": 4, **PADDED},
    "1-D": {"N": 2, "H": 1, "W": 3000, "C": 80, "K": 384, "R": 1, "S": 3, "pad_left": 1, "pad_right": 1},
    "depthwise 3x3": {"N": 1, "H": 56, "W": 56, "C": 144, "K": 144, "groups": 144, "R": 3, "S": 3, **PADDED},
    "depthwise 3x3/2": {
        "N": 1, "H": 57, "W": 57, "C": 144, "K": 144, "groups": 144, "R": 3, "S": 3, "stride_h": 2, "stride_w": 2,
        **PADDED,
    },
    "depthwise 7x7": {"N": 32, "H": 56, "W": 56, "C": 96, "K": 96, "groups": 96, "R": 7, "S": 7, **PADDED},
    "depthwise 5x5, small": {"N": 1, "H": 7, "W": 7, "C": 576, "K": 576, "groups": 576, "R": 5, "S": 5, **PADDED},
    "depthwise 9x9": {
        "N": 8, "H": 28, "W": 28, "C": 100, "K": 100, "groups": 100, "R": 9, "S": 9, "pad_top": 4, "pad_left": 4,
        "pad_bottom": 4, "pad_right": 4,
    },
    "two filters a channel": {"N": 1, "H": 15, "W": 15, "C": 33, "K": 66, "groups": 33, "R": 3, "S": 3, **PADDED},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "fp16": {},
    "bf16": {"dtype": "bf16"},
    "fp32": {"dtype": "fp32"},
    "tf32": {"dtype": "fp32", "precision": "tf32"},
    "int8": {"dtype": "int8", "x_scale": True},
    "int8 to int8": {"dtype": "int8", "w_scale": "channel", "out_dtype": "int8", "out_scale": True},
    "fp8e5m2": {"dtype": "fp8e5m2"},
    "fp8e4m3": {"dtype": "fp8e4m3"},
}
EPILOGUES: tuple[dict[str, Any], ...] = (
    {},
    {"bias": "fp32", "residual": "fp16", "activation": "gelu_erf", "alpha": True},
    {"bias": "fp16", "activation": "hardswish", "w_scale": "channel"},
)
MATRIX = {
    "shape": tuple(SHAPES),
    "kind": tuple(KINDS),
    "layout": ("nhwc", "nchw"),
    "w_layout": ("krsc", "kcrs"),
    "epilogue": EPILOGUES,
    "aligned": (True, False),
}


def problem_of(row: dict[str, Any]) -> Conv2dProblem:
    """The problem that a row of MATRIX describes."""
    named = {name: row[name] for name in ("layout", "w_layout", "aligned")}
    return Conv2dProblem(**{**SHAPES[row["shape"]], **named, **row["epilogue"], **KINDS[row["kind"]]})


def matrix_of(arch: int) -> dict[str, Any]:
    """MATRIX with the kinds that dots of an arch have: rows of others would take their combinations with them."""
    device = resolve_device(f"sm_{arch}")
    kinds = [kind for kind, fields in KINDS.items() if CONV2D.supported(replace(TAPS, **fields), device) is None]
    return MATRIX | {"kind": tuple(kinds)}


def supported(arch: int, rows: Iterable[dict[str, Any]]) -> Iterator[Conv2dProblem]:
    """The problems of rows of MATRIX that an arch has, each machine code once."""
    device, seen = resolve_device(f"sm_{arch}"), set()
    for problem in map(problem_of, rows):
        if CONV2D.supported(problem, device) is None:
            code = CONV2D.launches(problem, CONV2D.default(problem, device))[0].specialization
            if code not in seen:
                seen.add(code)
                yield problem


@pytest.mark.parametrize("arch", archs(86, 90, smoke=(86,)))
def test_the_default_compiles_without_spills(arch: int) -> None:
    # Every shape, dtype, layout and epilogue occurs; more of their combinations are a slow test.
    problems = supported(arch, every_value(matrix_of(arch), seed=arch))
    assert_clean(compiled(arch, [("conv2d", problem, None) for problem in problems]))


BY_ONES = {"N": 8, "C": 100, "K": 100, "groups": 100}  # channels that are loaded one by one


@pytest.mark.parametrize("arch", [86, 90])
def test_depthwise_of_many_taps_compiles_without_spills(arch: int) -> None:
    square = Conv2dProblem(**BY_ONES, H=56, W=56, R=9, S=9, pad_top=4, pad_left=4, pad_bottom=4, pad_right=4)
    long = Conv2dProblem(**BY_ONES, H=1, W=4096, R=1, S=257, pad_left=256)
    assert_clean(compiled(arch, [("conv2d", problem, None) for problem in (square, long)]))


def test_what_is_predicted_of_single_channels_does_not_spill() -> None:
    device = resolve_device("sm_90")
    strided = Conv2dProblem(**BY_ONES, H=112, W=112, R=3, S=3, stride_h=2, stride_w=2, **PADDED)
    jobs = [("conv2d", strided, config) for _, config in predicted_best(CONV2D, strided, device, 2, apart=True)]
    assert_clean(compiled(90, jobs))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", [75, *ARCHS])
def test_the_default_compiles_without_spills_whatever_the_three(arch: int) -> None:
    # Every shape in every dtype with every epilogue, and any other three: an eighth of the product, which takes hours.
    problems = list(supported(arch, covering(matrix_of(arch), 3, seed=arch, tries=4)))
    parts = [[("conv2d", problem, None) for problem in problems[start::4]] for start in range(4)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for replies in threads.map(lambda part: compiled(arch, part), parts):
            assert_clean(replies)


# Shared memory


def sampled(arch: int, count: int, seed: int, most: int) -> Iterator[tuple[str, Conv2dProblem, Conv2dConfig]]:
    """Problems and configurations that fit the arch's reference board, at random, of at most so many sums a warp."""
    device, draw = resolve_device(f"sm_{arch}"), random.Random(f"{arch} {seed}")
    while count:
        problem = problem_of({name: draw.choice(values) for name, values in MATRIX.items()})
        config = Conv2dConfig(**{name: draw.choice(values) for name, values in SPACE.axes.items()})
        tile = config.BLOCK_M * config.BLOCK_N
        if (
            CONV2D.supported(problem, device) is not None
            or max(tile, tile * config.BLOCK_K // 32) > most * config.num_warps
        ):
            continue  # a spilling kernel takes the compiler a minute
        if SPACE.fits(problem, config, device) is None:
            count -= 1
            yield "conv2d", problem, config


def estimates_hold(arch: int, count: int, seed: int, most: int) -> None:
    for reply in compiled(arch, list(sampled(arch, count, seed, most))):
        assert "error" not in reply, (described(reply), reply.get("error"))
        assert reply["estimate"] <= reply["resources"]["shared_bytes"], described(reply)


@pytest.mark.parametrize("arch", archs(80, 90))
def test_estimated_shared_memory_is_never_over_the_real(arch: int) -> None:
    estimates_hold(arch, 3, seed=0, most=512)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("arch", [75, *ARCHS])
def test_estimated_shared_memory_is_never_over_the_real_in_a_larger_sample(arch: int, seed: int) -> None:
    estimates_hold(arch, 50, seed, most=2048)


@pytest.mark.parametrize("arch", [pytest.param(86, marks=pytest.mark.slow), 90])
def test_estimated_shared_memory_is_exact_where_copies_are_asynchronous(arch: int) -> None:
    jobs = [
        ("conv2d", TAPS, WIDE),
        ("conv2d", TAPS, replace(WIDE, num_stages=4, SPLIT_K=2)),
        ("conv2d", replace(TAPS, C=40), replace(WIDE, FOLD=True)),
        ("conv2d", INT8, replace(WIDE, BLOCK_K=64)),
        ("conv2d", replace(TAPS, dtype="fp32", out_dtype=None, precision="tf32"), replace(WIDE, BLOCK_M=64)),
    ]
    for reply in compiled(arch, jobs):
        assert reply["estimate"] == reply["resources"]["shared_bytes"], described(reply)
