"""The plugins by name, and their attributes."""

from __future__ import annotations

import pytest

from tilewright.kernels.tensorrt import plugin_attributes, plugin_name, plugins
from tilewright.kernels.tensorrt.catalogue import find_plugin
from tilewright.tuning_db.errors import UsageError


def test_names():
    assert len(plugins()) == 48 + 32 + 32 + 8
    assert all(find_plugin(name).name == name for name in plugins())
    assert plugin_name("gemm") == "FusedGemm"
    assert plugin_name("gemm", "residual", "bias") == "FusedGemmBiasResidual"
    assert plugin_name("attention", "q_scale", "k_scale", "v_scale") == "FusedAttentionScales"
    with pytest.raises(UsageError, match=r"there is no plugin 'FusedGemmBais'; did you mean FusedGemmBias\?"):
        find_plugin("FusedGemmBais")
    with pytest.raises(UsageError, match="there are no plugins of 'relu'; there are of gemm, conv2d"):
        plugin_name("relu")
    with pytest.raises(UsageError, match="no plugin of gemm takes b_zero: the optional inputs are a_scale, b_scale"):
        plugin_name("gemm", "b_zero")


def test_attributes():
    found = plugin_attributes("FusedRmsNorm", eps=1e-5)
    assert found == {"eps": 1e-5, "weight_offset": 0.0, "out_dtype": "default"}
    assert plugin_attributes("FusedAttention", scale=2)["scale"] == 2.0
    for name in plugins():
        assert set(map(type, plugin_attributes(name).values())) <= {int, float, str}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"activate": "relu"}, "FusedGemm has no attribute 'activate'; it has activation, residual_last, gated"),
        ({"activation": 3}, "FusedGemm: activation=3 must be str, not int"),
        ({"trans_a": 1.0}, "FusedGemm: trans_a=1.0 must be int, not float"),
        ({"trans_a": True}, "FusedGemm: trans_a=True must be int, not bool"),
    ],
)
def test_wrong_attributes(given, message):
    with pytest.raises(UsageError, match=message):
        plugin_attributes("FusedGemm", **given)


def test_an_integer_past_every_float_is_told():
    with pytest.raises(UsageError, match=r"^FusedRmsNorm: eps is an integer of 1329 bits and must be a float, at"):
        plugin_attributes("FusedRmsNorm", eps=10**400)
