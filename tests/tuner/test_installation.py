from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tuner.commands.test_exchange import DEVICE, PROBLEM, record
from tilewright import tuning_db
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import prediction_protocol
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.registry import find_kernel
from tilewright.tuner.installation import (
    default_text,
    is_answerable,
    is_current,
    is_of_this_code,
    objection,
    present_form,
)
from tilewright.tuning_db.record import Provenance, Resources, Status, canonical_json
from tilewright.tuning_db.rows import row_to_record
from tilewright.tuning_db.shipped_records import open_shipped
from tilewright.tuning_db.upkeep import Revision

RECORD = record(3.0)
CURRENT = Revision("gemm", RECORD.key.kernel_hash, RECORD.key.triton, RECORD.key.ptxas, RECORD.key.protocol)


def test_what_a_search_asks_for_is_current() -> None:
    assert is_current(CURRENT, DEVICE.arch)
    assert is_current(replace(CURRENT, protocol=prediction_protocol(GEMM)), DEVICE.arch)


@pytest.mark.parametrize("name", ["op", "kernel_hash", "triton", "ptxas", "protocol"])
def test_anything_else_is_not(name: str) -> None:
    assert not is_current(replace(CURRENT, **{name: "another"}), DEVICE.arch)
    assert not is_current(replace(CURRENT, op="conv2d"), DEVICE.arch)


def test_a_record_of_these_kernels_must_be_one_of_theirs() -> None:
    key = RECORD.key
    assert objection(RECORD) is None
    assert "GemmProblem has no field 'm'" in str(objection(replace(RECORD, key=replace(key, problem='{"m":1}'))))
    assert "GemmConfig is missing" in str(objection(replace(RECORD, config="{}")))
    short = '{"K":128,"M":64,"N":64}'
    assert f"problem={short} is not written out" in str(objection(replace(RECORD, key=replace(key, problem=short))))


def test_an_activation_that_there_is_not_is_objected_to() -> None:
    problem = PROBLEM.to_json().replace('"activation":"none"', '"activation":"foo"')
    assert problem != PROBLEM.to_json()
    assert "unknown activation 'foo'" in str(objection(replace(RECORD, key=replace(RECORD.key, problem=problem))))
    assert default_text("gemm", problem, DEVICE) is None


def test_what_is_ok_must_be_an_answer() -> None:
    spilling = replace(RECORD, resources=Resources(255, 8, 8, 0))
    for outcome, reason in (
        (spilling, "status=ok can't be answered: 8 B a thread spill"),
        (replace(RECORD, resources=None), "status=ok can't be answered: it has no resources"),
    ):
        assert not is_answerable(outcome)
        assert objection(outcome) == reason
        assert objection(replace(outcome, status=Status.OUT_OF_RESOURCES, times=None)) is None
    assert is_answerable(RECORD)


def test_a_record_of_a_known_board_has_its_arch() -> None:
    """Another board's lookup, which goes by the arch, would answer it."""
    for changes in ({}, {"kernel_hash": "of old"}, {"op": "unheard of"}):
        key = replace(RECORD.key, arch=90, **changes)
        assert objection(replace(RECORD, key=key)) == "arch=90 must be 86, as rtx3090-82sm is"
        assert objection(replace(RECORD, key=replace(key, device="rtx3090-8sm"))) is not None  # a slice of it
        assert objection(replace(RECORD, key=replace(key, device="unheard-of-82sm"))) is None


