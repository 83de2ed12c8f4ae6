"""The page on performance says what the result files say, and each file is what the benchmark writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import performance
from benchmarks.cases import FAMILIES
from benchmarks.comparison_report import geometric_mean
from benchmarks.gpu import summary
from tilewright.kernels.registry import find_kernel

FILES = sorted(performance.RESULTS.glob("*/gpu.json"))


def test_the_page_is_what_the_files_say() -> None:
    assert performance.PAGE.read_text() == performance.page(), "run `python -m benchmarks.performance`"


def test_asked_for_help_it_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(performance, "PAGE", tmp_path / "performance.md")
    result = CliRunner().invoke(performance.main, ["--help"])
    assert result.exit_code == 0
    assert "Writes docs/performance.md" in result.output
    assert not performance.PAGE.exists()
    assert CliRunner().invoke(performance.main, []).exit_code == 0
    assert performance.PAGE.read_text() == performance.page()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_a_result_file_is_whole_and_was_measured(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["simulated"] is False
    assert document["environment"]["gpu"] == document["device"]["name"]
    assert document["environment"]["revision"]
    assert document["families"] == [pytest.approx(entry) for entry in summary(document["cases"], document["left_out"])]
    assert {row["family"] for row in document["cases"]} <= {family.name for family in FAMILIES}
    for row in document["cases"]:
        problem = find_kernel(row["op"]).problem.from_dict(row["problem"])
        later = {name: value for name, value in problem.to_dict().items() if name in problem.ADDED}
        assert problem.to_dict() == {**later, **row["problem"]}


def test_a_rehearsal_makes_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "h200"
    folder.mkdir()
    (folder / "gpu.json").write_text(json.dumps({"simulated": True}))
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="is of a rehearsal"):
        performance.page()


README = (
    ("gemm, large", "| large {},"),
    ("gemm, small N and K", "small N and K {},"),
    ("gemm, M up to 64", "up to 64 rows {} |"),
    ("gemm, fp8", "| GEMM, fp8 | {} |"),
    ("gemm + swiglu, 4096 x 14336 x 4096", "SwiGLU {} and"),
    ("gemm + bias + gelu, 4096 x 14336 x 4096", "GELU {}, one case each"),
    ("gemm + bias + gelu, BERT and ViT up-projection", "BERT and ViT {} |"),
    ("conv2d, ResNet-50, batch 1", "| {} at batch 1,"),
    ("conv2d, ResNet-50, batch 32", "{} at batch 32;"),
    ("conv2d, depthwise", "| depthwise convolutions | {} |"),
    ("attention, prefill, d128, causal", "causal prefill {},"),
    ("attention, decode", "decode {} |"),
)


def test_the_readme_has_the_figures_of_the_file() -> None:
    document = json.loads((performance.RESULTS / "h200" / "gpu.json").read_text())
    families = {family["family"]: family for family in document["families"]}
    readme = " ".join((performance.ROOT / "README.md").read_text().split())
    for family, sentence in README:
        assert sentence.format(f"{families[family]['best_ratio']:.2f}") in readme, family
    weights = families["gemm, int4 weights, M = 1, against bf16 ones"]["ratio"]
    assert f"| GEMM, int4 weights at one row | {weights:.2f}, of" in readme
    fused = []
    for family in ("conv2d, ResNet-50, batch 1", "conv2d, ResNet-50, batch 32"):
        own = [case for case in document["cases"] if case["family"] == family]
        ratios = [case["ratio"] for case in own if "elementwise" not in case["against"]]
        fused.append(f"{geometric_mean(ratios):.2f}")
    assert f"{' and '.join(fused)} where cuDNN fuses too" in readme
    assert f"at revision {document['environment']['revision']}:" in readme
