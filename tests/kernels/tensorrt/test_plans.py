"""Launch plans, and files of them."""

from __future__ import annotations

import json

import pytest

from tilewright.kernels.tensorrt.expressions import ceil_div, dimension
from tilewright.kernels.tensorrt.plans import LaunchPlan
from tilewright.tuning_db.errors import UsageError

M = dimension("a", 0)
PLAN = LaunchPlan(
    "k",
    ".version 8.7",
    (ceil_div(M, 64) * 12, 1, 1),
    128,
    36864,
    ("a", "b"),
    (("M", M), ("N", 768)),
    ("out",),
    {"arch": 86},
)


def test_a_plan_at_a_size():
    assert PLAN.grid_at({("a", 0): 100}) == (24, 1, 1)
    assert PLAN.scalars_at({("a", 0): 100}) == (100, 768)


def test_a_file_holds_a_plan():
    assert LaunchPlan.from_json(PLAN.to_json()) == PLAN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this is no launch plan: JSONDecodeError"),
        ("[]", "this is no launch plan: TypeError"),
        ("[" * 100_000, "this is no launch plan: ValueError"),
        ("{}", "this is no launch plan: KeyError: 'format'"),
        (json.dumps({**json.loads(PLAN.to_json()), "format": "x"}), "of format 'x', not 'tilewright launch plan 1'"),
        (json.dumps({**json.loads(PLAN.to_json()), "grid": [1]}), "this is no launch plan: ValueError"),
    ],
)
def test_other_files_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        LaunchPlan.from_json(text)
