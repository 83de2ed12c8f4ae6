"""Numbers that are compiled in: every one has limits, and what is within them is taken."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tilewright.kernels import KERNELS
from tilewright.kernels.constants import LIMITS, checked_constant
from tilewright.tuning_db.errors import UsageError


def test_every_constant_of_every_op_has_limits() -> None:
    taken = {name for kernel in KERNELS for _, problem, _ in kernel.feature_cases for name in kernel.constants(problem)}
    assert taken == set(LIMITS)


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_themselves_are_taken_and_nothing_beyond(name: str) -> None:
    limits = LIMITS[name]
    for value in (limits.least, limits.most, 1, Fraction(1, 3), np.float32(0.5)):
        assert checked_constant(name, value) == float(value)
    for value in (math.nextafter(limits.least, -math.inf), math.nextafter(limits.most, math.inf), math.nan, 10**400):
        with pytest.raises(UsageError, match=rf"^{name.lower()}=.* must be .* of fp32"):
            checked_constant(name.lower(), value)
    for word in ("1", True, np.True_):
        with pytest.raises(UsageError, match=f"^{name.lower()}={word!r} must be "):
            checked_constant(name, word)


def test_eps_is_0_or_what_a_gpu_does_not_take_for_it() -> None:
    assert checked_constant("eps", 0) == checked_constant("eps", -0.0) == checked_constant("eps", np.float32(0)) == 0
    for value in (1e-38, np.float32(1e-40), 5e-324, Fraction(1, 10**400)):
        with pytest.raises(UsageError, match=r"^eps=.* must be .* of fp32: 0, or from 1\.18e-38 up$"):
            checked_constant("eps", value)


@pytest.mark.parametrize("name", ["SCALE", "SOFTCAP"])
def test_what_attention_multiplies_by_log2_e_stays_in_fp32(name: str) -> None:
    assert np.isfinite(np.float32(LIMITS[name].most * math.log2(math.e)))
