from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.replay_tables import load, shipped
from tests.benchmarks.tables import AXES, BEST, arrays, save
from tilewright.tuning_db.errors import UsageError

GOOD = arrays()


def changed(name: str, place: Any, value: Any) -> dict[str, Any]:
    """One array of the good file with one element replaced."""
    array = GOOD[name].copy()
    array[place] = value
    return {name: array}


def dom(**domains: Any) -> dict[str, Any]:
    return {"dom": np.array(json.dumps({**AXES, **domains}))}


def test_a_table_is_what_the_file_says(tmp_path: Path) -> None:
    table = load(save(tmp_path / "toy__RTX_2080_Ti.npz"))
    assert (table.name, table.kernel, table.gpu, table.chip) == ("toy__RTX_2080_Ti", "toy", "RTX_2080_Ti", "TU102")
    assert table.axes == {name: tuple(values) for name, values in AXES.items()}
    assert len(table.configs) == len(table.times) == len(table.repeats) == 50
    row = int(np.nanargmin(table.times))
    assert (table.configs[row].width, table.configs[row].depth, table.configs[row].layout) == BEST
    assert len(set(table.configs)) == 50
    assert table.best == 10.0


def test_a_fraction_is_of_the_optimum_and_0_for_a_failure(tmp_path: Path) -> None:
    table = load(save(tmp_path / "toy__A.npz"))
    assert table.fraction(int(np.nanargmin(table.times))) == 1.0
    assert table.fraction(int(np.flatnonzero(table.times == 16.0)[0])) == 0.625
    assert table.fraction(int(np.flatnonzero(np.isnan(table.times))[0])) == 0.0


def test_a_gpu_that_shares_its_chip_with_no_other_is_its_own_chip(tmp_path: Path) -> None:
    assert load(save(tmp_path / "toy__A100.npz")).chip == "A100"


def test_values_may_be_a_list_in_the_order_of_the_names(tmp_path: Path) -> None:
    table = load(save(tmp_path / "toy__A.npz", dom=np.array(json.dumps(list(AXES.values())))))
    assert table.axes == {name: tuple(values) for name, values in AXES.items()}


def test_tables_of_one_kernel_that_are_shipped_have_the_same_axes() -> None:
    tables = [load(path) for path in shipped()]
    assert len(tables) == 10
    axes: dict[str, Any] = {}
    for table in tables:
        assert axes.setdefault(table.kernel, table.axes) == table.axes
    assert set(axes) == {"convolution", "convolution_milo", "dedispersion_milo", "gemm", "pnpoly"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"X": None, "dom": None}, "it lacks X, dom"),
        ({"X": GOOD["X"].astype(float)}, "X must hold indices; it holds float64"),
        ({"X": GOOD["X"][:, :2]}, r"X of shape \(50, 2\) doesn't go with 50 times"),
        ({"X": GOOD["X"][:40]}, r"X of shape \(40, 3\) doesn't go with 50 times"),
        ({"X": GOOD["X"].ravel()}, r"X of shape \(150,\) doesn't go with"),
        (changed("X", (7, 1), 5), r"parameters of \[6, 5, 2\] values"),
        (changed("X", (7, 1), -1), r"parameters of \[6, 5, 2\] values"),
        (changed("X", 7, GOOD["X"][8]), "a configuration twice"),
        ({"X": GOOD["X"].astype(object)}, "no replayed space"),
        ({"names": np.array(["width", "depth"])}, r"X of shape \(50, 3\) doesn't go with .* parameters of \[6, 5\]"),
        (
            {"names": np.array(["width", "depth"]), "dom": np.array("[[1], [2], [3]]")},
            "values for each of width, depth;",
        ),
        ({"names": np.array(["width", "depth", "lay-out"])}, "'lay-out' must be an identifier"),
        ({"names": np.array(["width", "depth", "class"])}, "'class' must be an identifier"),
        ({"names": np.array(["width", "depth", "depth"])}, "'depth' must be an identifier of its own"),
        ({"names": np.array(["width", "depth", "shape"])}, "values of its parameters can't be read: KeyError"),
        ({"dom": np.array("{width")}, "values of its parameters can't be read"),
        ({"dom": np.array("3")}, "values of its parameters can't be read"),
        (dom(depth=5), "dom must list different values"),
        (dom(layout="rc"), "dom must list different values"),
        (dom(layout=["row", "row"]), "dom must list different values"),
        (dom(layout=[["row"], ["column"]]), "values of its parameters can't be read"),
        ({"dom": np.array("[[1, 2], [3]]")}, "dom must list different values"),
        ({"time": np.array(["fast"] * 50)}, "times must be numbers"),
        ({"time": GOOD["time"][:, None]}, "doesn't go with time of shape"),
        ({"times": GOOD["times"][:, 0]}, r"times of shape \(50,\) doesn't go with time of shape \(50,\)"),
        ({"times": GOOD["times"][:49]}, r"times of shape \(49, 8\) doesn't go with"),
        (changed("time", 3, 0.0), "time must be above 0, or NaN for a failure; it has 0.0"),
        (changed("time", 3, np.inf), "time must be above 0, or NaN for a failure; it has inf"),
        (changed("times", (3, 1), -1.0), "times must be above 0, or NaN for a failure; it has -1.0"),
        ({"time": np.full(50, np.nan)}, "no configuration that worked"),
    ],
)
def test_a_file_with_other_content_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = save(tmp_path / "toy__A.npz", **changes)
    with pytest.raises(UsageError, match=said) as raised:
        load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def truncated(path: Path) -> None:
    path.write_bytes(save(path).read_bytes()[:-200])


def damaged(path: Path) -> None:
    np.savez_compressed(path, **GOOD)
    content = bytearray(path.read_bytes())
    for place in range(100, 140):
        content[place] ^= 0xFF
    path.write_bytes(content)


def a_single_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, GOOD["X"])


@pytest.mark.parametrize(
    "make",
    [
        truncated,
        damaged,
        a_single_array,
        lambda path: path.write_text("not an archive\n"),
        lambda path: path.write_bytes(b""),
        lambda path: path.mkdir(),
        lambda path: None,
    ],
    ids=["truncated", "damaged", "array", "text", "empty", "folder", "absent"],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "toy__A.npz"
    make(path)
    with pytest.raises(UsageError, match="is no replayed space") as raised:
        load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
