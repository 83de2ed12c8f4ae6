"""Which rows of a model's attentions see no key, and where values have them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fuse.forms import LEAST, B, D, Graph, H, S, attend, fused, scores, triangle
from tests.tuner.model.graphs import normal, relative_error, results
from tilewright.tuner.model.fuse.masks import Band
from tilewright.tuner.model.graph import fused_nodes
from tilewright.tuner.model.verify.compare import Reference
from tilewright.tuner.model.verify.error_budget import Budget
from tilewright.tuner.model.verify.masked_rows import MaskedRows, Masking, RowPlaces

N = H * D


@pytest.mark.parametrize("band", [Band(), Band(right=0), Band(left=1, right=0), Band(right=1)])
@pytest.mark.parametrize("bias_shape", [(2, 1, 1, 6), (1, 1, 4, 6), (2, 3, 4, 6)])
def test_rows_whose_keys_a_bias_and_a_band_hide(band: Band, bias_shape: tuple[int, int, int, int]) -> None:
    """In every head: one that sees a key means something."""
    queries, keys = 4, 6
    bias = np.where(np.random.default_rng(0).random(bias_shape) < 0.7, np.float32(LEAST), np.float32(0))
    bias[0, :, 0] = LEAST
    wide = np.broadcast_to(bias, (2, bias_shape[1], queries, keys))
    wanted = np.ones((2, queries), bool)
    for entry, head, query in np.ndindex(2, bias_shape[1], queries):
        place = keys - queries + query
        low = 0 if band.left is None else max(0, place - band.left)
        high = keys if band.right is None else min(keys, place + band.right + 1)
        wanted[entry, query] &= bool((wide[entry, head, query, low:high] == LEAST).all())
    assert wanted.any()
    assert not wanted.all()
    np.testing.assert_array_equal(Masking("bias", band, (2, queries, keys)).rows(bias), wanted)


def causal(g: Graph) -> str:
    """Attention with a causal mask and one of padding, (B, H, S, D)."""
    both = g("And", g.array(triangle(1) == 0, bool), g.input("mask", B, 1, 1, S, dtype="bool"))
    return attend(g, g("Add", scores(g), g("Where", both, g.array(0.0), g.array(LEAST))))


def left_padded() -> np.ndarray:
    """What is seen of keys: of the second entry not the first two."""
    seen = np.ones((B, 1, 1, S), bool)
    seen[1, ..., :2] = False
    return seen


HIDDEN = np.zeros((B, S), bool)
HIDDEN[1, :2] = True


def rows_of(model: ir.Model) -> MaskedRows:
    places = RowPlaces(model)
    biases = {masking.bias: np.where(left_padded(), np.float32(0), np.float32(LEAST)) for masking in places.maskings}
    return places.masked(biases)


def made(g: Graph, *outputs: str) -> ir.Model:
    return fused(g, *outputs, feeds={"mask": np.ones((B, 1, 1, S), bool)})[0]


def test_padding_in_front_of_a_causal_sequence() -> None:
    """The model differs from what is made of it in those rows, and in no others."""
    g = Graph()
    out = causal(g)
    model, changed = g.model(out), made(g, out)
    rows = rows_of(changed)
    assert rows.count == 2
    feeds = g.feeds() | {"mask": left_padded()}
    (ours,), (others,) = (results(each, feeds) for each in (model, changed))
    left_out = rows.of(out, ours.shape)
    assert left_out is not None
    np.testing.assert_array_equal(
        np.broadcast_to(left_out, ours.shape), np.broadcast_to(HIDDEN[:, None, :, None], ours.shape)
    )
    assert relative_error(others, ours) > 1e-2
    assert relative_error(np.where(left_out, 0, others), np.where(left_out, 0, ours)) < 1e-5


def weights(g: Graph, rows: int, columns: int) -> str:
    return g.array(normal(rows + columns, rows, columns) / 4)


def joined(g: Graph) -> str:
    """(B, S, N)"""
    return g.reshape(g.transpose(causal(g), 0, 2, 1, 3), B, S, N)


WAYS = {
    "the heads side by side": (lambda g: joined(g), (B, S)),
    "tokens, then heads": (lambda g: g.transpose(causal(g), 0, 2, 1, 3), (B, S)),
    "a product": (lambda g: g("MatMul", joined(g), weights(g, N, S)), (B, S)),  # as many columns as rows
    "one matrix": (lambda g: g("MatMul", g.reshape(joined(g), -1, N), weights(g, N, 8)), (B * S,)),
    "and back": (lambda g: g.reshape(g("MatMul", g.reshape(joined(g), -1, N), weights(g, N, 8)), B, S, 8), (B, S)),
    "a sum with what is of no attention": (lambda g: g("Add", joined(g), g.input("x", B, S, N)), (B, S)),
    "a norm": (lambda g: g("LayerNormalization", joined(g), g.array(np.ones(N)), axis=-1), (B, S)),
    "half of the columns": (lambda g: g("Split", joined(g), axis=-1, num_outputs=2, outputs=2)[1], (B, S)),
    "a softmax": (lambda g: g("Softmax", g("MatMul", joined(g), weights(g, N, 8)), axis=-1), (B, S)),
}


@pytest.mark.parametrize("way", WAYS)
def test_values_that_have_the_rows(way: str) -> None:
    make, leading = WAYS[way]
    g = Graph()
    out = make(g)
    changed = made(g, out)
    (value,) = changed.graph.outputs
    shape = tuple(int(size) for size in value.shape or ())
    left_out = rows_of(changed).of(out, shape)
    assert left_out is not None
    wanted = HIDDEN.reshape(*leading, *(1 for _ in shape[len(leading) :]))
    np.testing.assert_array_equal(np.broadcast_to(left_out, shape), np.broadcast_to(wanted, shape))


OTHERS = {
    "a mean over rows": lambda g: g("ReduceMean", joined(g), g.shape(1), keepdims=0),
    "the last row, as wide as there are rows": lambda g: g(
        "MatMul", g("Gather", joined(g), g.array(S - 1, np.int64), axis=1), weights(g, N, S)
    ),
    "a softmax over rows": lambda g: g("Softmax", g("MatMul", joined(g), weights(g, N, 8)), axis=1),
    "rows in another order": lambda g: g.transpose(joined(g), 1, 0, 2),
    "rows times rows": lambda g: g("MatMul", g.transpose(joined(g), 0, 2, 1), g.input("x", B, S, 8)),
    "what is of the model's input": lambda g: g("Relu", g.input("x", B, S, N)),
    "rows cut in two": lambda g: g.reshape(joined(g), B, S * 2, N // 2),
}


@pytest.mark.parametrize("other", OTHERS)
def test_values_that_count_as_a_whole(other: str) -> None:
    """Where rows are mixed, or it isn't certain where they are, errors are not to be hidden."""
    g = Graph()
    out = OTHERS[other](g)
    changed = made(g, out, *([causal(g)] if "input" in other else []))
    shape = tuple(int(size) for size in changed.graph.outputs[0].shape or ())
    assert rows_of(changed).of(out, shape) is None


def test_what_is_hidden_altogether_is_no_match() -> None:
    """A mask that hides every key of every entry leaves nothing to compare, which no bound is met with."""
    g = Graph()
    out = causal(g)
    feed = g.feeds() | {"mask": np.zeros((B, 1, 1, S), bool)}
    model, changed = g.model(out), made(g, out)
    with Reference(model, [feed], fused=changed) as reference:
        found = reference.compare(changed)
    (row,) = found.outputs
    assert not row.exact
    assert row.untold
    said = f"{out}: no row of it sees a key: there is nothing to compare"
    assert found.breaches(Budget(max=1.0))[0] == said


def test_masks_that_are_constant_or_not_there_have_none() -> None:
    g = Graph()
    changed, _ = fused(g, attend(g, g("Add", scores(g), g.array(normal(0, 1, H, S, S)))))
    assert fused_nodes(changed)
    assert RowPlaces(changed).maskings == ()
    g = Graph()
    changed, _ = fused(g, attend(g, scores(g)))
    assert RowPlaces(changed).maskings == ()
