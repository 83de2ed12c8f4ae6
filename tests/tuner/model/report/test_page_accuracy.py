"""The page's errors and precision: what is not met is said loudly, and random data is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.tuner.model.pages import Page
from tests.tuner.model.reports import sample
from tilewright.tuner.model.report.document import PrecisionPart
from tilewright.tuner.model.report.page_accuracy import errors_section, precision_section
from tilewright.tuner.model.verify.compare import Comparison
from tilewright.tuner.model.verify.error_sums import OutputError


def precision() -> PrecisionPart:
    part = sample().precision
    assert part is not None
    return part


def test_what_is_not_met_is_marked() -> None:
    met, missed = sample().errors
    assert "Within max=1e-05." in errors_section([met])
    assert "failed" not in errors_section([met])
    assert '<p class="note-box failed">y: top1=0.5, wanted at least 1</p>' in errors_section([missed])
    assert "Within" not in errors_section([missed])


def test_a_row_for_every_output_its_logits_and_every_layer() -> None:
    page = Page(errors_section(sample().errors[:1]))
    assert [row[0] for row in page.rows] == ["output", "y", "r2", "value", "r0", "r1", "r2"]
    assert page.rows[2][1] == "logits of y"


def test_numbers_that_are_none_are_red_and_the_unknown_is_a_dash() -> None:
    row = OutputError("y", "y", False, False, None, None, 0.0, None, None, None, 3, 4)
    part = replace(sample().errors[0], comparison=Comparison(1, (row,), ()))
    markup = errors_section([part])
    assert '<span class="bad">3 / 4</span>' in markup
    assert Page(markup).rows[1] == ["y", "", "–", "–", "0", "–", "–", "–", "3 / 4"]


def test_infinities_that_the_original_has_are_not_red() -> None:
    row = OutputError("y", "y", False, True, 0.0, 0.0, 0.0, 1.0, None, None, 3, 0)
    part = replace(sample().errors[0], comparison=Comparison(1, (row,), ()))
    assert 'class="bad"' not in errors_section([part])
    assert Page(errors_section([part])).rows[1][-1] == "3 / 0"


def test_the_page_says_what_agreement_is_judged_of() -> None:
    ids = OutputError("ids", "ids", False, False, None, None, 700.0, None, None, 0.75, 0, 0, discrete=True)
    other = OutputError("h", "h", False, False, 0.1, 0.1, 0.1, 1.0, 9.0, 0.5, 0, 0, judged=False, constant=True)
    part = replace(sample().errors[0], budget="top1=0.7", comparison=Comparison(1, (ids, other), ()))
    markup = errors_section([part])
    assert "Within top1=0.7; top-1 is judged of ids." in markup
    assert [row[1] for row in Page(markup).rows[1:]] == ["integers", "the same for every input"]


def test_random_data_is_warned_of() -> None:
    random, given = sample().errors
    assert "Random inputs: real ones may give other errors" in errors_section([random])
    assert "Random inputs" not in errors_section([given])
    assert "Calibrated on random numbers." in precision_section(precision())
    calibration = precision().calibration
    assert calibration is not None
    from_file = replace(precision(), calibration=replace(calibration, origin="data.npz"))
    assert "Calibrated on random numbers." not in precision_section(from_file)


def test_weights_that_were_rounded_have_no_scales_of_activations() -> None:
    calibration = precision().calibration
    assert calibration is not None
    part = replace(precision(), calibration=replace(calibration, methods=("rounding",), samples=32))
    assert "<p>Weights rounded by what 32 samples (random) multiply them by.</p>" in precision_section(part)
    assert "Calibrated on random numbers." in precision_section(part)


def test_plans_that_were_weighed() -> None:
    page = Page(precision_section(precision()))
    marks = [attributes["class"] for tag, attributes in page.elements if tag == "circle"]
    assert marks == ["mark other hollow", "mark chosen"]
    assert ["33.0 µs predicted", "0.0031", "1", "chosen"] in page.rows
    assert "<svg" not in precision_section(replace(precision(), pareto=()))


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_layers_are_counted_by_precision(kind: str) -> None:
    part = precision()
    first = replace(part.layers[0], kind=kind)
    markup = precision_section(replace(part, layers=(first, *part.layers[1:])))
    assert ("Layers: 1 in fp32, 2 in int8" if kind == "fp32" else "Layers: 3 in int8") in markup


def test_without_any_there_is_no_section() -> None:
    assert precision_section(None) == ""
    assert errors_section([]) == ""
