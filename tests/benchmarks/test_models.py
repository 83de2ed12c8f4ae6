from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array, to_array

from benchmarks.models import ARCHITECTURES, architecture, build, build_ir, samples, without, write
from benchmarks.models.architecture import TRANSFORMERS, blank
from benchmarks.models.figures import figures, input_share, logits_of
from benchmarks.models.light import FOLDER, LOGITS, read
from benchmarks.models.operators import HEAVY, session_options
from benchmarks.models.seeding import SAMPLES
from benchmarks.models.transformers import DecoderSize, decoder
from tilewright.tuning_db.errors import ModelError, UsageError

ROOT = Path(__file__).parents[2]
NAMES = tuple(known.name for known in ARCHITECTURES)
MANY_NODES = {"densenet121", "inception_v2", "shufflenet"}
"""They take the longest, and have nothing that the others lack."""

QUICK = [pytest.param(name, marks=pytest.mark.slow) if name in MANY_NODES else name for name in NAMES]
VISIBLE = 0.05
"""What zeroing a layer must do to the logits, relative: ten times the bar of fp16 and far above that of fp32."""

EVERY = 12
"""The quick test zeroes the weights of every so manieth layer."""

Array = np.ndarray[Any, Any]


@functools.cache
def small(name: str) -> onnx.ModelProto:
    return build(name, small=True)


def run(model: onnx.ModelProto, feeds: list[dict[str, Array]], outputs: list[str] | None = None) -> list[list[Array]]:
    """ONNX Runtime on the whole model; `outputs` may name any value."""
    if outputs:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        model = copy
        there = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in there)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(), ["CPUExecutionProvider"])
    return [session.run(outputs, feed) for feed in feeds]


def relative(found: Array, expected: Array) -> float:
    return float(abs(found - expected).max() / abs(expected).max())


def check_figures(name: str, *, full: bool) -> None:
    known = architecture(name)
    found = figures(build_ir(name, small=not full), known.logits, samples(name, 12, 1, small=not full))
    assert found.share >= 0.1
    assert found.cosine < 0.9
    assert found.classes >= 4
    assert found.quietest[0] >= 0.05
    assert found.loudest[0] <= 20
    # Rounding must not drown what the input says: 1 % is 40 dB, what int8 is measured against.
    assert found.half_noise < 0.01


