"""What calls say beside their arrays."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.kernels.options import factor, flag, integer
from tilewright.tuning_db.errors import UsageError


@pytest.mark.parametrize("value", [None, 1, 1.0, np.float32(1), np.int64(1)])
def test_a_factor_of_1_is_none(value):
    assert factor(value) is None


@pytest.mark.parametrize("value", [0.5, 2, np.float16(3), True, "1"])
def test_what_else_there_is_of_factors_is_left(value):
    assert factor(value) is value


@pytest.mark.parametrize(("value", "result"), [(None, None), (32, 32), (np.int64(32), 32)])
def test_integers(value, result):
    found = integer("size", value)
    assert (found, type(found)) == (result, type(result))


@pytest.mark.parametrize("value", [32.0, "32", True, np.float32(32)])
def test_what_is_no_integer(value):
    with pytest.raises(UsageError, match=r"^size=.* must be an integer$"):
        integer("size", value)


def test_flags():
    assert flag("causal", np.bool_(True)) is True
    for value in ("no", 1, None, np.ones(2, bool)):
        with pytest.raises(UsageError, match=r"^causal=.* must be True or False$"):
            flag("causal", value)
