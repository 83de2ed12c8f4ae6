"""The folder's README: its lines load the model, and names out of the file can't break it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.tuner.model.graphs import normal
from tests.tuner.model.reports import changed, sample
from tilewright.tuner.model.report.document import TensorPart
from tilewright.tuner.model.report.readme import (
    engine_lines,
    inlined_lines,
    onnxruntime_lines,
    readme,
    tensorrt_lines,
    write_readme,
)

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_three_lines_load_and_run_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ir.save(changed(), tmp_path / "model.int8.onnx")
    (code, _, _) = BLOCK.findall(readme(sample()))
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"feeds": {"x": normal(0, 64, 256)}}
    exec(code, names)
    assert names["outputs"][0].shape == (64, 256)
    assert np.allclose(names["outputs"][0].sum(axis=-1), 1.0, atol=1e-5)


def test_the_engine_has_its_lines_only_where_there_is_one() -> None:
    report = sample()
    assert 'plugins.Runner("model.engine")' in readme(report)
    without = replace(report, artefacts=report.artefacts[:2])
    assert "TensorRT, on" not in readme(without)
    (_, build, _) = BLOCK.findall(readme(without))
    assert build.endswith('plugins.build_engine("model.int8.onnx", "model.int8.engine")\n')
    assert "`autotune import`" in readme(without)
    assert "build_engine" not in readme(report)


def test_the_lines_that_inline_functions_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ir.save(changed(), tmp_path / "model.int8.onnx")
    monkeypatch.chdir(tmp_path)
    exec(BLOCK.findall(readme(sample()))[-1], {})
    inlined = onnx.load("model.int8.inlined.onnx")
    assert not inlined.functions
    assert not any(node.op_type.startswith("Fused") for node in inlined.graph.node)


def test_the_engine_s_lines_are_python_and_name_what_there_is() -> None:
    import tilewright.kernels.tensorrt as plugins

    lines = tensorrt_lines("model.engine")
    compile("\n".join(lines), "README", "exec")
    assert callable(plugins.Runner)


def test_a_run_that_wrote_nothing() -> None:
    text = readme(sample(plain=True))
    assert "```" not in text
    assert "feeds" not in text


def test_times_are_called_what_they_are() -> None:
    text = readme(sample())
    assert re.search(r"Time of one run: [\d.]+ µs before \(predicted\), [\d.]+ µs after \(predicted\)", text)
    assert "never ran: measure before you rely on it" in text
    report = sample()
    measured = replace(report.estimate.before, provenance="measured")
    report = replace(report, estimate=replace(report.estimate, before=measured, after=measured))
    assert "never ran" not in readme(report)


def test_warnings_are_told_and_their_names_stay_code() -> None:
    assert "Warning" not in readme(sample())
    text = readme(replace(sample(), warnings=("'a`\n# b': input with a value",)))
    assert "\nWarning: ``'a`\\n# b': input with a value``\n" in text


@pytest.mark.parametrize(
    "name",
    ["a|b", "`", "``", "a```\n# Heading", "<img src=x onerror=alert(1)>", "](http://x)", "\u202eabc", "\x00", "\ud800"],
)
def test_names_stay_in_their_cell(name: str) -> None:
    report = sample()
    report = replace(report, model=replace(report.model, name=name, inputs=(TensorPart(name, "fp32", (1, 2)),)))
    text = readme(report)
    text.encode("utf-8")
    (row,) = [line for line in text.splitlines() if line.endswith("| fp32 | 1 × 2 |")]
    cell = row.split(" | ")[0].removeprefix("| ")
    fence = re.match("`+", cell)
    assert fence is not None
    inside = cell[len(fence[0]) : -len(fence[0])]
    # Code from the first fence to the last: nothing in between ends it, and no cell does.
    assert fence[0] not in re.findall("`+", inside)
    assert "|" not in inside
    assert "\n#" not in text[2:]
    assert cell.isascii()


def test_file_names_are_python_texts() -> None:
    compile("\n".join([*engine_lines('a"b\\c.onnx'), *inlined_lines('a"b\\c.onnx')]), "README", "exec")
    for lines in (onnxruntime_lines('a"b\\c.onnx'), tensorrt_lines('a"b\\c.onnx')):
        compile("\n".join(lines), "README", "exec")
        assert eval(lines[1].partition("(")[2].removesuffix(")")) == 'a"b\\c.onnx'


def test_it_is_written_whole(tmp_path: Path) -> None:
    write_readme(sample(), tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == readme(sample())
