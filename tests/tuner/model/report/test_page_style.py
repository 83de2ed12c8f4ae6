"""The style sheet: of one piece, for light and dark, and with a colour for everything that asks for one."""

from __future__ import annotations

import re

from tilewright.kernels.registry import KERNELS
from tilewright.tuner.model.report.estimate import PROVENANCES
from tilewright.tuner.model.report.page_style import STYLE

BLOCK = re.compile(r":root \{(.*?)\}", re.DOTALL)


def test_it_fetches_nothing() -> None:
    assert not re.search(r"@import|url\(|https?:|expression|</", STYLE)


def test_braces_pair() -> None:
    depth = 0
    for sign in STYLE:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0


def test_light_and_dark_define_the_same_colours_and_all_that_are_used() -> None:
    light, dark = ({*re.findall(r"(--[\w-]+):", block)} for block in BLOCK.findall(STYLE))
    assert light == dark == {*re.findall(r"var\((--[\w-]+)\)", STYLE)}


def test_every_op_has_a_colour() -> None:
    for kind in (*(kernel.name for kernel in KERNELS), "other"):
        assert f".key i.{kind} " in STYLE
        assert f"--{kind}:" in STYLE


def test_evidence_has_a_colour_each() -> None:
    assert [name for name in PROVENANCES if f".badge.{name} " in STYLE] == ["measured", "transferred", "predicted"]
