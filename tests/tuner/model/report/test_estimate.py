"""Predicted time of a model: each node's part by hand, and what the sum may be called."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from tests.tuner.model.graphs import model_of, normal
from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.prediction import predict, roofline_us
from tilewright.tuner.model.bodies import attach_bodies
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import make_fused
from tilewright.tuner.model.report.estimate import NodeTime, estimate, launch_us, memory_us, not_fused, pairing, roofs
from tilewright.tuning_db.errors import UsageError

DEVICE = resolve_device("rtx3090")
BANDWIDTH = 936e3 * 0.9  # bytes per µs that a copy reaches
LAUNCH = 0.9 + 1100 / 1695  # µs: a gap, and 1,100 cycles until the first bytes are there


def rows(model: ir.Model, device: Device = DEVICE, **tuned: tuple[float, str]) -> dict[str, NodeTime]:
    return {row.node: row for row in estimate(model, device, tuned).nodes}


def layer() -> ir.Model:
    """MatMul, Add, Relu of fp16."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "matmul"),
        helper.make_node("Add", ["m", "b"], ["a"], "add"),
        helper.make_node("Relu", ["a"], ["y"], "relu"),
    ]
    half = np.float16
    constants = {"w": normal(0, 512, 1024, dtype=half), "b": normal(1, 1024, dtype=half)}
    return model_of(nodes, {"x": (256, 512)}, ["y"], constants, dtype="fp16")


def fused() -> ir.Model:
    """The same in one node."""
    model = layer()
    inputs = {
        "a": model.graph.inputs[0],
        **{key: model.graph.initializers[name] for key, name in (("b", "w"), ("bias", "b"))},
    }
    node = make_fused("gemm", inputs, {"activation": "relu"}, name="layer")
    node.outputs[0].name = "y"
    chain = list(model.graph)
    model.graph.append(node)
    ir.convenience.replace_all_uses_with(chain[-1].outputs[0], node.outputs[0], replace_graph_outputs=True)
    model.graph.remove(chain, safe=True)
    attach_bodies(model)
    return model


def test_products_are_predicted_by_their_default() -> None:
    row = rows(layer())["matmul"]
    problem = GemmProblem(M=256, N=1024, K=512, dtype="fp16")
    config = GEMM.default(problem, DEVICE)
    wanted = predict(GEMM.work(problem, config), GEMM.estimate(problem, config, DEVICE), DEVICE).time_us
    assert (row.time_us, row.provenance, row.kernel, row.unit) == (wanted, "predicted", "gemm", "fp16")
    assert row.flops == 2 * 256 * 1024 * 512
    assert row.bytes == 2 * (256 * 512 + 512 * 1024 + 256 * 1024)
    assert row.intensity == pytest.approx(row.flops / row.bytes)
    assert row.tflops == pytest.approx(row.flops / row.time_us / 1e6)


def test_other_nodes_move_bytes() -> None:
    found = rows(layer())
    tensor = 2 * 256 * 1024
    for name, moved in (("add", 2 * tensor + 2 * 1024), ("relu", 2 * tensor)):
        assert found[name].bytes == moved
        assert found[name].time_us == pytest.approx(LAUNCH + moved / BANDWIDTH)
        assert (found[name].provenance, found[name].flops, found[name].kernel) == ("roofline", 0, "")


def test_shares_add_up() -> None:
    found = estimate(layer(), DEVICE)
    assert sum(row.share for row in found.nodes) == pytest.approx(1.0)
    assert sum(row.time_us for row in found.nodes) == pytest.approx(found.time_us)
    assert found.provenance == "predicted"
    assert found.flops == 2 * 256 * 1024 * 512
    assert found.by_provenance().keys() == {"predicted", "roofline"}


def test_what_is_not_fused_is_summed_by_operator() -> None:
    found = estimate(layer(), DEVICE)
    rest = not_fused(found, set())
    times = {row.node: row for row in found.nodes}
    assert [row.time_us for row in rest] == sorted((row.time_us for row in rest), reverse=True)
    by_operator = {row.operator: row for row in rest}
    assert by_operator["Relu"].bytes == times["relu"].bytes
    assert by_operator["Relu"].share == pytest.approx(times["relu"].share)
    assert not_fused(found, set(times)) == []
    twice = replace(found, nodes=(*found.nodes, times["relu"]))
    assert {row.operator: row.count for row in not_fused(twice, set())}["Relu"] == 2


