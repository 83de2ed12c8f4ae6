"""Masks of attention: constant ones become causal or a window, all others one bias of the least shape."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.tuner.model.fuse.forms import (
    LEAST,
    SCALE,
    B,
    D,
    Graph,
    H,
    S,
    attend,
    fused,
    heads,
    only_fused,
    operators,
    scores,
    triangle,
    turned,
)
from tilewright.tuner.model.fuse.masks import _parts
from tilewright.tuner.model.fuse.scores import Mask
from tilewright.tuner.model.graph import constant, fused_nodes, plugin_inputs, plugin_settings, static_shape


def added_constant(g: Graph) -> str:
    mask = np.where(np.random.default_rng(1).random((B, 1, 1, S)) < 0.4, np.float32(LEAST), 0)
    mask[..., 0] = 0
    return attend(g, g("Add", scores(g), g.array(mask)))


def added_first(g: Graph) -> str:
    return attend(g, g("Add", g.input("mask", 1, H, S, S), scores(g)))


def padding_as_in_bert(g: Graph) -> str:
    """(1 - mask) · finfo.min, of a mask of the model's inputs."""
    mask = g("Cast", g("Unsqueeze", g.input("mask", B, S, dtype="bool"), g.shape(1, 2)), to=1)
    return attend(g, g("Add", scores(g), g("Mul", g("Sub", g.array(1.0), mask), g.array(-1e9))))


def hidden_where_false(g: Graph) -> str:
    return attend(g, g("Where", g.input("mask", B, 1, S, S, dtype="bool"), scores(g), g.array(LEAST)))


def hidden_where_true(g: Graph) -> str:
    return attend(g, g("Where", g.input("mask", S, S, dtype="bool"), g.array(-1e9), scores(g)))


def hidden_before_the_scale(g: Graph) -> str:
    product = g("MatMul", heads(g, "q"), turned(g, heads(g, "k")))
    masked = g("Where", g.input("mask", B, 1, 1, S, dtype="bool"), product, g.array(-1e30))
    return attend(g, g("Div", masked, g.array(math.sqrt(D))))


def added_before_the_scale(g: Graph) -> str:
    product = g("MatMul", heads(g, "q"), turned(g, heads(g, "k")))
    return attend(g, g("Mul", g("Add", product, g.input("mask", B, 1, 1, S)), g.array(SCALE)))


def subtracted(g: Graph) -> str:
    return attend(g, g("Sub", scores(g), g.input("mask", B, H, 1, S)))


def two_masks(g: Graph) -> str:
    """T5: a position's bias, and padding."""
    with_bias = g("Add", scores(g), g.input("position", 1, H, S, S))
    return attend(g, g("Add", with_bias, g.input("mask", B, 1, 1, S)))


def added_and_hidden(g: Graph) -> str:
    with_bias = g("Add", scores(g), g.input("position", H, S, S))
    return attend(g, g("Where", g.input("mask", B, 1, 1, S, dtype="bool"), with_bias, g.array(LEAST)))


def expanded_mask(g: Graph) -> str:
    mask = g("Expand", g("Unsqueeze", g.input("mask", B, S), g.shape(1, 2)), g.shape(B, 1, S, S))
    return attend(g, g("Add", scores(g), mask))


def floored(g: Graph) -> str:
    """OPT."""
    return attend(g, g("Max", g("Add", scores(g), g.input("mask", B, 1, S, S)), g.array(LEAST)))


def guarded_by_the_mask(g: Graph) -> str:
    """DeBERTa: hidden weights are set to 0 once more."""
    mask = g("Not", g.input("mask", B, 1, S, S, dtype="bool"))
    weights = g("Softmax", g("Where", mask, g.array(LEAST), scores(g)), axis=-1)
    return g("MatMul", g("Where", mask, g.array(0.0), weights), heads(g, "v"))


