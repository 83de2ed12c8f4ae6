"""Which configurations become tactics, and in which order. What a compiler says of them is made up here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.kernels.tensorrt.cases import case
from tests.kernels.tensorrt.records import put
from tilewright.kernels import GemmConfig, GemmProblem, resolve_device
from tilewright.kernels.compile import Binary
from tilewright.kernels.lookup import choose
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.tensorrt import tactics as tactics_module
from tilewright.kernels.tensorrt.expressions import dimension
from tilewright.kernels.tensorrt.tactics import MOST, launch_plan, number_of, tactics
from tilewright.tuning_db.env import DB_DIR
from tilewright.tuning_db.errors import CompileError, UnsupportedError
from tilewright.tuning_db.record import Provenance, Resources

DEVICE = resolve_device("rtx3090")
PROBLEM = GemmProblem(M=128, N=768, K=512)
TILES = [GemmConfig(64, 64, 32, GROUP_M=group) for group in range(1, 12)]
RESOURCES = Resources(128, 0, 0, 32768)
ENTRY = ".version 8.7\n.target sm_86\n.visible .entry k(\n{})\n{{\n{}\n}}\n"


def compiled(launch, arch, *, ptx_isa):
    """A kernel with as many parameters as it has arguments, and Triton's two."""
    count = sum(1 for argument in launch.arguments if argument.type is not None) + 2
    parameters = ",".join(f"\t.param .u64 k_param_{index}" for index in range(count))
    ptx = ENTRY.format(parameters, launch.constexprs)  # another one for every configuration
    return Binary("k", arch, b"", ptx, launch.num_warps, 32768, 0, RESOURCES)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(DB_DIR, str(tmp_path))
    monkeypatch.setattr(tactics_module, "compile_launch", compiled)
    return tmp_path


def found(folder, m=(1, 128, 1000), most=MOST):
    asked = case("FusedGemm", [((list(m), 512), "fp16"), ((512, 768), "fp16")])
    return tactics(asked, DEVICE, folder, cuda="12.8", most=most)


def configs(*arguments, **keywords):
    return [tactic.choice.config for tactic in found(*arguments, **keywords)]


def test_without_a_cache_the_prediction_and_the_default(folder):
    chosen = found(folder)
    assert len({tactic.number for tactic in chosen}) == len(chosen)
    assert all(tactic.number == number_of(tactic.choice.config, tactic.plan) for tactic in chosen)
    assert chosen[0].choice.config == choose(GEMM, PROBLEM, DEVICE).config
    assert {tactic.choice.provenance for tactic in chosen[:4]} == {Provenance.PREDICTED}
    assert GEMM.default(PROBLEM, DEVICE) in configs(folder)
    assert len(set(configs(folder))) == len(chosen)


def test_the_cached_best_is_the_first_tactic_and_the_others_follow_by_time(folder):
    for config, time_us in ((TILES[2], 30), (TILES[0], 10), (TILES[1], 20)):
        put(folder, GEMM, PROBLEM, DEVICE, config, time_us)
    assert configs(folder)[:3] == TILES[:3]
    put(folder, GEMM, PROBLEM, DEVICE, TILES[3], 5)
    assert configs(folder)[:4] == [TILES[3], *TILES[:3]]


def test_the_default_is_among_any_number_but_one(folder):
    for time_us, config in enumerate(TILES, 1):
        put(folder, GEMM, PROBLEM, DEVICE, config, time_us)
    default = GEMM.default(PROBLEM, DEVICE)
    assert default not in TILES
    for most in (2, 5, MOST):
        assert configs(folder, most=most) == [*TILES[: most - 1], default]
    assert configs(folder, most=1) == TILES[:1]


def test_numbers_are_of_the_content():
    """So that a timing cache means the same kernel in every process, whatever was asked there before."""
    plan = SimpleNamespace(name="tilewright_gemm_kernel_0123456789abcdef", grid=(12, 1, 1), scalars=(("M", 128),))
    first = number_of(TILES[0], plan)
    assert first == number_of(GemmConfig(**TILES[0].to_dict()), plan) == 1321943702
    assert first != number_of(TILES[1], plan)
    for changed in ({"name": "another"}, {"grid": (6, 1, 1)}, {"scalars": (("M", dimension("a", 0)),)}):
        assert first != number_of(TILES[0], SimpleNamespace(**{**vars(plan), **changed}))
    assert all(1 <= number_of(tile, plan) < 2**31 for tile in TILES)


SPLIT = [GemmConfig(64, 64, 32, GROUP_M=group, SPLIT_K=4) for group in range(1, 12)]


def test_records_that_tensorrt_can_not_launch_hide_none_that_it_can(folder):
    for time_us, config in enumerate(SPLIT, 1):
        put(folder, GEMM, PROBLEM, DEVICE, config, time_us)
    for time_us, config in enumerate(TILES, 100):
        put(folder, GEMM, PROBLEM, DEVICE, config, time_us)
    assert configs(folder)[: MOST - 1] == TILES[: MOST - 1]
    assert configs(folder, most=11)[:10] == TILES[:10]


def test_records_of_an_earlier_revision_follow_too(folder):
    for time_us, config in enumerate((SPLIT[0], *TILES[:3]), 1):
        put(folder, GEMM, PROBLEM, DEVICE, config, time_us, kernel_hash="earlier")
    assert configs(folder)[:3] == TILES[:3]
    assert {tactic.choice.provenance for tactic in found(folder)[:3]} == {Provenance.TRANSFERRED}


