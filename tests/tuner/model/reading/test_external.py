from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.tuner.model.files import node, proto, refusal, saved, value
from tests.tuner.model.graphs import normal, results
from tilewright.tuner.model.reading.read import read_model


def external(folder: Path, entries: dict[str, str], dims: Sequence[int] = (3,)) -> Path:
    weight = TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, text in entries.items():
        weight.external_data.add(key=key, value=text)
    return saved(proto([node("Add", "x w", "y")], tensors=[weight]), folder / "m.onnx")


def test_external_data_is_mapped(tmp_path: Path) -> None:
    array = normal(4, 3)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/w.bin").write_bytes(bytes(5) + array.tobytes() + bytes(7))  # at an odd place
    model = read_model(external(tmp_path, {"location": "parts/w.bin", "offset": "5", "length": "12"}))
    held = model.graph.initializers["w"].const_value
    assert held is not None
    np.testing.assert_array_equal(held.numpy(), array)
    assert not held.numpy().flags.owndata
    x = normal(5, 2, 3)
    np.testing.assert_array_equal(results(model, {"x": x})[0], x + array)


def test_external_data_without_a_length_goes_on_to_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(normal(4, 3).tobytes())
    assert read_model(external(tmp_path, {"location": "w.bin"})).graph.initializers["w"].const_value is not None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "names no file"),
        (
            {"location": "gone.bin"},
            r"'gone.bin' of tensor 'w' can't be opened \(No such file or directory\): put the file",
        ),
        ({"location": "../outside.bin"}, "is outside the model's folder"),
        ({"location": "folder/../../outside.bin"}, "is outside the model's folder"),
        ({"location": "/dev/zero"}, "is an absolute path"),
        ({"location": "C:\\w.bin"}, "is an absolute path"),
        ({"location": "link_out"}, "is outside the model's folder"),
        ({"location": "link_folder/outside.bin"}, "is outside the model's folder"),
        ({"location": "link_circle"}, "can't be opened"),
        ({"location": "folder"}, "is not a regular file"),
        ({"location": "pipe"}, "is not a regular file"),
        ({"location": "w\0.bin"}, "names no file"),
        ({"location": "x" * 5000}, "can't be opened"),
        ({"location": "w.bin", "offset": "4", "length": "12"}, "bytes 4 to 16 of 'w.bin', which has 12"),
        ({"location": "w.bin", "offset": "999999999999999999"}, "0 bytes of external data"),
        ({"location": "w.bin", "offset": "-4"}, "offset is '-4'"),
        ({"location": "w.bin", "offset": "9" * 100_000}, "offset is '999"),
        (
            {"location": "w.bin", "length": "8"},
            "8 bytes of external data in 'w.bin', but its dims .3. and type need 12",
        ),
        ({"location": "empty.bin"}, "0 bytes of external data"),
    ],
)
def test_external_data_that_is_not_there(entries: dict[str, str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "outside.bin").write_bytes(bytes(12))
    (folder / "w.bin").write_bytes(bytes(12))
    (folder / "empty.bin").touch()
    os.mkfifo(folder / "pipe")
    (folder / "link_out").symlink_to(tmp_path / "outside.bin")
    (folder / "link_folder").symlink_to(tmp_path)
    (folder / "link_circle").symlink_to(folder / "link_circle")
    line = refusal(external(folder, entries))
    assert re.search(message, line), line


def test_a_file_of_2_gb_that_is_missing(tmp_path: Path) -> None:
    line = refusal(external(tmp_path, {"location": "w.bin", "length": str(2**31)}, (2**29,)))
    assert "'w.bin' of tensor 'w' can't be opened" in line


def test_external_data_in_a_subgraph(tmp_path: Path) -> None:
    weight = TensorProto(name="w", dims=[3], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="/etc/passwd")
    inner = helper.make_graph([node("Add", "x w", "s")], "g", [], [value("s", (2, 3))], [weight])
    inputs = [value("x", (2, 3)), value("c", (), TensorProto.BOOL)]
    model = proto([node("If", "c", "y", then_branch=inner, else_branch=inner)], inputs=inputs)
    assert "tensor 'w', of a subgraph, function or attribute, is external" in refusal(saved(model, tmp_path / "m.onnx"))


def test_nothing_depends_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(12))
    external(tmp_path, {"location": "w.bin"})
    monkeypatch.chdir(tmp_path)
    assert "w" in read_model(Path("m.onnx")).graph.initializers
