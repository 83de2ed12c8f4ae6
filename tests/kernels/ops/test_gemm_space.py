"""A GEMM's configurations: what fits, what is worth trying, the default, and the launches that they make."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from tilewright.kernels import GemmConfig, GemmProblem, resolve_device
from tilewright.kernels.catalogue import CATALOGUE
from tilewright.kernels.ops.gemm.default import default
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import INPUT_DTYPES
from tilewright.kernels.ops.gemm.space import AXES, SPACE, fits, shared_bytes, useful, vector_bytes

RTX3090, A100, H100 = (resolve_device(name) for name in ("rtx3090", "a100", "h100"))
SQUARE = GemmProblem(4096, 4096, 4096)
TILE = GemmConfig(128, 128, 32)


# What fits


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"BLOCK_M": 0}, "BLOCK_M=0 must be an integer of at least 1"),
        ({"GROUP_M": 0}, "GROUP_M=0 must be an integer of at least 1"),
        ({"SPLIT_K": -1}, "SPLIT_K=-1 must be an integer of at least 1"),
        ({"num_stages": 0}, "num_stages=0 must be an integer of at least 1"),
        ({"BLOCK_N": 48}, "BLOCK_N=48 must be a power of two"),
        ({"num_warps": 3}, "num_warps=3 must be a power of two"),
        ({"BLOCK_M": 4}, "the smallest tile of a fp16 dot is 8×16×16"),
        ({"BLOCK_M": 8}, "BLOCK_M=8 is for rows of A and columns of B that are loaded 16 bytes"),
        ({"BLOCK_K": 8}, "the smallest tile of a fp16 dot is 8×16×16"),
        ({"num_warps": 64}, "num_warps=64 is over the 32 of a block"),
        ({"BLOCK_M": 256, "BLOCK_N": 256}, "512 registers a thread for its part of the tile are over the 255"),
        ({"BLOCK_K": 64, "num_stages": 5}, "131072 B of shared memory are over the 101376 B a block of sm_86"),
        ({"SPLIT_K": True}, "SPLIT_K=True must be an integer of at least 1"),
        ({"SPLIT_K": 65536}, "SPLIT_K=65536 is over the grid's 65535"),
        ({"GROUP_M": 2**27}, "pass 32 bits"),
    ],
    ids=str,
)
def test_each_limit_is_named_with_its_values(change, limit):
    assert fits(SQUARE, TILE, RTX3090) is None
    assert limit in fits(SQUARE, replace(TILE, **change), RTX3090)


def test_limits_are_of_the_problem_and_device_too():
    assert "smallest tile of a fp8e5m2 dot is 8×16×32" in fits(
        replace(SQUARE, dtype="fp8e5m2"), replace(TILE, BLOCK_K=16), RTX3090
    )
    deep = replace(TILE, BLOCK_K=64, num_stages=5)
    assert fits(SQUARE, deep, A100) is None
    assert "tiles are over the grid" in fits(GemmProblem(2**20, 2**20, 16, batch=2**10), GemmConfig(16, 16, 16), A100)
    # One more block would be counted past the largest 32-bit number.
    assert fits(GemmProblem(2**31 - 129, 16, 16), GemmConfig(128, 16, 16), A100) is None
    assert "32 bits" in fits(GemmProblem(2**31 - 128, 16, 16), GemmConfig(128, 16, 16), A100)
    assert "32 bits" in fits(GemmProblem(16, 16, 2**31 - 1), GemmConfig(16, 16, 16), A100)


def test_tile_rows_that_no_group_uses_have_places_in_32_bits_too():
    # Of groups that are all empty the last tile row has its place after those of all others.
    last, groups, tile = 2**31 - 1, 1024, GemmConfig(128, 16, 16)
    fitting = GemmProblem(last - 128 * groups, 16, 16, groups=groups)
    assert fits(fitting, tile, A100) is None
    assert (fitting.M // 128 + groups) * 128 <= last
    assert fits(replace(fitting, M=fitting.M + 1), tile, A100) == (
        "16777216 tile rows of BLOCK_M=128 for groups=1024 pass 32 bits"
    )
    assert fits(replace(fitting, M=fitting.M + 1, groups=0), tile, A100) is None


def test_the_step_of_a_persistent_block_past_the_last_tile_is_counted_in_32_bits():
    step = A100.sms * A100.blocks_per_sm
    tile = GemmConfig(16, 16, 16)
    many = GemmProblem(16, 16, 16, batch=2**31 - step)
    assert fits(many, tile, A100) is None
    assert fits(replace(many, batch=many.batch - 1), replace(tile, PERSISTENT=True), A100) is None
    assert fits(many, replace(tile, PERSISTENT=True), A100) == (
        f"{many.batch} tiles, and the step of a PERSISTENT block past the last, pass 32 bits"
    )
    (launch,) = GEMM.launches(SQUARE, replace(TILE, num_warps=2, PERSISTENT=True))
    assert launch.blocks_per_sm * A100.sms <= step


@pytest.mark.parametrize("kind", INPUT_DTYPES)
def test_wide_loads_need_every_length_and_pointer_aligned(kind):
    size = {"fp16": 2, "bf16": 2, "fp32": 4}.get(kind, 1)

    def width(**fields):
        return vector_bytes(GemmProblem(**({"M": 16, "N": 16, "K": 16, "dtype": kind} | fields)))

    assert width() == 16
    assert width(aligned=False) == size
    assert width(K=17) == width(N=24) == size  # Triton is told of multiples of 16 elements or of none
    assert width(M=17) == 16  # rows of A are K long
    assert width(M=17, a_layout="col") == size
    assert width(K=17, a_layout="col") == 16
    assert width(N=17, b_layout="col", K=32) == 16
    assert width(strided=True) == 16
    assert width(K=17, strided=True) == size  # a mask that may end anywhere


def test_more_stages_never_take_less_shared_memory():
    for problem, device in itertools.product((SQUARE, replace(SQUARE, aligned=False)), (RTX3090, H100)):
        taken = [shared_bytes(problem, replace(TILE, num_stages=stages), device) for stages in (1, 2, 3, 4, 5)]
        assert taken == sorted(taken)
        assert taken[0] >= (128 + 128) * 32 * 2


# What is worth trying


@pytest.mark.parametrize(
    ("problem", "config", "reason"),
    [
        (GemmProblem(16, 64, 64), GemmConfig(32, 32, 32, GROUP_M=1), "a block of 32 over a size of 16"),
        (GemmProblem(17, 64, 64), GemmConfig(64, 32, 32, GROUP_M=1), "a block of 64 over a size of 17"),
        (GemmProblem(64, 64, 64), GemmConfig(32, 32, 128, GROUP_M=1), "a block of 128 over a size of 64"),
        (GemmProblem(128, 4096, 4096), GemmConfig(128, 64, 32, GROUP_M=4), "GROUP_M=4 repeats a smaller one with 1"),
        (GemmProblem(512, 4096, 4096), GemmConfig(128, 64, 32, GROUP_M=8), "GROUP_M=8 repeats a smaller one with 4"),
        (GemmProblem(16, 64, 512), GemmConfig(16, 64, 32, GROUP_M=1, SPLIT_K=8), "fewer than 4 of 16 K blocks"),
        (SQUARE, replace(TILE, SPLIT_K=2), "1024 tiles fill 82 SMs with half of SPLIT_K=2"),
        (GemmProblem(256, 256, 96), GemmConfig(64, 64, 32, num_stages=4, GROUP_M=4), "num_stages=4 is more than the K"),
        (SQUARE, GemmConfig(16, 16, 32, num_warps=8), "8 warps on 16×16 leave less than one"),
        (replace(SQUARE, N=4097, K=4097), replace(TILE, num_stages=2), "without cp.async"),
    ],
    ids=str,
)
def test_what_can_not_be_the_best_is_named(problem, config, reason):
    assert reason in useful(problem, config, RTX3090)
    assert fits(problem, config, RTX3090) is None  # it could run


@pytest.mark.parametrize(
    ("problem", "config"),
    [
        # The tile of M is as high as that of K is deep: neither may be taken for the other.
        (GemmProblem(16, 64, 64), GemmConfig(16, 32, 32, GROUP_M=1, num_stages=2)),
        (GemmProblem(1, 4096, 4096), GemmConfig(16, 64, 64, GROUP_M=1, SPLIT_K=4)),
        # Two tile rows walked together read each panel of B once: no smaller GROUP_M does.
        (GemmProblem(256, 32768, 4096), GemmConfig(128, 128, 32, GROUP_M=4, num_warps=8)),
        (GemmProblem(1024, 4096, 4096), GemmConfig(128, 128, 32, GROUP_M=8, num_warps=8)),
        (replace(SQUARE, K=4097), replace(TILE, num_stages=1)),
        (SQUARE, TILE),
    ],
    ids=str,
)
def test_what_may_be_the_best_is_tried(problem, config):
    assert useful(problem, config, RTX3090) is None
    assert config in SPACE.configs(problem, RTX3090)


def test_every_configuration_of_the_space_runs_and_every_axis_is_used():
    seen = {name: Counter() for name in AXES}
    weights = GemmProblem(16, 4096, 4096, b_dtype="int4", b_scale="group", group_size=128)  # in pairs
    few = GemmProblem(8, 4096, 4096, b_layout="col")
    for problem, device in ((GemmProblem(256, 4096, 4096), A100), (SQUARE, H100), (weights, A100), (few, A100)):
        configs = SPACE.configs(problem, device)
        assert len(set(configs)) == len(configs)
        assert all(fits(problem, config, device) is None for config in configs)
        for name in AXES:
            seen[name].update(getattr(config, name) for config in configs)
    for name, values in AXES.items():
        assert seen[name].keys() == set(values), seen[name]


@pytest.mark.parametrize("device", CATALOGUE, ids=lambda device: device.board)
def test_no_problem_is_left_without_a_configuration(device):
    for m, n, k in ((1, 1, 1), (1, 4096, 4096), (17, 31, 33), (4096, 16, 4096)):
        for kind in INPUT_DTYPES:
            problem = GemmProblem(m, n, k, dtype=kind)
            # Narrowed axes leave out nothing useful (`test_space.py`): the whole product takes minutes to look through.
            space = replace(SPACE, axes={**AXES, **SPACE.narrow(problem, device, AXES)})
            tried = (config for config in space.product() if useful(problem, config, device) is None)
            assert any(fits(problem, config, device) is None for config in tried)


@pytest.mark.parametrize("device", CATALOGUE, ids=lambda device: device.board)
def test_the_default_fits_everywhere(device):
    sizes = (1, 17, 64, 4096)
    for m, n, k, kind, layout, aligned in itertools.product(
        sizes, sizes, (1, 4096), INPUT_DTYPES, ("row", "col"), (True, False)
    ):
        problem = GemmProblem(m, n, k, dtype=kind, a_layout=layout, aligned=aligned)
        assert fits(problem, default(problem, device), device) is None


def test_tiles_of_eight_rows_are_for_few_rows_and_mma_sync():
    few = GemmProblem(8, 4096, 4096, b_layout="col")
    flat = GemmConfig(8, 64, 128, num_warps=2)
    for board in (RTX3090, A100, H100, resolve_device("t4"), resolve_device("b200")):
        assert fits(few, flat, board) is None
    assert fits(few, replace(flat, num_warps=4), RTX3090) is None
    assert "BLOCK_N under 64 or 2 warps" in fits(few, replace(flat, num_warps=4), H100)
    assert fits(replace(few, gated="halves"), replace(flat, num_warps=4), H100) is None  # twice 32 columns
    assert "no TMA" in fits(few, replace(flat, TMA=True), H100)
    assert "the smallest tile of a fp16 dot is 8×16×16" in fits(few, replace(flat, BLOCK_M=4), RTX3090)
    for other in ({"b_layout": "row"}, {"a_layout": "col"}, {"K": 4097}, {"aligned": False}):
        assert "that are loaded 16 bytes at a time" in fits(replace(few, **other), flat, RTX3090)
    assert flat.BLOCK_M in {config.BLOCK_M for config in SPACE.configs(few, RTX3090)}
    for more, tiled in (({"M": 9}, False), ({"M": 64, "groups": 8}, True), ({"M": 65, "groups": 8}, False)):
        more = replace(few, **more)
        assert (flat.BLOCK_M in {config.BLOCK_M for config in SPACE.configs(more, RTX3090)}) is tiled
        assert (useful(more, flat, RTX3090) is None) is tiled


@pytest.mark.parametrize("device", CATALOGUE, ids=lambda device: device.board)
def test_the_default_of_few_rows_by_weights_has_eight(device):
    for b_dtype, scale in (("int4", {"b_scale": "group", "group_size": 128}), ("int8", {"b_scale": "column"})):
        for n, k in ((4096, 4096), (57344, 8192), (48, 128)):
            problem = GemmProblem(1, n, k, b_layout="col", b_dtype=b_dtype, **scale)
            config = default(problem, device)
            assert config.BLOCK_M == 8
            assert 16 * config.num_warps <= config.BLOCK_N or not device.tensor_tflops  # no warp repeats another
            assert default(replace(problem, M=9), device).BLOCK_M == 16
            assert default(replace(problem, b_layout="row"), device).BLOCK_M == 16


def test_the_default_suits_the_problem():
    skinny, square = default(GemmProblem(1, 4096, 4096), A100), default(SQUARE, A100)
    assert skinny.BLOCK_M == 16
    assert square.BLOCK_M * square.BLOCK_N == 128 * 128
    assert default(replace(SQUARE, aligned=False), A100).num_stages == 1  # nothing to copy ahead
    assert default(SQUARE, resolve_device("t4")).num_stages == 1


def test_a_launch_covers_the_problem_and_keeps_the_argument_order():
    problem = GemmProblem(33, 65, 100, batch=3, bias="fp32", residual="fp16", alpha=True, strided=True)
    (launch,) = GEMM.launches(problem, GemmConfig(16, 32, 32, SPLIT_K=4))
    assert launch.grid == (3 * 3 * 3, 4, 1)
    names = [argument.name for argument in launch.arguments] + [name for name, _ in launch.constexprs]
    assert names == launch.fn.arg_names
    assert [scratch.elements for scratch in launch.scratch] == [27 * 4 * 16 * 32, 27]
    absent = GEMM.launches(GemmProblem(33, 65, 100), GemmConfig(16, 32, 32))[0]
    present = [argument.name for argument in absent.arguments if argument.type is not None]
    assert present == ["a_ptr", "b_ptr", "M", "N", "K", "out_ptr"]
    assert absent.scratch == ()


def test_launches_share_a_binary_unless_the_code_differs():
    def code(config=TILE, **fields):
        return GEMM.launches(replace(SQUARE, **fields), config)[0].specialization

    assert code() == code(M=8192, N=2048)
    others = [
        code(M=4100),
        code(N=4100),
        code(K=4100),
        code(dtype="bf16"),
        code(activation="relu"),
        code(bias="fp16"),
        code(aligned=False),
        code(strided=True),
        code(a_layout="col"),
        *(
            code(replace(TILE, **{name: True if value is False else 2 * value}))
            for name, value in TILE.to_dict().items()
        ),
    ]
    assert len({code(), *others}) == len(others) + 1


@pytest.mark.parametrize("problem", [SQUARE, replace(SQUARE, M=3, N=5, K=33)], ids=str)
def test_the_coarse_space_is_a_small_part_of_the_whole(problem):
    whole, coarse = SPACE.configs(problem, A100), SPACE.configs(problem, A100, coarse=True)
    assert coarse
    assert set(coarse) < set(whole)
    assert len(list(SPACE.product(coarse=True))) * 5 < len(list(SPACE.product()))
