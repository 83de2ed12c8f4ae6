"""`conv2d` and `conv1d` on a GPU against float64: data types, layouts, windows, groups, epilogues, large offsets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.gpu.conforming import conforms, fault, on_host, skip_unless, to_gpu
from tests.kernels.conformance import pairwise
from tilewright.kernels import Conv2dConfig, Conv2dProblem, conv1d, conv2d
from tilewright.kernels.device import Device
from tilewright.kernels.ops.conv2d.launch import CONV2D

pytestmark = pytest.mark.gpu

WINDOWS: dict[str, dict[str, int]] = {
    "1x1": {"R": 1, "S": 1},
    "1x1 s2": {"R": 1, "S": 1, "stride_h": 2, "stride_w": 2},
    "3x3": {"R": 3, "S": 3},
    "3x3 s2": {"R": 3, "S": 3, "stride_h": 2, "stride_w": 2},
    "2x3 d2x1": {"R": 2, "S": 3, "dilation_h": 2},
    "7x7 s2": {"R": 7, "S": 7, "stride_h": 2, "stride_w": 2},
}
PADDINGS = {"none": (0, 0, 0, 0), "one": (1, 1, 1, 1), "uneven": (0, 2, 1, 0), "end": (0, 0, 2, 1)}
KINDS: dict[str, dict[str, Any]] = {
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "fp32": {"dtype": "fp32"},
    "tf32": {"dtype": "fp32", "precision": "tf32"},
    "fp8e4m3": {"dtype": "fp8e4m3"},
    "fp8e5m2": {"dtype": "fp8e5m2"},
    "int8": {"dtype": "int8"},
    "int8 scaled": {"dtype": "int8", "x_scale": True, "w_scale": "channel", "out_dtype": "bf16"},
    "int8 to int8": {"dtype": "int8", "x_scale": True, "w_scale": "channel", "out_dtype": "int8", "out_scale": True},
}
EPILOGUES: dict[str, dict[str, Any]] = {
    "none": {},
    "bias": {"bias": "fp32", "activation": "silu"},
    "all": {"bias": "fp16", "residual": "bf16", "activation": "gelu_erf", "alpha": True},
}
AXES = {
    "kind": tuple(KINDS),
    "layout": ("nhwc", "nchw"),
    "w_layout": ("krsc", "kcrs"),
    "window": tuple(WINDOWS),
    "padding": tuple(PADDINGS),
    "image": ((1, 15, 17), (2, 14, 14), (3, 9, 31)),
    "groups": ("one", "two", "depthwise"),
    "channels": (1, 3, 16, 33, 64),  # of a group
    "filters": (1, 15, 32, 65),
    "epilogue": tuple(EPILOGUES),
    "aligned": (True, False),
}


def problem_of(row: dict[str, Any]) -> Conv2dProblem:
    images, height, width = row["image"]
    if row["groups"] == "depthwise":
        groups = channels = filters = row["channels"] + 1  # one channel alone would be no groups
    else:
        groups = {"one": 1, "two": 2}[row["groups"]]
        channels, filters = groups * row["channels"], groups * row["filters"]
    epilogue = EPILOGUES[row["epilogue"]]
    if row["kind"] == "int8" and epilogue:
        epilogue = {**epilogue, "out_dtype": "fp32", "x_scale": True}
    names = ("pad_top", "pad_left", "pad_bottom", "pad_right")
    return Conv2dProblem(
        N=images,
        H=height,
        W=width,
        C=channels,
        K=filters,
        groups=groups,
        layout=row["layout"],
        w_layout=row["w_layout"],
        aligned=row["aligned"],
        **WINDOWS[row["window"]],
        **dict(zip(names, PADDINGS[row["padding"]], strict=True)),
        **KINDS[row["kind"]],
        **epilogue,
    )


PROBLEMS = list(dict.fromkeys(problem_of(row) for row in pairwise(AXES)))
LAYERS = [
    Conv2dProblem(N=2, H=28, W=28, C=128, K=128, R=3, S=3, pad_top=1, pad_left=1, pad_bottom=1, pad_right=1,
                  dtype="bf16", bias="bf16", activation="relu"),
    Conv2dProblem(N=1, H=57, W=57, C=3, K=64, R=7, S=7, stride_h=2, stride_w=2, pad_top=3, pad_left=3, pad_bottom=3,
                  pad_right=3, bias="fp16"),
    Conv2dProblem(N=1, H=28, W=28, C=192, K=192, R=7, S=7, groups=192, pad_top=3, pad_left=3, pad_bottom=3,
                  pad_right=3, layout="nchw"),
]  # fmt: skip


@pytest.mark.parametrize("problem", [*PROBLEMS, *LAYERS], ids=str)
def test_equals_the_reference(cupy: Any, board: Device, problem: Conv2dProblem) -> None:
    skip_unless(CONV2D, problem, board)
    conforms(cupy, CONV2D, problem)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("split_k", [1, 2, 5])
def test_split_depth_gives_the_same_bits_every_time(cupy: Any, fold: bool, split_k: int) -> None:
    problem = Conv2dProblem(N=1, H=13, W=14, C=64, K=48, R=3, S=3, out_dtype="fp32")
    config = Conv2dConfig(32, 32, 32, SPLIT_K=split_k, FOLD=fold)
    conforms(cupy, CONV2D, problem, config)
    arrays = {name: to_gpu(cupy, array) for name, array in problem.inputs(0).items()}
    results = [on_host(cupy, conv2d(**arrays, out_dtype="fp32", config=config)) for _ in range(20)]
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("layout", ["nlc", "ncl"])
def test_one_dimension(cupy: Any, layout: str) -> None:
    problem = Conv2dProblem(
        N=2, H=1, W=61, C=48, K=40, R=1, S=5, stride_w=2, pad_left=3, pad_right=1, dilation_w=2, bias="fp16",
        layout={"nlc": "nhwc", "ncl": "nchw"}[layout],
    )  # fmt: skip
    arrays = problem.inputs(0)
    moved = {name: to_gpu(cupy, array) for name, array in arrays.items()}
    at = 1 if layout == "nlc" else 2
    x, w = (moved[name].squeeze(at) for name in "xw")
    out = conv1d(x, w, bias=moved["bias"], stride=2, padding=(3, 1), dilation=2, layout=layout)
    assert not fault(CONV2D, problem, CONV2D.reference(problem, arrays), {"out": on_host(cupy, out)})


def test_out_may_be_the_residual(cupy: Any) -> None:
    problem = Conv2dProblem(N=1, H=9, W=9, C=32, K=32, R=3, S=3, residual="fp16", activation="relu")
    arrays = problem.inputs(0)
    moved = {name: to_gpu(cupy, array) for name, array in arrays.items()}
    out = conv2d(**moved, activation="relu", out=moved["residual"])
    assert out is moved["residual"]
    assert not fault(CONV2D, problem, CONV2D.reference(problem, arrays), {"out": on_host(cupy, out)})


def test_channels_last_tensors_stay_channels_last(torch: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 15, 17, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    w = torch.randn(48, 32, 3, 3, device="cuda", dtype=torch.float16) / 17
    out = conv2d(x, w, padding=1, layout="nchw")
    assert out.is_contiguous(memory_format=torch.channels_last)
    wanted = torch.nn.functional.conv2d(x.double().cpu(), w.double().cpu(), padding=1)
    problem = Conv2dProblem(N=2, H=15, W=17, C=32, K=48, R=3, S=3, pad_top=1, pad_left=1, pad_bottom=1, pad_right=1)
    # The tolerance is for weights of 1/√depth, as these are.
    assert not fault(CONV2D, problem, {"out": wanted.numpy()}, {"out": out.cpu().numpy()})


SIDE = 8200
PERIOD = 1_048_573
"""Values that repeat along a large array: a prime, so that no row begins as another does."""


def test_offsets_beyond_31_bits(cupy: Any, board: Device) -> None:
    """2.15 G elements of output, 4.3 GB, from 2.2 GB of input."""
    if board.memory_gib < 24:
        pytest.skip(f"{board.board} has {board.memory_gib} GiB of memory; this takes 7")
    problem = Conv2dProblem(N=1, H=SIDE, W=SIDE, C=16, K=32, R=3, S=3, pad_top=1, pad_left=1, pad_bottom=1, pad_right=1)
    random = np.random.default_rng(0)
    values = random.standard_normal(PERIOD, np.float32).astype(np.float16)
    w = (random.standard_normal((32, 3, 3, 16), np.float32) / 12).astype(np.float16)
    x = cupy.resize(cupy.asarray(values), (1, SIDE, SIDE, 16))
    out = conv2d(x, cupy.asarray(w), padding=1)
    assert out.size > 2**31
    corners = [(0, 0), (0, SIDE - 1), (1, 5), (SIDE // 2, 77), (SIDE - 2, SIDE - 3), (SIDE - 1, SIDE - 1)]
    found = np.stack([on_host(cupy, out[0, row, column]) for row, column in corners])
    wanted = np.stack([_at(values, w, row, column) for row, column in corners])
    del x, out
    cupy.get_default_memory_pool().free_all_blocks()
    assert not fault(CONV2D, problem, {"out": wanted}, {"out": found})


def _at(values: np.ndarray[Any, Any], w: np.ndarray[Any, Any], row: int, column: int) -> np.ndarray[Any, Any]:
    """One output pixel of `test_offsets_beyond_31_bits`, in float64."""
    sums = np.zeros(len(w))
    for r, s in np.ndindex(3, 3):
        y, x = row + r - 1, column + s - 1
        if 0 <= y < SIDE and 0 <= x < SIDE:
            pixel = values[((y * SIDE + x) * 16 + np.arange(16)) % PERIOD]
            sums += w[:, r, s].astype(float) @ pixel.astype(float)
    return sums