def windows_in_five_dimensions(g: Graph) -> str:
    """Swin: B is images times windows; a bias of places, and a mask of each window."""
    with_bias = g("Add", scores(g), g.array(np.random.default_rng(0).standard_normal((1, H, S, S))))
    mask = np.where(np.random.default_rng(1).random((1, 2, 1, S, S)) < 0.4, np.float32(-100), 0)
    masked = g.reshape(g("Add", g.reshape(with_bias, B // 2, 2, H, S, S), g.array(mask)), B, H, S, S)
    return attend(g, masked)


def decomposed_positions(g: Graph) -> str:
    """ViTDet and SAM: rows and columns of the keys' places each have a bias."""
    raw = g.reshape(scores(g), B * H, 2, 3, 2, 3)
    rows = g("Unsqueeze", g.input("rows", B * H, 2, 3, 2), g.shape(4))
    columns = g("Unsqueeze", g.input("columns", B * H, 2, 3, 3), g.shape(3))
    return attend(g, g.reshape(g("Add", g("Add", raw, rows), columns), B, H, S, S))


def one_number_for_all(g: Graph) -> str:
    return attend(g, g("Add", scores(g), g.input("shift", B, 1, S, 1)))


def three_dimensions_with_a_mask_in_four(g: Graph) -> str:
    q, k, v = (g.reshape(heads(g, name), B * H, S, D) for name in "qkv")
    product = g.reshape(g("MatMul", g("Mul", q, g.array(SCALE)), g.transpose(k, 0, 2, 1)), B, H, S, S)
    masked = g.reshape(g("Add", product, g.input("mask", B, 1, S, S)), B * H, S, S)
    return g.reshape(g("MatMul", g("Softmax", masked, axis=-1), v), B, H, S, D)


MASKED = {
    added_constant: (B, 1, 1, S),
    added_first: (1, H, S, S),
    padding_as_in_bert: (B, 1, 1, S),
    hidden_where_false: (B, 1, S, S),
    hidden_where_true: (1, 1, S, S),
    hidden_before_the_scale: (B, 1, 1, S),
    added_before_the_scale: (B, 1, 1, S),
    subtracted: (B, H, 1, S),
    two_masks: (B, H, S, S),
    added_and_hidden: (B, H, S, S),
    expanded_mask: (B, 1, 1, S),
    floored: (B, 1, S, S),
    guarded_by_the_mask: (B, 1, S, S),
    windows_in_five_dimensions: (B, H, S, S),
    decomposed_positions: (B, H, S, S),
    three_dimensions_with_a_mask_in_four: (B, 1, S, S),
    one_number_for_all: None,
}
"""Forms with a mask: the shape of the bias, None where there is none."""


@pytest.mark.parametrize("form", MASKED, ids=lambda form: form.__name__)
def test_masks(form):
    g = Graph()
    # Every query sees a key: what a model makes of others is another test's.
    feeds = {}
    out = form(g)
    for name, values in g.feeds(3).items():
        feeds[name] = values
        if values.dtype == bool:
            values[..., 0] = form is not hidden_where_true
    model, report = fused(g, out, feeds=feeds)
    shape = MASKED[form]
    node = only_fused(model, "FusedAttention" if shape is None else "FusedAttentionBias")
    if shape is not None:
        assert static_shape(plugin_inputs(node)["bias"]) == shape
    assert report.counts() == {"attention": 1}


@pytest.mark.parametrize("fill", [LEAST, -np.inf, -1e9, -65504, -1e4, -9984])
@pytest.mark.parametrize("written", ["added", "where", "where not", "of a batch"])
def test_constant_triangles_are_causal(fill, written):
    g = Graph()
    mask = triangle(fill)
    if written == "added":
        masked = g("Add", scores(g), g.array(mask))
    elif written == "of a batch":
        masked = g("Add", scores(g), g.array(np.broadcast_to(mask, (B, 1, S, S))))
    elif written == "where":
        masked = g("Where", g.array(mask == 0, bool), scores(g), g.array(fill))
    else:
        masked = g("Where", g.array(mask[0] < 0, bool), g.array(np.full((1, S, S), fill)), scores(g))
    model, _ = fused(g, attend(g, masked))
    assert plugin_settings(only_fused(model, "FusedAttention"))["causal"] == 1


def test_a_triangle_of_fewer_queries_than_keys_ends_at_the_last_key():
    g = Graph()
    raw = g("MatMul", g.input("q", B, H, 3, D), turned(g, heads(g, "k")))
    out = attend(g, g("Add", raw, g.array(triangle(LEAST, 3, S))))
    model, _ = fused(g, out)
    settings = plugin_settings(only_fused(model, "FusedAttention"))
    assert settings["causal"] == 1
    assert settings["scale"] == 1.0


@pytest.mark.parametrize(
    ("queries", "keys", "plugin", "right"), [(3, 6, "FusedAttentionBias", -1), (6, 3, "FusedAttention", 3)]
)
def test_a_triangle_that_begins_at_the_first_key_is_a_bias_or_a_window(queries, keys, plugin, right):
    g = Graph()
    q, k, v = g.input("q", B, H, queries, D), g.input("k", B, H, keys, D), g.input("v", B, H, keys, D)
    mask = np.where(np.arange(keys) > np.arange(queries)[:, None], np.float32(LEAST), 0)
    weights = g("Softmax", g("Add", g("MatMul", q, turned(g, k)), g.array(mask)), axis=-1)
    model, _ = fused(g, g("MatMul", weights, v))
    settings = plugin_settings(only_fused(model, plugin))
    assert (settings["causal"], settings["window_right"]) == (0, right)


@pytest.mark.parametrize(
    ("left", "right", "settings"),
    [
        (2, 0, {"causal": 1, "window_left": 2, "window_right": -1}),
        (1, 2, {"causal": 0, "window_left": 1, "window_right": 2}),
        (99, 1, {"causal": 0, "window_left": -1, "window_right": 1}),
        (99, 99, {"causal": 0, "window_left": -1, "window_right": -1}),
    ],
)
def test_constant_bands_are_windows(left, right, settings):
    g = Graph()
    distance = np.arange(S) - np.arange(S)[:, None]
    seen = (distance >= -left) & (distance <= right)
    model, _ = fused(g, attend(g, g("Add", scores(g), g.array(np.where(seen, 0, LEAST)))))
    known = plugin_settings(only_fused(model, "FusedAttention"))
    assert {name: known[name] for name in settings} == settings


def test_a_causal_mask_with_slopes_leaves_the_slopes():
    """ALiBi, folded into one constant with the causal mask."""
    g = Graph()
    slopes = np.float32(0.5) ** np.arange(1, H + 1, dtype=np.float32)
    distance = np.arange(S, dtype=np.float32) - np.arange(S, dtype=np.float32)[:, None]
    mask = slopes[:, None, None] * distance + triangle(-1e30)[0]
    model, _ = fused(g, attend(g, g("Add", scores(g), g.array(mask))))
    node = only_fused(model, "FusedAttentionBias")
    assert plugin_settings(node)["causal"] == 1
    bias = constant(plugin_inputs(node)["bias"])
    assert bias.shape == (1, H, S, S)
    assert bias.min() > -10


def test_a_causal_mask_and_padding_leave_the_padding():
    """GPT-2: a constant `Where`, then a mask of the model's input."""
    g = Graph()
    causal = g("Where", g.array(triangle(1) == 0, bool), scores(g), g.array(LEAST))
    out = attend(g, g("Add", causal, g.input("mask", B, 1, 1, S)))
    padding = np.zeros((B, 1, 1, S), np.float32)
    padding[1, ..., 4:] = LEAST
    model, _ = fused(g, out, feeds={"mask": padding})
    node = only_fused(model, "FusedAttentionBias")
    assert plugin_settings(node)["causal"] == 1
    assert static_shape(plugin_inputs(node)["bias"]) == (B, 1, 1, S)


@pytest.mark.parametrize("written", ["seen", "hidden", "not hidden"])
def test_a_causal_mask_joined_with_padding_leaves_the_padding(written):
    """Hugging Face: one mask of both, made before the first layer, for every layer."""
    g = Graph()
    causal = triangle(1) == 0
    if written == "seen":
        both = g("And", g.array(causal, bool), g.input("mask", B, 1, 1, S, dtype="bool"))
    elif written == "hidden":
        both = g("Or", g("Not", g.input("mask", B, 1, 1, S, dtype="bool")), g.array(~causal, bool))
    else:
        hidden = g("Or", g("Not", g.input("mask", B, 1, 1, S, dtype="bool")), g.array(~causal, bool))
        both = g("Not", hidden)
    pair = (g.array(0.0), g.array(LEAST))
    mask = g("Where", both, *(pair[::-1] if written == "hidden" else pair))
    out = attend(g, g("Add", scores(g), mask))
    padding = np.ones((B, 1, 1, S), bool)
    padding[1, ..., 4:] = False
    model, _ = fused(g, out, feeds={"mask": padding})
    node = only_fused(model, "FusedAttentionBias")
    assert plugin_settings(node)["causal"] == 1
    assert static_shape(plugin_inputs(node)["bias"]) == (B, 1, 1, S)
    assert "And" not in operators(model)


def test_joined_masks_of_which_none_is_a_band_stay_one():
    g = Graph()
    seen = np.random.default_rng(0).random((S, S)) < 0.7
    np.fill_diagonal(seen, True)
    padding = g.input("mask", B, 1, 1, S, dtype="bool")
    mask = g("Where", g("And", g.array(seen, bool), padding), g.array(0.0), g.array(LEAST))
    model, _ = fused(g, attend(g, g("Add", scores(g), mask)), feeds={"mask": np.ones((B, 1, 1, S), bool)})
    assert operators(model).count("Where") == 1
    assert "And" in operators(model)


def test_rows_that_see_no_key_are_0_where_a_guard_says_so():
    g = Graph()
    masked = g("Where", g.input("mask", B, 1, S, S, dtype="bool"), scores(g), g.array(-np.inf))
    weights = g("Softmax", masked, axis=-1)
    weights = g("Where", g("IsNaN", weights), g.array(0.0), weights)
    seen = np.ones((B, 1, S, S), bool)
    seen[0, 0, 2] = False
    fused(g, g("MatMul", weights, heads(g, "v")), feeds={"mask": seen})


def test_layers_share_what_is_made_of_their_mask():
    g = Graph()
    x, mask = g.input("x", B, H, S, D), g.input("mask", B, S, S, dtype="bool")
    mask = g("Unsqueeze", mask, g.shape(1))
    for _ in range(3):
        raw = g("Where", mask, g("MatMul", x, turned(g, x)), g.array(LEAST))
        x = g("MatMul", g("Softmax", raw, axis=-1), x)
    model, _ = fused(g, x)
    assert len(fused_nodes(model)) == 3
    assert operators(model).count("Where") == 1


def test_a_condition_and_itself_are_one_part() -> None:
    g = Graph()
    value = g.input("mask", S, S, dtype="bool")
    for _ in range(12):
        value = g("And", value, value)
    (end,) = g.model(value).graph.outputs
    (part,) = _parts(Mask("hide", end, (S, S)))
    assert part.value.name == "mask"


def padding() -> np.ndarray:
    """What is seen of keys: of the second batch none at all."""
    seen = np.ones((B, 1, 1, S), bool)
    seen[0, ..., 4:] = False
    seen[1] = False
    return seen


@pytest.mark.parametrize("fill", [LEAST, -1e9, -1e4])
@pytest.mark.parametrize("written", ["where", "added", "after a mask", "twice"])
def test_a_row_that_sees_no_key_gives_what_it_did(fill, written):
    """The mean of all values where the number stands in the place of scores, else what scores say."""
    g = Graph()
    mask = g.input("mask", B, 1, 1, S, dtype="bool")
    feeds = {"mask": padding()}
    if written == "added":
        masked = g("Add", scores(g), g("Where", mask, g.array(0.0), g.array(fill)))
    elif written == "where":
        masked = g("Where", mask, scores(g), g.array(fill))
    elif written == "after a mask":
        masked = g("Where", mask, g("Add", scores(g), g.input("position", 1, H, S, S)), g.array(fill))
    else:  # both hide keys, with another number each
        other = g.input("other", 1, 1, 1, S, dtype="bool")
        feeds["other"] = np.arange(S).reshape(1, 1, 1, S) != 2
        masked = g("Where", mask, g("Where", other, scores(g), g.array(max(fill, -1e9) * 2)), g.array(fill))
    model, _ = fused(g, attend(g, masked), feeds=feeds)
    only_fused(model, "FusedAttentionBias")


def test_a_row_that_sees_no_key_of_a_constant_mask_gives_what_it_did():
    g = Graph()
    seen = np.random.default_rng(0).random((1, 1, S, S)) < 0.5
    seen[..., 2, :] = False
    model, _ = fused(g, attend(g, g("Where", g.array(seen, bool), scores(g), g.array(-1e4))))
    only_fused(model, "FusedAttentionBias")


@pytest.mark.parametrize("fill", [LEAST, -1e4])
@pytest.mark.parametrize("constant_first", [False, True])
def test_a_row_that_a_constant_mask_hides_with_another_gives_what_it_did(fill, constant_first):
    """The mean of all values: keys that both hide count as those that one does."""
    g = Graph()
    masks = [g.input("mask", B, 1, 1, S, dtype="bool"), g.array(np.arange(S).reshape(1, 1, 1, S) != 2, bool)]
    masked = scores(g)
    for mask in masks[::-1] if constant_first else masks:
        masked = g("Where", mask, masked, g.array(fill))
    model, _ = fused(g, attend(g, masked), feeds={"mask": padding()})
    only_fused(model, "FusedAttentionBias")


def test_masks_of_half_precision_hide_rows_too():
    """The bias is fp32 then: fp16 has no number that takes all of a score."""
    g = Graph()
    q, k, v = (g.input(name, B, H, S, D, dtype="fp16") for name in "qkv")
    raw = g("Add", g("MatMul", q, turned(g, k)), g.input("position", 1, H, S, S, dtype="fp16"))
    masked = g("Where", g.input("mask", B, 1, 1, S, dtype="bool"), raw, g.array(-1e4, np.float16))
    out = g("MatMul", g("Softmax", masked, axis=-1), v)
    model, _ = fused(g, out, feeds={"mask": padding()}, within=5e-3)
    assert plugin_inputs(only_fused(model, "FusedAttentionBias"))["bias"].dtype.name == "FLOAT"


@pytest.mark.parametrize(("fill", "left"), [(-1e4, True), (-1e9, False)])
def test_what_is_added_to_a_number_in_the_place_of_scores(fill, left):
    g = Graph()
    hidden = g("Where", g.input("mask", B, 1, 1, S, dtype="bool"), scores(g), g.array(fill))
    out = attend(g, g("Add", hidden, g.input("position", 1, H, S, S)))
    model, report = fused(g, out, feeds={"mask": padding()})
    wanted = ["FusedGemm", "FusedGemm"] if left else ["FusedAttentionBias"]
    assert [node.op_type for node in fused_nodes(model)] == wanted
    if left:
        assert [miss.reason.split(" puts ")[1] for miss in report.misses if miss.pattern == "attention"] == [
            "-10000 in the place of scores, and another is added"
        ]


@pytest.mark.parametrize(("inner", "left"), [(-1e20, True), (LEAST, False), (-1e11, False)])
@pytest.mark.parametrize("constant", [False, True])
def test_numbers_in_the_place_of_scores_that_a_bias_has_not_apart(inner, left, constant):
    """A row that two masks hide altogether is the mean of the keys that have the larger number."""
    g = Graph()
    other = np.arange(S).reshape(1, 1, 1, S) != 2
    asked = g.array(other, bool) if constant else g.input("other", 1, 1, 1, S, dtype="bool")
    hidden = g("Where", g.input("mask", B, 1, 1, S, dtype="bool"), scores(g), g.array(inner))
    out = attend(g, g("Where", asked, hidden, g.array(LEAST)))
    model, report = fused(g, out, feeds={"mask": padding(), **({} if constant else {"other": other})})
    assert [node.op_type for node in fused_nodes(model)] == (
        ["FusedGemm", "FusedGemm"] if left else ["FusedAttentionBias"]
    )
    if left:
        (reason,) = [miss.reason for miss in report.misses if miss.pattern == "attention"]
        assert reason == "its masks put -3.40282e+38 and -1e+20 in the place of scores, which a bias has not both"