def test_fusing_saves_what_passes_through_memory() -> None:
    before, after = estimate(layer(), DEVICE), estimate(fused(), DEVICE)
    assert after.flops == before.flops
    assert after.bytes < before.bytes
    assert after.time_us < before.time_us - LAUNCH


def test_a_tuned_time_is_taken_as_it_is() -> None:
    for provenance in ("measured", "transferred", "predicted"):
        row = rows(fused(), layer=(12.5, provenance))["layer"]
        assert (row.time_us, row.provenance, row.share) == (12.5, provenance, 1.0)
        assert row.flops == 2 * 256 * 1024 * 512


def test_only_what_was_measured_throughout_is_called_so() -> None:
    assert estimate(fused(), DEVICE, {"layer": (12.5, "measured")}).provenance == "measured"
    assert estimate(fused(), DEVICE, {"layer": (12.5, "transferred")}).provenance == "predicted"
    assert estimate(fused(), DEVICE).provenance == "predicted"
    with_more = fused()
    node = ir.node("Neg", [with_more.graph.outputs[0]], name="neg")
    node.outputs[0].name, node.outputs[0].type = "z", with_more.graph.outputs[0].type
    node.outputs[0].shape = with_more.graph.outputs[0].shape
    with_more.graph.append(node)
    with_more.graph.outputs[0] = node.outputs[0]
    assert estimate(with_more, DEVICE, {"layer": (12.5, "measured")}).provenance == "predicted"


@pytest.mark.parametrize(
    ("tuned", "words"),
    [
        ({"matmul": (1.0, "measured")}, "'matmul', which is no fused node"),
        ({"layer": (0.0, "measured")}, "'layer' is 0.0 µs and must be a number above 0"),
        ({"layer": (float("inf"), "measured")}, "'layer' is inf µs"),
        ({"layer": (1.0, "default")}, "'layer' is 'default': it must be measured, transferred or predicted"),
    ],
)
def test_times_that_can_t_be(tuned: dict[str, tuple[float, str]], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        estimate(fused(), DEVICE, tuned)
    assert words in str(caught.value)


def test_views_and_shape_computations_are_free() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("Shape", ["r"], ["s"], "shape"),
        helper.make_node("Gather", ["s", "at"], ["g"], "gather"),
        helper.make_node("Concat", ["g", "rest"], ["t"], "concat", axis=0),
        helper.make_node("Reshape", ["r", "t"], ["v"], "reshape"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], "weights"),
        helper.make_node("Add", ["v", "w"], ["y"], "add"),
    ]
    constants = {
        "at": np.array([0]),
        "rest": np.array([-1]),
        "q": np.ones((4, 6), np.int8),
        "scale": np.float32(0.5),
    }
    found = rows(model_of(nodes, {"x": (4, 2, 3)}, ["y"], constants))
    free = {name for name, row in found.items() if row.provenance == "free"}
    assert free == {"shape", "gather", "concat", "reshape", "weights"}
    assert all(found[name].time_us == 0 for name in free)
    assert found["add"].bytes == 3 * 4 * 24


def test_random_numbers_are_not_known_beforehand() -> None:
    nodes = [
        helper.make_node("RandomNormal", [], ["r"], "random", shape=[4, 6]),
        helper.make_node("Add", ["x", "r"], ["y"], "add"),
    ]
    assert rows(model_of(nodes, {"x": (4, 6)}, ["y"], {}))["random"].provenance == "roofline"


def test_a_lookup_reads_rows_and_not_the_table() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["at"], "cast", to=7),
        helper.make_node("Gather", ["table", "at"], ["y"], "gather"),
    ]
    model = model_of(nodes, {"x": (3,)}, ["y"], {"table": normal(0, 1000, 8)})
    assert rows(model)["gather"].bytes == 3 * 8 + 2 * (3 * 8 * 4)


def test_what_is_read_twice_is_counted_once() -> None:
    model = model_of([helper.make_node("Mul", ["x", "x"], ["y"], "square")], {"x": (5,)}, ["y"], {})
    assert rows(model)["square"].bytes == 40


def test_products_that_no_kernel_takes_have_their_roofline() -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up")
    model = model_of([node], {"x": (1, 256, 64, 64)}, ["y"], {"w": normal(0, 256, 256, 3, 3)})
    row = rows(model)["up"]
    flops = 2 * 256 * 64 * 64 * 256 * 9
    assert (row.flops, row.unit, row.provenance, row.kernel) == (flops, "fp32", "roofline", "")
    assert row.time_us == pytest.approx(roofline_us(flops, row.bytes, "fp32", DEVICE) + LAUNCH)
    assert flops / 35.6e6 > row.bytes / 936e3  # arithmetic is what decides here


