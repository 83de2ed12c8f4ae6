"""`GroupQueryAttention`, with its caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from tests.tuner.model.graphs import normal
from tests.tuner.model.reading.contrib.operators import Operator, held, left
from tilewright.tuner.model.graph import plugin_settings

HEADS, GROUPS, DIM = 4, 2, 16


def grouped(
    *, batch: int = 1, length: int = 1, past: int = 0, total: int = 0, ends: list[int] | None = None,
    packed: bool = False, rotary: bool = False, dtype: Any = np.float32, counted: bool = False,
    added: np.ndarray | None = None, **settings: Any,
) -> Operator:  # fmt: skip
    """`ends`: seqlens_k as an input, or that of sequences of one length. `counted`: both lengths from a mask, as the
    builders of language models write it."""
    total = total or past + length
    rng = np.random.default_rng(0)
    sizes = [HEADS * DIM, GROUPS * DIM, GROUPS * DIM]
    if packed:
        given: dict[str, np.ndarray | None] = {"q": normal(0, batch, length, sum(sizes)), "k": None, "v": None}
    else:
        given = {
            name: normal(seed, batch, length, size) for seed, (name, size) in enumerate(zip("qkv", sizes, strict=True))
        }
    for seed, name in ((5, "past_key"), (6, "past_value")):
        given[name] = normal(seed, batch, GROUPS, past, DIM) if past else None
    given["seqlens_k"] = np.array(ends or [total - 1] * batch, np.int32)
    given["total"] = np.array([total], np.int32)
    if rotary:
        angle = np.arange(total + 4)[:, None] * rng.random(DIM // 2)
        given |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
        settings["do_rotary"] = 1
    given = {
        name: array.astype(dtype) if array is not None and array.dtype == np.float32 else array
        for name, array in given.items()
    }
    if added is not None:
        given |= {name: given.get(name) for name in ("cos", "sin", "positions")} | {"added": added.astype(dtype)}
    constants = [
        name for name in ("total", "cos", "sin", *([] if ends else ["seqlens_k"])) if given.get(name) is not None
    ]
    settings = {"num_heads": HEADS, "kv_num_heads": GROUPS} | settings
    outputs = ("out", "present_key", "present_value")
    if not counted:
        return Operator("GroupQueryAttention", given, outputs, constants, **settings)
    before = [
        helper.make_node("ReduceSum", ["mask", "one"], ["sum"], keepdims=1),
        helper.make_node("Sub", ["sum", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["seqlens_k"], to=6),
        helper.make_node("Shape", ["mask"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["length"]),
        helper.make_node("Cast", ["length"], ["total"], to=6),
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
    ]
    constants = [name for name in constants if name not in ("total", "seqlens_k")]
    operator = Operator("GroupQueryAttention", given, outputs, constants, [before[-1], *before[:-1]], **settings)
    return operator.with_feeds(mask=np.ones((batch, total), np.int64))


@pytest.mark.parametrize(
    "changes",
    [
        {"length": 6},
        {"past": 5},
        {"past": 5, "packed": True, "rotary": True},
        {"past": 5, "length": 3, "rotary": True},
        {"past": 8, "total": 6},  # a buffer that has room
        {"past": 8, "length": 6, "total": 6},
        {"length": 6, "batch": 2, "rotary": True},
        {"past": 5, "rotary": True, "rotary_interleaved": 1},
        {"past": 9, "local_window_size": 4},
        {"length": 9, "local_window_size": 4},
        {"past": 5, "softcap": 2.0, "scale": 0.5},
        {"past": 5, "batch": 2, "ends": [5, 3], "rotary": True},
        {"past": 5, "rotary": True, "counted": True},
        {"past": 5, "rotary": True, "counted": True, "batch": 2},
    ],
    ids=str,
)
def test_it_is_one_fused_node_behind_its_cache(changes: dict[str, Any], tmp_path: Path) -> None:
    (node,) = held(grouped(**changes), tmp_path)
    assert node.op_type.startswith("FusedAttention")


@pytest.mark.parametrize("changes", [{"length": 6}, {"past": 5, "length": 3}], ids=str)
def test_prompts_are_causal(changes: dict[str, Any], tmp_path: Path) -> None:
    (node,) = held(grouped(**changes), tmp_path)
    assert plugin_settings(node)["causal"] == 1


@pytest.mark.parametrize("fill", [-np.inf, -10000.0])
def test_rows_whose_keys_are_all_padding_see_nothing_that_is_hidden(fill: float, tmp_path: Path) -> None:
    added = np.zeros((1, 1, 6, 6), np.float32)
    added[..., 0] = fill
    (node,) = held(grouped(length=6, added=added), tmp_path)
    assert plugin_settings(node)["causal"] == 1


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("ends", [[5, 5], [5, 2], [1, 3]])
def test_of_a_prompt_without_a_direction_each_sequence_has_its_own_length(
    ends: list[int], constant: bool, tmp_path: Path
) -> None:
    operator = grouped(length=6, batch=2, ends=ends, causal=0)
    if constant:
        graph = operator.proto.graph
        graph.initializer.append(numpy_helper.from_array(operator.feeds.pop("seqlens_k"), "seqlens_k"))
        del graph.input[next(index for index, each in enumerate(graph.input) if each.name == "seqlens_k")]
    (node,) = held(operator, tmp_path)
    assert ("Bias" in node.op_type) == (not constant or ends != [5, 5])


def test_half_precision(tmp_path: Path) -> None:
    (node,) = held(grouped(past=5, length=3, dtype=np.float16), tmp_path, within=3e-3)
    assert node.op_type.startswith("FusedAttention")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3, "past": 5}, "it has 3 heads of queries and 2 of keys"),
        ({"kv_num_heads": 0, "past": 5}, "its attribute kv_num_heads is 0"),
        ({"smooth_softmax": 1, "past": 5}, "its attribute smooth_softmax is 1"),
        ({"softcap": -1.0, "past": 5}, "its attribute softcap is -1"),
        (
            {"past": 4, "total": 8, "length": 2},
            "give --shape past_sequence_length=6, or 8 for a buffer that all fit in",
        ),
        ({"past": 5, "batch": 2, "length": 3, "ends": [7, 5]}, "give --shape batch_size=1"),
        ({"length": 6, "batch": 2, "ends": [5], "causal": 0}, "its seqlens_k has the shape (1,), in a batch of 2"),
    ],
)
def test_what_has_no_form_stays(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in left(grouped(**changes), tmp_path)


def test_a_length_that_is_told_when_it_runs_is_not_known(tmp_path: Path) -> None:
    operator = grouped(past=5)
    total = next(each for each in operator.proto.graph.initializer if each.name == "total")
    operator.proto.graph.initializer.remove(total)
    operator.proto.graph.input.append(helper.make_tensor_value_info("total", total.data_type, total.dims))
    assert "total_sequence_length 'total' is not known before it runs" in left(operator, tmp_path)
