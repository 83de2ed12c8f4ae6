"""Launches for a whole range of sizes: what is refused, and why."""

from __future__ import annotations

import pytest

from tests.kernels.tensorrt.cases import case
from tilewright.kernels import AttentionConfig, Conv2dConfig, GemmConfig, resolve_device
from tilewright.kernels.tensorrt.case import Profile
from tilewright.tuning_db.errors import UnsupportedError

DEVICE = resolve_device("rtx3090")
M = [1, 128, 1000]


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