def test_a_device_that_can_t_run_a_problem_is_no_error() -> None:
    old = resolve_device("sm_75")
    row = rows(layer(), old)["matmul"]
    assert row.time_us > 0
    limited = replace(DEVICE, shared_per_block=256)
    row = rows(layer(), limited)["matmul"]
    assert row.provenance == "roofline"
    assert row.flops == 2 * 256 * 1024 * 512


def test_the_launch_is_that_of_the_prediction() -> None:
    assert launch_us(DEVICE) == pytest.approx(LAUNCH)
    assert memory_us(0, DEVICE) == pytest.approx(LAUNCH)
    assert memory_us(BANDWIDTH * 10, DEVICE) == pytest.approx(LAUNCH + 10)


def test_roofs_are_of_the_units_in_use() -> None:
    found = roofs(DEVICE, estimate(layer(), DEVICE))
    assert (found.bandwidth_gbs, found.tflops) == (936, {"fp16": 71.2})


def test_a_fused_node_stands_for_the_nodes_it_replaced() -> None:
    assert pairing(layer(), fused()) == {"layer": ("matmul", "add", "relu")}


def test_a_fused_node_stands_for_what_moves_behind_it_give() -> None:
    """But for the moves that were there before."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "product"),
        helper.make_node("Transpose", ["p"], ["t"], "turn", perm=[1, 0]),
        helper.make_node("Relu", ["t"], ["y"], "relu"),
    ]
    original, changed = (model_of(nodes, {"x": (4, 8)}, ["y"], {"w": np.ones((8, 6), np.float32)}) for _ in range(2))
    fuse(changed)
    assert pairing(original, changed) == {"product": ("product", "relu"), "turn": ("turn",)}


def test_a_step_of_another_shape_stands_for_that_of_its_name() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantise"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantise"),
        helper.make_node("Conv", ["d", "f"], ["c"], "layer"),
        helper.make_node("Relu", ["c"], ["y"], "relu"),
    ]
    constants = {"s": np.float32(0.1), "z": np.int8(0), "f": np.ones((16, 16, 3), np.float32)}
    original, changed = (model_of(nodes, {"x": (1, 16, 21)}, ["y"], constants) for _ in range(2))
    fuse(changed)
    assert {name: stands_for for name, stands_for in pairing(original, changed).items() if stands_for} == {
        "quantise": ("quantise",),
        "dequantise": ("dequantise",),
        "layer": ("layer", "relu"),
    }


def test_nodes_that_stay_stand_for_themselves_and_new_ones_for_none() -> None:
    original = layer()
    changed = layer()
    cast = ir.node("Cast", [changed.graph.inputs[0]], {"to": 1}, name="cast")
    cast.outputs[0].name = "x32"
    changed.graph.insert_before(changed.graph.node(0), cast)
    assert pairing(original, changed) == {"cast": (), "matmul": ("matmul",), "add": ("add",), "relu": ("relu",)}


def test_a_node_that_two_need_is_counted_with_the_first() -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["n"], "neg"),
        helper.make_node("Relu", ["n"], ["a"], "left"),
        helper.make_node("Abs", ["n"], ["b"], "right"),
        helper.make_node("Add", ["a", "b"], ["y"], "sum"),
    ]
    original = model_of(nodes, {"x": (4,)}, ["y"], {})
    # A model in which `left` and `right` each do the negation themselves.
    changed = model_of(
        [helper.make_node("Softplus", ["x"], ["a"], "l"), helper.make_node("Exp", ["x"], ["b"], "r"), nodes[3]],
        *({"x": (4,)}, ["y"], {}),
    )
    assert pairing(original, changed) == {"l": ("neg", "left"), "r": ("right",), "sum": ("sum",)}


def test_results_of_unknown_size_count_nothing() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "relu"),
        helper.make_node("NonZero", ["a"], ["i"], "places"),
        helper.make_node("Cast", ["i"], ["y"], "cast", to=1),
    ]
    assert rows(model_of(nodes, {"x": (256, 512)}, ["y"], {}))["places"].time_us == pytest.approx(
        memory_us(4 * 256 * 512, DEVICE)
    )
