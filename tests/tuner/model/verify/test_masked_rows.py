"""Which rows of a model's attentions see no key, and where values have them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tuner.model.fuse.forms import LEAST, B, Graph, H, S, attend, fused, scores, triangle
from tests.tuner.model.graphs import normal, relative_error, results
from tilewright.tuner.model.fuse.masks import Band
from tilewright.tuner.model.graph import fused_nodes
from tilewright.tuner.model.verify.masked_rows import MaskedRows, Masking, masked_rows, maskings

ROWS = np.zeros((2, 5), bool)
ROWS[0, :2] = True
ROWS[1, 0] = True


@pytest.mark.parametrize(
    ("shape", "where"),
    [
        ((2, 5, 3), lambda rows: np.repeat(rows[..., None], 3, -1)),
        ((2, 5), lambda rows: rows),
        ((2, 5, 4, 3), lambda rows: np.broadcast_to(rows[:, :, None, None], (2, 5, 4, 3))),
        ((2, 4, 5, 3), lambda rows: np.broadcast_to(rows[:, None, :, None], (2, 4, 5, 3))),
        ((2, 5, 5, 3), lambda rows: np.broadcast_to(rows[:, None, :, None], (2, 5, 5, 3))),  # heads, then rows
        ((10, 3), lambda rows: np.repeat(rows.reshape(10, 1), 3, -1)),
    ],
)
def test_where_values_have_rows(shape, where):
    found = MaskedRows({(2, 5): ROWS}).of(shape)
    assert found is not None
    np.testing.assert_array_equal(np.broadcast_to(found, shape), where(ROWS))


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (5, 2, 3), (2, 4, 3, 5)])
def test_other_values_are_not_of_rows(shape):
    assert MaskedRows({(2, 5): ROWS}).of(shape) is None


def test_rows_of_an_encoder_and_of_a_decoder():
    both = MaskedRows({(2, 7): np.zeros((2, 7), bool), (2, 5): ROWS})
    assert both.count == 3
    assert both.of((2, 7, 4)) is None
    assert both.of((2, 5, 4)) is not None
    assert MaskedRows().of((2, 5, 4)) is None


@pytest.mark.parametrize("band", [Band(), Band(right=0), Band(left=1, right=0), Band(right=1)])
@pytest.mark.parametrize("bias_shape", [(2, 1, 1, 6), (1, 1, 4, 6), (2, 3, 4, 6)])
def test_rows_whose_keys_a_bias_and_a_band_hide(band, bias_shape):
    queries, keys = 4, 6
    bias = np.where(np.random.default_rng(0).random(bias_shape) < 0.7, np.float32(LEAST), np.float32(0))
    bias[0, 0, 0] = LEAST
    wide = np.broadcast_to(bias, (2, bias_shape[1], queries, keys))
    wanted = np.zeros((2, queries), bool)
    for entry, head, query in np.ndindex(2, bias_shape[1], queries):
        place = keys - queries + query
        low = 0 if band.left is None else max(0, place - band.left)
        high = keys if band.right is None else min(keys, place + band.right + 1)
        wanted[entry, query] |= bool((wide[entry, head, query, low:high] == LEAST).all())
    assert wanted.any()
    assert not wanted.all()
    np.testing.assert_array_equal(Masking("bias", band, (2, queries, keys)).rows(bias), wanted)


def left_padded() -> np.ndarray:
    """What is seen of keys: of the second entry not the first two."""
    seen = np.ones((B, 1, 1, S), bool)
    seen[1, ..., :2] = False
    return seen


def test_padding_in_front_of_a_causal_sequence():
    """The model differs from what is made of it in those rows, and in no others."""
    g = Graph()
    both = g("And", g.array(triangle(1) == 0, bool), g.input("mask", B, 1, 1, S, dtype="bool"))
    model = g.model(attend(g, g("Add", scores(g), g("Where", both, g.array(0.0), g.array(LEAST)))))
    changed, _ = fused(g, model.graph.outputs[0].name, feeds={"mask": np.ones((B, 1, 1, S), bool)})
    found = maskings(changed)
    assert [(masking.band, masking.shape) for masking in found] == [(Band(right=0), (B, S, S))]
    bias = np.where(left_padded(), np.float32(0), np.float32(LEAST))
    rows = masked_rows(found, {found[0].bias: bias})
    wanted = np.zeros((B, S), bool)
    wanted[1, :2] = True
    np.testing.assert_array_equal(rows.rows[B, S], wanted)

    shapes = {value.name: [*value.shape] for value in model.graph.inputs if value.name != "mask"}
    feeds = {name: normal(place, *shape) for place, (name, shape) in enumerate(shapes.items())}
    (ours,), (others,) = (results(each, feeds | {"mask": left_padded()}) for each in (model, changed))
    out = rows.of(ours.shape)
    assert out is not None
    assert relative_error(others, ours) > 1e-2
    assert relative_error(np.where(out, 0, others), np.where(out, 0, ours)) < 1e-5


def test_masks_that_are_constant_or_not_there_have_none():
    g = Graph()
    changed, _ = fused(g, attend(g, g("Add", scores(g), g.array(normal(0, 1, H, S, S)))))
    assert fused_nodes(changed)
    assert maskings(changed) == []
    g = Graph()
    changed, _ = fused(g, attend(g, scores(g)))
    assert maskings(changed) == []
