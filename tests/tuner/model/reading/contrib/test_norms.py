"""Norms of ONNX Runtime, and standard operators for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tuner.model.contrib import assert_same, reason, runtime, standard, written
from tests.tuner.model.graphs import normal, relative_error, results
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.reading.read import read_model

VECTORS = {"g": normal(1, 8), "b": normal(2, 8), "c": normal(3, 8)}


def graph(call: str, results: str = "y", more: str = "") -> str:
    """A call of x, in a model whose outputs are y and, where there is one, the sum q."""
    outputs = ", ".join(f"float[2, 3, 8] {name}" for name in results.replace(",", " ").split())
    return f"(float[2, 3, 8] x, float[2, 3, 8] skip{more}) => ({outputs}) {{ {results} = {call} }}"


def feeds() -> dict[str, np.ndarray]:
    return {"x": normal(0, 2, 3, 8), "skip": normal(7, 2, 3, 8)}


@pytest.mark.parametrize(
    ("call", "results"),
    [
        ("com.microsoft.SkipLayerNormalization(x, skip, g, b, c)", "y, , , q"),
        ("com.microsoft.SkipLayerNormalization<epsilon: float = 1e-5>(x, skip, g, b)", "y"),
        ("com.microsoft.SkipLayerNormalization(x, skip, g)", "y"),
        ("com.microsoft.SkipSimplifiedLayerNormalization<epsilon: float = 1e-5>(x, skip, g, c)", "y, , , q"),
        ("com.microsoft.SkipSimplifiedLayerNormalization(x, skip, g)", "y"),
        ("SimplifiedLayerNormalization<epsilon: float = 0.1>(s, g)", "y"),
        ("SimplifiedLayerNormalization<axis: int = 2>(s, g)", "y"),
        ("LayerNormalization<epsilon: float = 0.1>(s, g, b)", "y"),
    ],
)
@pytest.mark.parametrize("opset", [14, 21])
def test_the_form_computes_what_the_operator_does(call: str, results: str, opset: int, tmp_path: Path) -> None:
    """Those among the standard operators come at opsets that have none of that name."""
    text = graph(call, results).replace("{", "{ s = Add(x, skip) ", 1)
    assert_same(written(text, opset, **VECTORS), feeds(), tmp_path)


def test_an_rms_norm_of_several_axes(tmp_path: Path) -> None:
    call = "SimplifiedLayerNormalization<axis: int = 1>(s, g)"
    text = graph(call).replace("{", "{ s = Add(x, skip) ", 1)
    assert_same(written(text, g=normal(1, 3, 8)), feeds(), tmp_path)


def test_statistics_of_a_layer_norm_are_given(tmp_path: Path) -> None:
    text = """(float[2, 3, 8] x, float[2, 3, 8] skip) => (float[2, 3, 8] y, float[2, 3, 1] m, float[2, 3, 1] i)
    { y, m, i = LayerNormalization<epsilon: float = 1e-5>(s, g, b) }""".replace("{", "{ s = Add(x, skip) ", 1)
    assert_same(written(text, 15, **VECTORS), feeds(), tmp_path)


def test_half_precision_is_normed_in_fp32(tmp_path: Path) -> None:
    """Squares of numbers above 256 pass the range of fp16."""
    text = """(float16[2, 8] x, float16[2, 8] skip) => (float16[2, 8] y)
    { y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon: float = 1e-5>(x, skip, g) }"""
    given = {name: (500 * array.reshape(-1)[:16].reshape(2, 8)).astype(np.float16) for name, array in feeds().items()}
    made = assert_same(written(text, g=normal(1, 8).astype(np.float16)), given, tmp_path, 2e-3)
    fuse(made)
    assert "FusedRmsNorm" in " ".join(node.op_type for node in made.graph)


def test_statistics_of_an_rms_norm_are_not(tmp_path: Path) -> None:
    text = "(float[2, 3, 8] x) => (float[2, 3, 8] y, float[2, 3, 1] i) { y, i = SimplifiedLayerNormalization(x, g) }"
    model = written(text, g=normal(1, 8))
    assert reason(model, tmp_path) == "its statistics are used"
    left = read_model(tmp_path / "m.onnx")
    assert [(node.domain, node.op_type) for node in left.graph] == [("", "SimplifiedLayerNormalization")]


@pytest.mark.parametrize("given", ["", "segments", "segments mask", "mask", "places"])
def test_embeddings(given: str, tmp_path: Path) -> None:
    inputs = ", ".join(["int32[2, 5] words", *(f"int32[2, 5] {name}" for name in given.split())])
    segments, mask, places = (name if name in given else "" for name in ("segments", "mask", "places"))
    table = "kinds" if segments else ""
    call = f"EmbedLayerNormalization(words, {segments}, table, lines, {table}, g, b, {mask}, {places})"
    text = f"({inputs}) => (float[2, 5, 8] y, int32[2] counts) {{ y, counts = com.microsoft.{call} }}"
    tables = {"table": normal(4, 30, 8), "lines": normal(5, 9, 8), "g": VECTORS["g"], "b": VECTORS["b"]}
    if segments:
        tables["kinds"] = normal(6, 2, 8)
    rng = np.random.default_rng(0)
    ranges = {"words": 30, "segments": 2, "mask": 2, "places": 9}
    rows = {name: rng.integers(0, ranges[name], (2, 5), dtype=np.int32) for name in ["words", *given.split()]}
    if "mask" in rows:  # padding is behind a sequence
        rows["mask"] = -np.sort(-rows["mask"], axis=1)
        rows["mask"][0, 0] = 2  # 1 alone lets through
    assert_same(written(text, **tables), rows, tmp_path)


def test_a_scalar_has_no_rms_norm(tmp_path: Path) -> None:
    text = "(float x) => (float y) { y = SimplifiedLayerNormalization<axis: int = 0>(x, g) }"
    assert reason(written(text, g=np.float32(1)), tmp_path) == "its input is a scalar"


def group_normed(x: np.ndarray, groups: int, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Of x (N, H, W, C), with SiLU."""
    n, h, w, c = x.shape
    apart = x.reshape(n, h, w, groups, c // groups).astype(np.float64)
    mean, variance = apart.mean((1, 2, 4), keepdims=True), apart.var((1, 2, 4), keepdims=True)
    normal = ((apart - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * scale + bias
    return np.asarray(normal / (1 + np.exp(-normal)))


@pytest.mark.parametrize("last", [1, 0])
def test_group_norms_are_as_documented(last: int, tmp_path: Path) -> None:
    """ONNX Runtime has no kernel for them on the CPU."""
    x, skip, table = normal(0, 2, 4, 4, 8), normal(4, 2, 4, 4, 8), normal(5, 2, 8)
    shape = "2, 4, 4, 8" if last else "2, 8, 4, 4"
    settings = f"<groups: int = 2, activation: int = 1, channels_last: int = {last}, epsilon: float = 1e-5>"
    text = f"""(float[{shape}] x, float[{shape}] skip, float[2, 8] table) =>
    (float[{shape}] y, float[{shape}] z, float[{shape}] sum, float[{shape}] t)
    {{ y = com.microsoft.GroupNorm{settings}(x, g, b)
       z, sum = com.microsoft.SkipGroupNorm{settings}(x, g, b, skip, c)
       t = com.microsoft.SkipGroupNorm{settings}(x, g, b, table) }}"""

    def placed(array: np.ndarray) -> np.ndarray:
        return array if last else np.ascontiguousarray(array.transpose(0, 3, 1, 2))

    made = standard(written(text, **VECTORS), tmp_path)
    found = results(made, {"x": placed(x), "skip": placed(skip), "table": table})
    total = x + skip + VECTORS["c"]
    wanted = [group_normed(each, 2, VECTORS["g"], VECTORS["b"]) for each in (x, total, x + table[:, None, None])]
    for got, right in zip(found, [wanted[0], wanted[1], total, wanted[2]], strict=True):
        assert relative_error(got, placed(right)) < 1e-5


def test_what_a_group_norm_does_not_know(tmp_path: Path) -> None:
    text = """(float[2, 4, 4, 8] x) => (float[2, 4, 4, 8] y)
    { y = com.microsoft.GroupNorm<groups: int = 2, activation: int = 5>(x, g, b) }"""
    assert reason(written(text, **VECTORS), tmp_path) == "its attributes are activation=5, groups=2, x is [2, 8, 4, 4]"


def test_the_models_of_these_tests_run_in_onnx_runtime() -> None:
    text = graph("com.microsoft.SkipLayerNormalization(x, skip, g, b, c)")
    assert runtime(written(text, **VECTORS), feeds())[0].shape == (2, 3, 8)
