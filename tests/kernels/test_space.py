"""Spaces: which configurations they have, what narrowing leaves out, and that ragged problems fit where theirs do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import pytest

from tilewright.kernels import (
    AttentionConfig,
    AttentionProblem,
    Conv2dConfig,
    Conv2dProblem,
    GemmConfig,
    GemmProblem,
    find_kernel,
    resolve_device,
)
from tilewright.kernels.problem import Config
from tilewright.kernels.space import Space, mostly_padding, needless_split, repeated_group, widest_block
from tilewright.tuning_db.errors import IllegalConfigError

RTX3090, H100 = (resolve_device(name) for name in ("rtx3090", "h100"))


@dataclass(frozen=True)
class Pair(Config):
    one: int
    other: int = 3


def pairs(fits=lambda *_: None, useful=lambda *_: None):
    return Space(Pair, {"one": (1, 2), "other": (3, 4, 5)}, fits, useful)


def test_the_product_takes_the_axes_in_order():
    assert list(pairs().product()) == [Pair(one, other) for one in (1, 2) for other in (3, 4, 5)]


def test_configs_are_those_that_fit_and_are_useful():
    space = pairs(
        fits=lambda problem, config, device: "too large" if config.other > problem else None,
        useful=lambda problem, config, device: "odd" if config.one % 2 else None,
    )
    assert space.configs(4, None) == [Pair(2, 3), Pair(2, 4)]


def test_check_names_the_limit_and_does_not_ask_for_use():
    space = pairs(fits=lambda p, config, d: "too large" if config.other > 4 else None, useful=lambda *_: "never")
    space.check("PROBLEM", Pair(1, 4), RTX3090)
    with pytest.raises(
        IllegalConfigError, match=r"^Pair\(one=1, other=5\) does not fit PROBLEM on rtx3090: too large$"
    ):
        space.check("PROBLEM", Pair(1, 5), RTX3090)


NARROWED = [
    (find_kernel(op), problem, device)
    for op, problems in {
        "gemm": [
            GemmProblem(M=1, N=1000, K=8),
            GemmProblem(M=300, N=4096, K=768, dtype="fp8e5m2", b_layout="col"),
            GemmProblem(M=700, N=96, K=64, groups=5, aligned=False),
        ],
        "conv2d": [
            Conv2dProblem(N=1, H=9, W=9, C=3, K=48, R=3, S=3),
            Conv2dProblem(N=8, H=28, W=28, C=64, K=64, R=3, S=3, groups=64),
        ],
        "attention": [
            AttentionProblem(B=1, H=8, Hkv=2, Sq=1, Skv=4096, D=64),
            AttentionProblem(B=4, H=8, Sq=300, Skv=300, D=40, causal=True, aligned=False),
        ],
    }.items()
    for problem in problems
    for device in (resolve_device("t4"), RTX3090, H100)
]


@pytest.mark.parametrize(("kernel", "problem", "device"), NARROWED, ids=lambda value: getattr(value, "board", None))
def test_narrowed_axes_leave_out_nothing_useful(kernel, problem, device):
    """Those that are next to useful ones, along one axis, and all of the coarse ones."""
    space = kernel.space
    narrowed = space.narrow(problem, device, space.axes)
    left_out = {name: set(values) - set(narrowed[name]) for name, values in space.axes.items()}
    assert any(left_out.values())
    coarse = space.configs(problem, device, coarse=True)
    for config in Random(0).sample(coarse, min(len(coarse), 200)):
        for name, values in left_out.items():
            for value in values:
                other = replace(config, **{name: value})
                assert space.useful(problem, other, device) or space.fits(problem, other, device)
    assert coarse == replace(space, narrow=None).configs(problem, device, coarse=True)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "problem", "device"), NARROWED, ids=lambda value: getattr(value, "board", None))
def test_narrowed_axes_leave_out_nothing_useful_at_all(kernel, problem, device):
    for coarse in (False, True):
        whole = replace(kernel.space, narrow=None).configs(problem, device, coarse=coarse)
        assert kernel.space.configs(problem, device, coarse=coarse) == whole


RAGGED = [
    ("gemm", GemmProblem(M=4096, N=4096, K=4104), GemmConfig(128, 128, 64, TMA=True)),
    ("gemm", GemmProblem(M=4096, N=4104, K=4096, b_layout="col"), GemmConfig(128, 128, 64, TMA=True, PERSISTENT=True)),
    ("gemm", GemmProblem(M=100, N=1000, K=33), GemmConfig(64, 64, 32)),
    (
        "conv2d",
        Conv2dProblem(N=1, H=223, W=223, C=64, K=64, R=3, S=3, stride_h=2, stride_w=2, pad_bottom=1, pad_right=1),
        Conv2dConfig(64, 64, 32),
    ),
    (
        "attention",
        AttentionProblem(B=1, H=64, Hkv=1, Sq=8, Skv=512, D=64, window_left=100, window_right=4),
        AttentionConfig(16, 64, PACK=True),
    ),
    (
        "attention",
        AttentionProblem(B=2, H=4, Sq=1, Skv=819, D=64, page_size=13, kv_lens=True, bias="fp16"),
        AttentionConfig(16, 64),
    ),
    (
        "attention",
        AttentionProblem(B=2, H=4, Sq=2048, Skv=2048, D=128, causal=True),
        AttentionConfig(128, 64, GROUP_H=8, OVERLAP=True, TMA=True, num_warps=8),
    ),
]


@pytest.mark.parametrize(("op", "problem", "config"), RAGGED, ids=lambda value: value if isinstance(value, str) else "")
def test_the_ragged_problem_is_of_the_same_code_and_fits_where_the_problem_does(op, problem, config):
    kernel = find_kernel(op)
    assert kernel.space.fits(problem, config, H100) is None
    small = kernel.ragged(problem, config)
    assert kernel.space.fits(small, config, H100) is None
    same = {"EVEN_M", "EVEN_N", "EVEN_K"}  # to differ there is what it is for
    for one, other in zip(kernel.launches(problem, config), kernel.launches(small, config), strict=True):
        assert [(each.name, each.type) for each in one.arguments] == [
            (each.name, each.type) for each in other.arguments
        ]
        differ = {name for name, value in dict(one.constexprs).items() if dict(other.constexprs)[name] != value} - same
        assert differ <= {"GROUP", "RUN", "MASKS"}, differ


def test_a_block_may_be_the_next_power_of_two():
    assert [widest_block(size) for size in (1, 2, 3, 127, 128, 129)] == [1, 2, 4, 128, 128, 256]
    assert widest_block(3, 16) == 16
    assert mostly_padding((16, 3, 16), (256, 129, 16)) is None
    assert mostly_padding((16, 3, 16), (256, 128, 16)) == "a block of 256 over a size of 128 is mostly padding"


def test_a_group_with_room_for_all_repeats_larger_ones():
    assert repeated_group("GROUP_M", 4, (1, 4, 8), 2, "tile rows") is None
    assert repeated_group("GROUP_M", 8, (1, 4, 8), 4, "tile rows") == "GROUP_M=8 repeats a smaller one with 4 tile rows"


def test_half_as_many_splits_do_where_they_fill_the_device():
    assert needless_split("SPLIT_K", 4, 163, RTX3090, waves=4) is None
    assert needless_split("SPLIT_K", 4, 164, RTX3090, waves=4) == "164 tiles fill 82 SMs with half of SPLIT_K=4"
    assert needless_split("SPLIT_K", 1, 10**6, RTX3090, waves=4) is None
