"""Where an output lies, and what lies under it. Whole calls are in test_call.py."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.kernels.arrays import NOWHERE, View, kind_of
from tilewright.kernels.overlaps import alike, guards, refuse_self_overlap
from tilewright.tuning_db.errors import ProblemError, UnsupportedError

NAMES = ("x", "factor", "out", "extra")


def views_of(**arrays: np.ndarray) -> dict[str, View]:
    return {name: kind_of(array).view(array) for name, array in arrays.items()}


def check(out: np.ndarray, *, in_place: tuple[str, ...] = (), **arrays: np.ndarray) -> None:
    """As a call does with an output that is given."""
    views = views_of(**arrays, out=out)
    for guard in guards(NAMES, views, (out, None), in_place):
        guard.check(kind_of(out), (*arrays.values(), out), (out, None), [view.pointer for view in views.values()])


def test_arrays_are_alike_whatever_dimensions_of_one_index_they_have() -> None:
    y = np.ones((2, 3), np.float32)
    views = [kind_of(array).view(array) for array in (y, y[None], y[:, None], y.T, y[:1], y.view(np.int32))]
    assert [alike(views[0], view) for view in views] == [True, True, True, False, False, False]


def test_an_output_is_apart_from_what_it_does_not_replace() -> None:
    memory = np.ones((4, 6), np.float32)
    check(memory[:2], x=memory[2:])
    check(memory[:, :3], x=memory[:, 3:])  # each within the other's reach, and nowhere the same
    check(memory[:2], x=memory[:2], in_place=("x",))
    for x, in_place in ((memory[:2], ()), (memory[1:3], ("x",)), (memory[:2].T, ("x",)), (memory[1, 5:], ())):
        with pytest.raises(ProblemError, match=r"^out may not share memory with x$"):
            check(memory[:2], x=x, in_place=in_place)


def test_a_number_lies_nowhere() -> None:
    out = np.ones((2, 3), np.float32)
    views = views_of(x=np.ones(3, np.float32), out=out)
    views = {"x": views["x"], "factor": View(NOWHERE, (1,), (1,), "fp32", -1), "out": views["out"]}
    ((place, name, position, reach, others),) = guards(NAMES, views, (out, None), ())
    assert (place, name, position, reach) == (2, "out", 0, 24)
    assert others == ((0, "x", 12, False),)


@pytest.mark.parametrize(
    ("shape", "strides", "overlaps"),
    [
        ((2, 3), (3, 1), False),
        ((2, 3), (1, 2), False),
        ((2, 3), (4, 1), False),
        ((1, 3), (0, 1), False),
        ((2, 3), (2, 1), True),
        ((2, 3), (0, 1), True),
        ((2, 2), (1, 1), True),
    ],
)
def test_an_output_has_every_element_once(shape: tuple[int, ...], strides: tuple[int, ...], overlaps: bool) -> None:
    view = View(64, shape, strides, "fp16", 0)
    if overlaps:
        with pytest.raises(UnsupportedError, match=r"^out has strides .* for shape .*: it overlaps itself$"):
            refuse_self_overlap("out", view)
    else:
        refuse_self_overlap("out", view)