DECODE = [((1, 32, 1, 128), "fp16"), ((1, 8, 4096, 128), "fp16"), ((1, 8, 4096, 128), "fp16")]
LAST_LAYER = [((1, 512, 7, 7), "fp16"), ((512, 512, 3, 3), "fp16")]
PADS = {f"pad_{side}": 1 for side in ("top", "left", "bottom", "right")}


@pytest.mark.parametrize("board", ["a100", "rtx3090", "h200"])
@pytest.mark.parametrize(
    ("plugin", "inputs", "attributes"),
    [
        ("FusedAttention", DECODE, {}),
        ("FusedConv2d", LAST_LAYER, PADS),
        ("FusedGemm", [((1, 4096), "fp16"), ((4096, 4096), "fp16")], {}),
        ("FusedGemm", [((4096, 4096), "fp16"), ((4096, 4096), "fp16")], {}),
    ],
    ids=["decode", "last convolution", "one row", "large"],
)
def test_where_the_best_needs_memory_the_best_that_does_not_is_taken(board, plugin, inputs, attributes, folder):
    """Splits and descriptors are what predictions and defaults take here."""
    device = resolve_device(board)
    asked = case(plugin, inputs, **attributes)
    chosen = tactics(asked, device, folder, cuda="12.8")
    problem = asked.problem({})
    default = asked.kernel.default(problem, device)
    launchable = asked.refusal(default, device) is None
    assert len(chosen) >= 4
    assert all(asked.refusal(tactic.choice.config, device) is None for tactic in chosen)
    assert (default in [tactic.choice.config for tactic in chosen]) == launchable
    times = [tactic.choice.time_us for tactic in chosen if tactic.choice.provenance is Provenance.PREDICTED]
    assert len(times) >= 3
    assert times == sorted(times)


def test_both_ends_of_the_range_have_a_word(folder):
    put(folder, GEMM, replace(PROBLEM, M=1000), DEVICE, TILES[5], 5)
    put(folder, GEMM, replace(PROBLEM, M=1), DEVICE, TILES[6], 5)
    chosen = configs(folder)
    assert {TILES[5], TILES[6]} <= set(chosen)
    assert configs(folder, m=(128, 128, 128))[0] == choose(GEMM, PROBLEM, DEVICE).config


def test_records_that_need_scratch_memory_are_passed_over(folder):
    put(folder, GEMM, PROBLEM, DEVICE, GemmConfig(64, 64, 32, SPLIT_K=4), 1)
    put(folder, GEMM, PROBLEM, DEVICE, TILES[0], 2)
    assert configs(folder)[0] == TILES[0]


def test_what_does_not_compile_is_passed_over(folder, monkeypatch):
    put(folder, GEMM, PROBLEM, DEVICE, TILES[0], 1)
    put(folder, GEMM, PROBLEM, DEVICE, TILES[1], 2)

    def fails(launch, arch, *, ptx_isa):
        if dict(launch.constexprs)["GROUP_M"] == TILES[0].GROUP_M and dict(launch.constexprs)["BLOCK_M"] == 64:
            raise CompileError("ptxas: no")
        return compiled(launch, arch, ptx_isa=ptx_isa)

    monkeypatch.setattr(tactics_module, "compile_launch", fails)
    assert configs(folder)[0] == TILES[1]


@pytest.mark.parametrize(
    ("binary", "message"),
    [
        ({"resources": replace(RESOURCES, spill_bytes=8)}, "8 B a thread spill"),
        ({"resources": replace(RESOURCES, shared_bytes=2**20)}, "1048576 B of shared memory"),
        ({"scratch_bytes": 128}, "needs 128 B of scratch memory"),
    ],
)
def test_without_any_tactic_the_reason_is_given(folder, monkeypatch, binary, message):
    monkeypatch.setattr(
        tactics_module, "compile_launch", lambda *given, ptx_isa: replace(compiled(*given, ptx_isa=ptx_isa), **binary)
    )
    with pytest.raises(UnsupportedError, match=rf"^FusedGemm M=128,N=768,K=512 has no tactic on rtx3090: .*{message}"):
        found(folder)


def test_a_data_type_that_the_device_lacks(folder):
    asked = case("FusedGemm", [((64, 64), "fp8e4m3"), ((64, 64), "fp8e4m3")])
    with pytest.raises(UnsupportedError, match="fp8e4m3 needs sm_89"):
        tactics(asked, DEVICE, folder, cuda="12.8")


def test_a_persistent_grid_is_at_most_what_the_device_holds():
    asked = case("FusedGemm", [(([1, 4096, 10000], 512), "fp16"), ((512, 768), "fp16")])
    config = GemmConfig(128, 128, 32, num_warps=8, PERSISTENT=True)
    plan = launch_plan(asked, config, DEVICE, cuda="12.8")
    (place,) = asked.profile.opt
    for m in (1, 4096, 9999):
        (launch,) = GEMM.launches(replace(PROBLEM, M=m), config)
        assert plan.grid_at({place: m}) == launch.on(DEVICE.sms).grid
    assert plan.grid_at({place: 9999}) == (DEVICE.sms, 1, 1)
    assert plan.scalars_at({place: 9999}) == (9999, 768, 512)
    assert (plan.threads, plan.shared_bytes, plan.inputs, plan.outputs) == (256, 32768, ("a", "b"), ("out",))