@pytest.mark.parametrize("name", QUICK)
def test_logits_depend_on_the_input_and_activations_stay_within_bounds(name: str) -> None:
    check_figures(name, full=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_so_they_do_at_full_size(name: str) -> None:
    check_figures(name, full=True)


@pytest.mark.parametrize("name", QUICK)
def test_models_are_sound_and_repeat_to_the_byte(name: str) -> None:
    model = small(name)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", architecture(name).opset)]
    assert {value.name for value in model.graph.input} == set(samples(name, 1, small=True)[0])
    assert max(Counter(node.name for node in model.graph.node).values()) == 1
    assert build(name, small=True).SerializeToString() == model.SerializeToString()


def test_another_seed_gives_other_weights() -> None:
    first, second = (
        {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
        for model in (small("squeezenet"), build("squeezenet", seed=1, small=True))
    )
    assert first.keys() == second.keys()
    assert all((first[name] != second[name]).mean() > 0.99 for name in first)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["resnet50", "bert_opset17"])
def test_full_models_repeat_to_the_byte(name: str) -> None:
    assert build(name).SerializeToString() == build(name).SerializeToString()


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_both_dialects_of_a_transformer_give_the_same(family: str) -> None:
    check_dialects(family, full=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_both_dialects_give_the_same_at_full_size(family: str) -> None:
    check_dialects(family, full=True)


def check_dialects(family: str, *, full: bool) -> None:
    feeds = samples(f"{family}_opset17", 4, 3, small=not full)
    results = []
    for opset in (17, 23):
        model = build(f"{family}_opset{opset}") if full else small(f"{family}_opset{opset}")
        ops = {node.op_type for node in model.graph.node}
        assert ("Attention" in ops) == (opset == 23)
        assert ("Softmax" in ops) == (opset == 17)
        results.append(run(model, feeds))
    for decomposed, operators in zip(*results, strict=True):
        assert len(decomposed) == (1 + 2 * (12 if full else 2) if family == "gpt" else 1)
        for one, other in zip(decomposed, operators, strict=True):
            assert relative(other, one) <= 1e-5


def test_attention_of_a_transformer_is_the_textbook_s() -> None:
    """The decoder's first layer in NumPy, from the model's own normalised input."""
    model = small("gpt_opset17")
    weights = {tensor.name: to_array(tensor).astype(np.float64) for tensor in model.graph.initializer}
    size = TRANSFORMERS["gpt"].small
    feed = samples("gpt_opset17", 1, small=True)[0]
    layer = "model.layers.0."
    projected = next(node for node in model.graph.node if f"{layer}self_attn.q_proj.weight" in node.input)
    out = next(node for node in model.graph.node if f"{layer}self_attn.o_proj.weight" in node.input)
    normed, expected = run(model, [feed], [projected.input[0], out.output[0]])[0]
    x = normed[0].astype(np.float64)
    width = size.hidden // size.heads

    def turned(name: str, heads: int) -> Array:
        y = (x @ weights[f"{layer}self_attn.{name}.weight"]).reshape(size.sequence, heads, width).swapaxes(0, 1)
        if name == "v_proj":
            return y
        angles = feed["position_ids"][0][:, None] / 10000.0 ** (np.arange(0, width, 2) / width)
        rotated = (y[..., : width // 2] + 1j * y[..., width // 2 :]) * np.exp(1j * angles)
        return np.concatenate([rotated.real, rotated.imag], axis=-1)

    q, k, v = turned("q_proj", size.heads), turned("k_proj", size.kv_heads), turned("v_proj", size.kv_heads)
    k = np.concatenate([feed["past_key_values.0.key"][0], k], axis=1).repeat(size.heads // size.kv_heads, axis=0)
    v = np.concatenate([feed["past_key_values.0.value"][0], v], axis=1).repeat(size.heads // size.kv_heads, axis=0)
    scores = q @ k.swapaxes(1, 2) / math.sqrt(width)
    scores[:, np.arange(size.past + size.sequence) > size.past + np.arange(size.sequence)[:, None]] = -np.inf
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (chances / chances.sum(-1, keepdims=True)) @ v
    result = mixed.swapaxes(0, 1).reshape(size.sequence, size.hidden) @ weights[f"{layer}self_attn.o_proj.weight"]
    assert relative(expected[0], result) < 1e-5


def test_padding_of_the_encoder_is_not_seen() -> None:
    model, (feed,) = small("bert_opset17"), samples("bert_opset17", 1, 4, small=True)
    other = feed | {"input_ids": np.where(feed["attention_mask"] == 1, feed["input_ids"], 7)}
    assert (other["input_ids"] != feed["input_ids"]).any()
    (one,), (two,) = run(model, [feed, other])
    assert relative(two, one) < 1e-6


def layers(model: ir.Model) -> list[str]:
    """The nodes with weights."""
    names = [node.name or "" for node in model.graph if node.op_type in HEAVY and weighted(node)]
    assert len(names) > 7
    return names


def weighted(node: ir.Node) -> bool:
    value = node.inputs[1]
    while value is not None and (producer := value.producer()) is not None:
        value = producer.inputs[0] if producer.op_type == "Reshape" else None
    return value is not None and value.is_initializer()


def check_controls(name: str, every: int) -> None:
    known, model = architecture(name), ir.from_proto(small(name))
    feeds = samples(name, 2, 5, small=True)
    expected = np.stack([logits.reshape(-1) for (logits,) in run(small(name), feeds, [known.logits])])
    names = layers(model)
    for layer in {*names[::every], names[-1]}:
        changed = ir.to_proto(without(model, layer))
        found = np.stack([logits.reshape(-1) for (logits,) in run(changed, feeds, [known.logits])])
        assert relative(found, expected) >= VISIBLE, layer
    again = np.stack([logits.reshape(-1) for (logits,) in run(ir.to_proto(model), feeds, [known.logits])])
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize(
    "name", [known.name for known in ARCHITECTURES if known.opset != 23 and known.name not in MANY_NODES]
)
def test_a_layer_without_weights_is_seen_at_the_logits(name: str) -> None:
    check_controls(name, EVERY)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_every_layer_without_weights_is_seen_at_the_logits(name: str) -> None:
    check_controls(name, 1)


def test_a_control_takes_the_weights_of_one_node_alone() -> None:
    """One weight for two nodes, and one behind a DequantizeLinear with a zero point and a Transpose."""
    graph = make_graph(
        [
            make_node("MatMul", ["x", "w"], ["a"], "first"),
            make_node("MatMul", ["a", "w"], ["b"], "second"),
            make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantise"),
            make_node("Transpose", ["d"], ["t"], "transpose"),
            make_node("MatMul", ["b", "t"], ["y"], "third"),
            make_node("Relu", ["y"], ["z"], "relu"),
        ],
        "graph",
        [make_tensor_value_info("x", 1, (2, 3))],
        [make_tensor_value_info("z", 1, (2, 5)), make_tensor_value_info("b", 1, (2, 3))],
        [
            from_array(np.eye(3, dtype=np.float32), "w"),
            from_array(np.arange(15, dtype=np.uint8).reshape(5, 3), "q"),
            from_array(np.float32(0.5), "scale"),
            from_array(np.uint8(128), "zero"),
        ],
    )
    model = ir.from_proto(make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10))
    x = -np.ones((2, 3), np.float32)
    z, b = run(ir.to_proto(model), [{"x": x}])[0]
    assert z.min() > 0
    nothing, still = run(ir.to_proto(without(model, "third")), [{"x": x}])[0]
    assert not nothing.any()
    np.testing.assert_array_equal(still, b)
    changed = without(model, "second")
    assert [value.name for value in changed.graph.node("first").inputs] == ["x", "w"]
    assert not run(ir.to_proto(changed), [{"x": x}])[0][1].any()
    with pytest.raises(ModelError, match=r"node 'relu' \(Relu\) has no constant input"):
        without(model, "relu")
    with pytest.raises(ModelError, match="no node 'fourth' in the graph: name one of its 6 nodes"):
        without(model, "fourth")


def test_batch_normalisations_have_the_statistics_of_their_inputs() -> None:
    model = small("resnet50")
    arrays = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    feeds = samples("resnet50", SAMPLES, 2**31, small=True)
    inputs = [np.concatenate(column) for column in zip(*run(model, feeds, [n.input[0] for n in norms]), strict=True)]
    for node, x in zip(norms, inputs, strict=True):
        mean, variance = x.mean((0, 2, 3), np.float64), x.var((0, 2, 3), np.float64)
        np.testing.assert_allclose(arrays[node.input[4]], variance, rtol=1e-3)
        np.testing.assert_allclose(arrays[node.input[3]], mean, atol=1e-3 * float(np.sqrt(variance).max()))


def test_layers_without_normalisation_have_unit_variance_before_the_relu() -> None:
    model = small("vgg19")
    before = [node.input[0] for node in model.graph.node if node.op_type == "Relu"]
    feeds = samples("vgg19", SAMPLES, 2**31, small=True)
    for x in (np.concatenate(column) for column in zip(*run(model, feeds, before), strict=True)):
        deviations = x.std((0, *range(2, x.ndim)))
        assert abs(deviations.mean() - 1) < 0.25
        assert deviations.min() > 0.05
        assert abs(x.mean() - 0.5) < 0.25


@pytest.mark.parametrize("name", LOGITS)
def test_light_models_keep_the_graph_of_the_file(name: str) -> None:
    graph = onnx.load(FOLDER / f"light_{name}.onnx").graph
    shapes = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    weights = {n.output[0]: shapes[n.input[0]].tolist() for n in graph.node if n.op_type == "ConstantOfShape"}
    kept = [node for node in graph.node if node.op_type != "ConstantOfShape"]
    model = ir.to_proto(read_filled(name))
    assert [node.SerializeToString() for node in model.graph.node] == [node.SerializeToString() for node in kept]
    assert list(model.graph.output) == list(graph.output)
    found = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert weights.items() <= found.items()
    assert not {value.name for value in model.graph.input} & found.keys()


def read_filled(name: str) -> ir.Model:
    """The full graph with zeros for numbers."""
    model, _ = read(name)
    for value in model.graph.initializers.values():
        if value.const_value is None:
            value.const_value = ir.tensor(np.zeros(value.shape.numpy(), np.float32), name=value.name)
    return model


def test_small_models_have_fewer_channels_and_the_same_nodes() -> None:
    full, narrow = read("resnet50")[0].graph, read("resnet50", small=True)[0].graph
    assert [node.op_type for node in narrow] == [node.op_type for node in full]
    shapes = {
        name: (full.initializers[name].shape.numpy(), value.shape.numpy())
        for name, value in narrow.initializers.items()
    }
    assert shapes["gpu_0/conv1_w_0"] == ((64, 3, 7, 7), (8, 3, 7, 7))
    assert shapes["gpu_0/res2_0_branch2a_w_0"] == ((64, 64, 1, 1), (8, 8, 1, 1))
    assert shapes["gpu_0/pred_w_0"] == ((1000, 2048), (1000, 256))


def test_the_logits_are_what_the_softmax_takes() -> None:
    for known in ARCHITECTURES:
        graph = blank(known, small=True)[0].graph
        takers = [node for node in graph if node.op_type == "Softmax" and node.outputs[0] in graph.outputs]
        taken = [node.inputs[0].name for node in takers] or [graph.outputs[0].name]
        assert taken == [known.logits]


def test_the_share_that_depends_on_the_input() -> None:
    random = np.random.default_rng(0)
    fixed, changing = random.normal(0, 3, (1, 2000)), random.normal(0, 1, (400, 2000))
    assert input_share(fixed + 0 * changing) < 1e-12
    assert input_share(changing) == pytest.approx(1, abs=0.01)
    assert input_share(fixed + changing) == pytest.approx(1 / (1 + fixed.var()), rel=0.02)


def test_logits_node_by_node_are_those_of_the_whole_model() -> None:
    feeds = samples("inception_v2", 3, 2, small=True)
    found = logits_of(ir.from_proto(small("inception_v2")), "r507", feeds)
    expected = np.concatenate([logits for (logits,) in run(small("inception_v2"), feeds, ["r507"])])
    assert relative(found, expected) < 1e-5


def test_caches_are_as_loud_as_what_is_appended_to_them() -> None:
    size = TRANSFORMERS["gpt"].small
    names = ["present.0.key", "present.1.key", "present.0.value", "present.1.value"]
    presents = np.stack(run(small("gpt_opset17"), samples("gpt_opset17", 8, 1, small=True), names)).astype(np.float64)
    old, new = presents[..., : size.past, :], presents[..., size.past :, :]
    np.testing.assert_allclose(new.std((0, 2, 3, 4, 5)), old.std((0, 2, 3, 4, 5)), rtol=0.1)


def test_sizes_of_a_decoder_are_arguments() -> None:
    model, parameters = decoder(DecoderSize(layers=1, hidden=32, heads=2, kv_heads=1, inner=48, vocabulary=9), 17)
    assert [tuple(value.shape.numpy()) for value in model.graph.outputs] == [
        (1, 64, 9),
        (1, 1, 128, 16),
        (1, 1, 128, 16),
    ]
    assert model.graph.initializers["lm_head.weight"].shape.numpy() == (32, 9)
    assert parameters.keys() == model.graph.initializers.keys()


def test_a_model_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write("bert_opset23", tmp_path, small=True)
    assert path == tmp_path / "bert_opset23.onnx"
    assert path.read_bytes() == small("bert_opset23").SerializeToString()
    assert [entry.name for entry in tmp_path.iterdir()] == ["bert_opset23.onnx"]
    with pytest.raises(UsageError, match="can't be written"):
        write("squeezenet", tmp_path / "missing", small=True)
    with pytest.raises(UsageError, match="no architecture 'resnet18': there are bvlc_alexnet, densenet121"):
        write("resnet18", tmp_path)


def test_the_table_of_figures() -> None:
    command = [sys.executable, "-m", "benchmarks.models", "squeezenet", "--small", "--inputs", "3", "--raw"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["nodes"] == 66
    assert 0.1 < found["share"] < 1
    assert 0 < found["size"] < 1
