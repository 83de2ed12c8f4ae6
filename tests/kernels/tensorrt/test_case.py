"""Launches for a whole range of sizes: what is refused, and why."""

from __future__ import annotations

import pytest

from tests.kernels.tensorrt.cases import case
from tilewright.kernels import AttentionConfig, Conv2dConfig, GemmConfig, resolve_device
from tilewright.kernels.tensorrt.case import Profile
from tilewright.tuning_db.errors import ProblemError, UnsupportedError

DEVICE = resolve_device("rtx3090")
M = [1, 128, 1000]
B = [4, 8, 8]
ROWS = [4, 64, 64]


def test_sizes_that_stand_for_all():
    profile = Profile({}, {}, {("a", 0): 1, ("a", 1): 64, ("b", 0): 65})
    assert profile.general == {("a", 0): 3, ("a", 1): 65, ("b", 0): 65}


def test_split_k_and_two_launches_are_left_out():
    found = case("FusedGemm", [((M, 512), "fp16"), ((512, 64), "fp16")])
    with pytest.raises(
        UnsupportedError, match=r"needs scratch memory \(workspace, counters\), and TensorRT gives none"
    ):
        found.launch(GemmConfig(32, 32, 32, SPLIT_K=4))
    attention = case("FusedAttention", [((1, 2, 16, 64), "fp16")] + [((1, 2, 512, 64), "fp16")] * 2)
    with pytest.raises(UnsupportedError, match="takes 2 launches, and TensorRT makes one"):
        attention.launch(AttentionConfig(16, 32, SPLIT_KV=4))


def test_a_configuration_that_breaks_a_limit_anywhere_in_the_range_is_refused():
    # Rows of 16 bytes are what descriptors need, and not all of these columns make such.
    found = case("FusedGemm", [((64, 64), "fp16"), ((64, [8, 64, 128]), "fp16")])
    reason = found.refusal(GemmConfig(64, 64, 64, TMA=True), DEVICE)
    assert "TMA needs tiles of A and B that start at 16 bytes" in reason
    assert found.refusal(GemmConfig(64, 64, 64), DEVICE) is None
    assert "power of two" in found.refusal(GemmConfig(48, 64, 64), DEVICE)


def test_a_grid_past_the_largest_size_is_refused():
    found = case("FusedConv2d", [(([1, 1, 2**20], 8, 64, 64), "fp16"), ((8, 8, 1, 1), "fp16")])
    assert found.refusal(Conv2dConfig(16, 16, 16), DEVICE) is not None


def test_outputs_are_those_of_the_problem():
    found = case("FusedGemm", [((M, 64), "fp16"), ((64, 64), "fp16")])
    found.check()
    assert [tensor.name for tensor in found.outputs] == ["out"]


MATRICES = [((B, 16, 16), "fp16"), ((B, 16, 16), "fp16")]
HEADS = [((B, 4, ROWS, 64), "fp16")] * 3


@pytest.mark.parametrize(
    ("plugin", "inputs", "what", "both"),
    [
        ("FusedGemm", [(([1, 8, 8], 16, 16), "fp16"), MATRICES[1]], "out, batch, a_broadcast", True),
        ("FusedGemm", [MATRICES[0], (([1, 8, 8], 16, 16), "fp16")], "M, batch", False),
        ("FusedGemmResidual", [*MATRICES, (([1, 8, 8], 16, 16), "fp16")], "residual_broadcast", False),
        ("FusedGemmAScale", [((ROWS, 64), "fp16"), ((64, 32), "fp16"), (([1, 64, 64],), "fp32")], "a_scale", False),
        ("FusedGemmBScale", [((8, 64), "fp16"), ((64, ROWS), "fp16"), (([1, 64, 64],), "fp32")], "b_scale", False),
        ("FusedAttentionBias", [*HEADS, (([1, 8, 8], 4, ROWS, ROWS), "fp16")], "bias_batch", False),
        ("FusedAttentionBias", [*HEADS, ((B, [1, 4, 4], ROWS, ROWS), "fp16")], "bias_heads", False),
        ("FusedAttentionBias", [*HEADS, ((1, 1, [1, 64, 64], ROWS), "fp16")], "bias_rows", False),
        (
            "FusedConv2dWScale",
            [((B, 16, 8, 8), "fp16"), ((16, 16, 3, 3), "fp16"), (([1, 16, 16],), "fp32")],
            "w_scale",
            False,
        ),
    ],
)
def test_a_dynamic_dimension_is_never_a_one_that_is_broadcast(plugin, inputs, what, both):
    """One kernel serves the whole profile: of what is 1 at its least shape alone it would read past the end."""
    found = case(plugin, inputs)
    message = rf"{plugin}: at the min of the profile a 1 is broadcast which is no 1 at its max \({what}\): make that"
    with pytest.raises(ProblemError, match=message):
        found.check()
    if both:  # TensorRT makes the result of the dynamic dimension
        with pytest.raises(ProblemError, match=r"at the min of the profile .* \(out\)"):
            found.check(ahead=False)
    elif "M" not in what:
        found.check(ahead=False)  # from Python, each shape has a kernel of its own


@pytest.mark.parametrize(
    ("plugin", "inputs"),
    [
        ("FusedGemmResidual", [((M, 16, 16), "fp16")] * 3),
        ("FusedGemmResidual", [((M, 16, 16), "fp16")] * 2 + [((1, 16, 16), "fp16")]),
        ("FusedGemm", [((1, 16, 16), "fp16"), ((M, 16, 16), "fp16")]),
        ("FusedGemmAScaleBScale", [((M, 16), "fp16"), ((16, M), "fp16"), ((M,), "fp32"), ((M,), "fp32")]),
        ("FusedGemmAScale", [((1, M, 16), "fp16"), ((M, 16, 16), "fp16"), ((1, M), "fp32")]),
        ("FusedAttentionBias", [((M, 4, M, 64), "fp16")] * 3 + [((M, 4, M, M), "fp16")]),
        ("FusedAttentionBias", [((M, 4, M, 64), "fp16")] * 3 + [((1, 4, 1, M), "fp16")]),
    ],
)
def test_a_one_that_makes_no_difference_may_be_dynamic(plugin, inputs):
    """One matrix, one row or one sequence: with nothing to broadcast over, it is the same."""
    case(plugin, inputs).check()


def test_sizes_that_stand_for_all_and_make_no_problem_are_a_reason():
    found = case("FusedAttentionBias", [((2, 4, 64, 64), "fp16")] * 3 + [((2, [4, 4, 4], 64, 64), "fp16")])
    found.check()
    assert "bias is (2, 5, 64, 64)" in found.refusal(AttentionConfig(64, 64), DEVICE)