def test_what_is_measured_was_timed_and_what_is_predicted_was_not() -> None:
    guessed = replace(RECORD, provenance=Provenance.PREDICTED)
    by_model = replace(RECORD.key, protocol=prediction_protocol(GEMM))
    assert objection(replace(guessed, key=by_model)) is None
    said = f"provenance=measured must be predicted, as protocol={by_model.protocol} is"
    assert objection(replace(RECORD, key=by_model)) == said
    assert objection(guessed) == "provenance=predicted must be measured, as protocol=cold-l2-2 is"
    of_old = replace(RECORD.key, protocol="roofline-1-0123abcd", kernel_hash="of old")
    assert str(objection(replace(RECORD, key=of_old))).startswith("provenance=measured must be predicted")
    unheard = replace(RECORD.key, protocol="another")
    assert objection(replace(RECORD, key=unheard)) is objection(replace(guessed, key=unheard)) is None


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"num_warps": 1 << 40}, "num_warps=1099511627776 is over the 32 of a block"),
        ({"BLOCK_M": 3}, "BLOCK_M=3 must be a power of two"),
        ({"BLOCK_M": 1 << 40}, "registers a thread for its part of the tile are over the"),
        ({"BLOCK_M": 0}, "BLOCK_M=0 must be an integer of at least 1"),
    ],
)
def test_what_is_ok_can_run_on_its_board(changes: dict[str, int], limit: str) -> None:
    fields = GemmConfig.from_json(RECORD.config).to_dict() | changes
    impossible = replace(RECORD, config=canonical_json(fields))
    reason = str(objection(impossible))
    assert reason.startswith("status=ok can't be of rtx3090-82sm: ")
    assert limit in reason
    # What was tried and failed may have been anything, and so may what ran on a board that nobody here knows.
    assert objection(replace(impossible, status=Status.INVALID, times=None)) is None
    assert objection(replace(impossible, key=replace(RECORD.key, device="unheard-of-82sm"))) is None
    assert objection(replace(impossible, key=replace(RECORD.key, kernel_hash="of old"))) is None


def test_what_a_search_tries_may_have_run_before_the_limits_were_what_they_are() -> None:
    axes = GEMM.space.axes
    large = GemmConfig.from_json(RECORD.config).to_dict() | {
        name: max(axes[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_stages")
    }
    problem, config = GEMM.problem.from_json(RECORD.key.problem), GemmConfig(**large)
    assert GEMM.space.fits(problem, config, resolve_device("rtx3090")) is not None
    assert objection(replace(RECORD, config=config.to_json())) is None


def test_no_record_that_is_shipped_is_refused() -> None:
    """Those of the present revision and those of earlier ones, had they been of this one."""
    (path,) = (Path(tuning_db.__file__).parent / "shipped").glob("*.sqlite")
    with closing(open_shipped(path)) as file:
        shipped = [row_to_record(row) for row in file.rows("SELECT * FROM records")]
    assert shipped
    for each in shipped:
        assert objection(each) is None
        kernel = find_kernel(each.key.op)
        config = kernel.space.config.from_json(each.config)
        assert kernel.space.fits(kernel.problem.from_json(each.key.problem), config, resolve_device("h200")) is None


def test_a_record_of_others_may_be_anything() -> None:
    for changes in ({"kernel_hash": "of old"}, {"op": "unheard of"}):
        assert objection(replace(RECORD, key=replace(RECORD.key, **changes), config="{}")) is None


def test_what_any_toolchain_may_answer_as_measured_is_of_this_code() -> None:
    assert is_of_this_code(replace(CURRENT, triton="another", ptxas="another"))
    for name in ("op", "kernel_hash", "protocol"):
        assert not is_of_this_code(replace(CURRENT, **{name: "another"}))
    assert not is_of_this_code(replace(CURRENT, protocol=prediction_protocol(GEMM)))


def test_the_default_of_a_problem_on_record() -> None:
    assert default_text("gemm", PROBLEM.to_json(), DEVICE) == GEMM.default(PROBLEM, DEVICE).to_json()
    assert default_text("gemm", '{"of":"old"}', DEVICE) is None
    assert default_text("unheard of", PROBLEM.to_json(), DEVICE) is None


def test_a_configuration_of_an_earlier_revision_gets_the_fields_it_lacks() -> None:
    config = GemmConfig(64, 64, 32)
    fields = config.to_dict()
    assert present_form("gemm", config.to_json()) == config.to_json()
    assert fields.pop("SPLIT_K") == 1
    assert present_form("gemm", canonical_json(fields)) == config.to_json()
    for text in ("[]", "no JSON"):
        assert present_form("gemm", text) == text
    assert present_form("unheard of", "{}") == "{}"
