"""`MultiHeadAttention` and `Attention` of ONNX Runtime, and what is fused of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuner.model.graphs import normal, results
from tests.tuner.model.reading.contrib.operators import Operator, compare, held, left
from tilewright.tuner.model.graph import plugin_settings

BATCH, LENGTH, HEADS, DIM = 2, 6, 2, 16
HIDDEN = HEADS * DIM
COUNTS = np.array([6, 4], np.int32)


def multi_head(
    *, keys: int = LENGTH, past: int = 0, form: str = "apart", bias: bool = False, mask: np.ndarray | None = None,
    added: tuple[int, ...] = (), dtype: Any = np.float32, **settings: Any,
) -> Operator:  # fmt: skip
    """`form`: queries, keys and values apart, keys and values as heads, or packed."""
    given: dict[str, np.ndarray | None] = {"q": normal(0, BATCH, LENGTH, HIDDEN)}
    if form == "apart":
        given |= {"k": normal(1, BATCH, keys, HIDDEN), "v": normal(2, BATCH, keys, HIDDEN)}
    elif form == "heads":
        given |= {name: normal(seed, BATCH, HEADS, keys, DIM) for seed, name in ((1, "k"), (2, "v"))}
    elif form == "keys and values":
        given |= {"k": normal(1, BATCH, keys, HEADS, 2, DIM), "v": None}
    else:
        given = {"q": normal(0, BATCH, LENGTH, HEADS, 3, DIM), "k": None, "v": None}
    given["bias"] = normal(3, 3 * HIDDEN) if bias else None
    given["mask"] = mask
    given["added"] = normal(4, *added) if added else None
    for seed, name in ((5, "past_key"), (6, "past_value")):
        given[name] = normal(seed, BATCH, HEADS, past, DIM) if past else None
    given = {
        name: array.astype(dtype) if array is not None and array.dtype == np.float32 else array
        for name, array in given.items()
    }
    while given and next(reversed(given.values())) is None:
        given.popitem()
    outputs = ("out", "present_key", "present_value") if past else ("out",)
    constants = [name for name in ("bias",) if given.get(name) is not None]
    return Operator("MultiHeadAttention", given, outputs, constants, num_heads=HEADS, **settings)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True, "scale": 0.5},
        {"keys": 9},
        {"form": "heads", "keys": 9},
        {"unidirectional": 1},
        {"past": 3},
        {"mask": COUNTS},
        {"mask": (np.arange(LENGTH) < COUNTS[:, None]).astype(np.int32)},
        {"added": (1, HEADS, LENGTH, LENGTH)},
        {"added": (BATCH, 1, LENGTH, LENGTH)},
    ],
    ids=str,
)
def test_multi_head_attention_is_one_fused_node(changes: dict[str, Any], tmp_path: Path) -> None:
    (node,) = held(multi_head(**changes), tmp_path)
    assert node.op_type.startswith("FusedAttention")
    assert plugin_settings(node)["causal"] == changes.get("unidirectional", 0)


@pytest.mark.parametrize(("form", "bias"), [("keys and values", False), ("packed", False), ("packed", True)])
def test_what_is_packed_is_what_lies_apart(form: str, bias: bool, tmp_path: Path) -> None:
    """ONNX Runtime unpacks it on GPUs alone."""
    packed = multi_head(form=form, bias=bias)
    parts = packed.feeds["q"] if form == "packed" else packed.feeds["k"]
    apart = [parts[:, :, :, place].reshape(BATCH, LENGTH, HIDDEN) for place in range(parts.shape[3])]
    plain = multi_head(bias=bias)
    plain.feeds = dict(zip("qkv", [packed.feeds["q"], *apart][-3:], strict=True))
    (node,) = held(packed, tmp_path, plain.wanted())
    assert node.op_type.startswith("FusedAttention")


def test_a_cache_is_in_front_of_the_new_keys(tmp_path: Path) -> None:
    """A causal mask then has the last query at the last key."""
    (node,) = held(multi_head(past=3, unidirectional=1), tmp_path)
    assert plugin_settings(node)["causal"] == 1


def test_half_precision(tmp_path: Path) -> None:
    (node,) = held(multi_head(dtype=np.float16), tmp_path, within=3e-3)
    assert node.op_type.startswith("FusedAttention")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "its attribute num_heads is 0"),
        ({"num_heads": 3}, "for 3 heads"),
        ({"mask": np.ones(5, np.int32)}, "its mask has the shape (5,), and its scores (2, 2, 6, 6)"),
        ({"added": (3, HEADS, LENGTH, LENGTH)}, "its attention_bias has the shape (3, 2, 6, 6)"),
    ],
)
def test_what_has_no_form_stays(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    heads = changes.pop("num_heads", HEADS)
    operator = multi_head(**changes)
    for attribute in operator.proto.graph.node[0].attribute:
        attribute.i = heads
    assert message in left(operator, tmp_path)


def projected(
    *, mask: np.ndarray | None = None, past: int = 0, sizes: tuple[int, ...] = (), bias: bool = True,
    added: tuple[int, ...] = (), **settings: Any,
) -> Operator:  # fmt: skip
    """`Attention` of x with its weights."""
    columns = sum(sizes) if sizes else 3 * HIDDEN
    given: dict[str, np.ndarray | None] = {
        "x": normal(0, BATCH, LENGTH, HIDDEN),
        "weights": normal(1, HIDDEN, columns) / 4,
        "bias": normal(2, columns) if bias else None,
        "mask": mask,
        "past": normal(3, 2, BATCH, HEADS, past, DIM) if past else None,
        "added": normal(4, *added) if added else None,
    }
    while next(reversed(given.values())) is None:
        given.popitem()
    constants = [name for name in ("weights", "bias") if given.get(name) is not None]
    more = {"qkv_hidden_sizes": list(sizes)} if sizes else {}
    outputs = ("out", "present") if past else ("out",)
    return Operator("Attention", given, outputs, constants, num_heads=HEADS, **more, **settings)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sizes": (HIDDEN, HIDDEN, 2 * HIDDEN)},
        {"unidirectional": 1},
        {"past": 3, "unidirectional": 1},
        {"mask": COUNTS},
        {"mask": np.array([6, 5, 0, 1], np.int32)},
        {"mask": (np.arange(LENGTH) < COUNTS[:, None]).astype(np.int32)},
        {"mask": np.tril(np.ones((BATCH, LENGTH, LENGTH), np.int32))},
        {"added": (1, HEADS, LENGTH, LENGTH), "scale": 0.25},
    ],
    ids=str,
)
def test_attention_is_its_projection_and_one_fused_node(changes: dict[str, Any], tmp_path: Path) -> None:
    names = [node.op_type for node in held(projected(**changes), tmp_path)]
    assert [name.partition("Fused")[2][:4] for name in names] == ["Gemm", "Atte"]
    assert names[0].startswith("FusedGemmBias")


@pytest.mark.parametrize("fill", [-10000.0, float(np.finfo(np.float32).min)])
def test_rows_that_see_padding_alone_see_as_much_of_what_is_hidden(fill: float, tmp_path: Path) -> None:
    """Padding in front, as of a batch of prompts: its own rows are those."""
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], np.int32)
    for operator in (multi_head, projected):
        case = operator(mask=mask, unidirectional=1, mask_filter_value=fill)
        compare(results(case.read(tmp_path), case.feeds), case.wanted(), 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_rotary": 1}, "it turns queries and keys itself (do_rotary)"),
        ({"past_present_share_buffer": 1, "past": 3}, "its cache is a buffer longer than what is in it"),
        ({"sizes": (HIDDEN, HIDDEN // 2, HIDDEN)}, "(qkv_hidden_sizes)"),
        ({"mask": np.ones((BATCH, 2), np.int32)}, "its mask has the shape (2, 2), and its scores (2, 2, 6, 6)"),
    ],
)
def test_what_of_a_projection_has_no_form_stays(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in left(projected(**changes), tmp_path)


def test_queries_that_are_no_floats_stay(tmp_path: Path) -> None:
    assert left(multi_head(dtype=np.uint8), tmp_path) == "its query is of uint8"


def test_a_past_without_a_present_stays(tmp_path: Path) -> None:
    operator = multi_head(past=3)
    del operator.proto.graph.node[-1].output[1:]
    del operator.proto.graph.output[1:]
    assert left(operator, tmp_path).startswith("it has a past and gives no present")
