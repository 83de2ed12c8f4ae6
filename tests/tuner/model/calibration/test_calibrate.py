"""Scales against ONNX Runtime's calibrators, on activations of a network, and how they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.calibrate import EntropyCalibrater, MinMaxCalibrater, PercentileCalibrater

from tilewright.tuner.model.calibration import calibrate as calibration
from tilewright.tuner.model.calibration.calibrate import Method, Settings, calibrate, calibration_key, load, save
from tilewright.tuner.model.calibration.calibrators import EMPTY_SCALE
from tilewright.tuning_db.errors import ModelError, UsageError

INPUT = (2, 8, 16, 16)
VALUES = {
    "hidden": "symmetric: a convolution",
    "relu": "half of it 0",
    "gelu": "a long tail on one side",
    "heavy": "log-normal: the largest is a thousand times the middle one",
    "negative": "no positive numbers",
    "offset": "far from 0",
    "saturated": "most of it 0 or 6",
    "tiny": "around 1e-30",
    "constant": "one number",
    "zero": "nothing but 0",
}
METHODS = list(Method)
QUICK = Settings(entropy_bins=256)


@pytest.fixture(scope="module")
def proto() -> onnx.ModelProto:
    """A convolution and what activations make of it."""
    weight = np.random.default_rng(0).normal(0, (2 / 72) ** 0.5, (16, 8, 3, 3)).astype(np.float32)
    numbers = {"tenth": 0.1, "factor": 0.75, "five": 5.0, "small": 1e-30, "null": 0.0, "minus": -3.3}
    numbers |= {"root": 2**-0.5, "one": 1.0, "low": 0.0, "high": 6.0, "ten": 10.0}
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["hidden"], pads=[1, 1, 1, 1]),
        node("Relu", ["hidden"], ["relu"]),
        node("Mul", ["hidden", "root"], ["scaled"]),
        node("Erf", ["scaled"], ["erf"]),
        node("Add", ["erf", "one"], ["raised"]),
        node("Mul", ["hidden", "raised"], ["gelu"]),
        node("Mul", ["hidden", "factor"], ["wide"]),
        node("Exp", ["wide"], ["heavy"]),
        node("Neg", ["relu"], ["negative"]),
        node("Mul", ["erf", "tenth"], ["narrow"]),
        node("Add", ["narrow", "five"], ["offset"]),
        node("Mul", ["hidden", "ten"], ["strong"]),
        node("Clip", ["strong", "low", "high"], ["saturated"]),
        node("Mul", ["hidden", "small"], ["tiny"]),
        node("Mul", ["hidden", "null"], ["zero"]),
        node("Add", ["zero", "minus"], ["constant"]),
        node("Sum", list(VALUES), ["y"]),
    ]
    weights = [numpy_helper.from_array(weight, "w")]
    weights += [numpy_helper.from_array(np.float32(number), name) for name, number in numbers.items()]
    shape = [2, 16, 16, 16]
    graph = helper.make_graph(
        nodes,
        "distributions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, INPUT)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True)


@pytest.fixture
def model(proto: onnx.ModelProto) -> ir.Model:
    return ir.from_proto(proto)


FEEDS = [
    {"x": np.random.default_rng(number).standard_normal(INPUT).astype(np.float32) * (1 + number / 4)}
    for number in range(8)
]
"""65 536 numbers a value, the largest not in the first feed."""


class Reader:
    """Feeds as ONNX Runtime's calibrators want them."""

    def __init__(self) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = iter(FEEDS)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def scales_of_onnx_runtime(
    calibrater: type, proto: onnx.ModelProto, folder: Path, **settings: object
) -> dict[str, float]:
    """What ONNX Runtime's quantiser makes of a range: its larger end becomes 127."""
    onnx.save(proto, folder / "model.onnx")
    made = calibrater(
        folder / "model.onnx", augmented_model_path=str(folder / "augmented.onnx"), symmetric=True, **settings
    )
    made.augment_graph()
    made.create_inference_session()
    made.collect_data(Reader())
    ranges = {name: each.range_value for name, each in made.compute_data().data.items()}
    return {name: float(np.abs(ends).max()) / 127 for name, ends in ranges.items()}


@pytest.mark.parametrize(
    ("method", "calibrater", "theirs", "ours"),
    [
        (Method.MINMAX, MinMaxCalibrater, {}, Settings()),
        (Method.PERCENTILE, PercentileCalibrater, {}, Settings()),
        (Method.PERCENTILE, PercentileCalibrater, {"percentile": 99.9}, Settings(percentile=99.9)),
        (Method.ENTROPY, EntropyCalibrater, {"num_bins": 256}, Settings(entropy_bins=256)),
        (Method.ENTROPY, EntropyCalibrater, {"num_bins": 510, "num_quantized_bins": 255}, Settings(99, 510, 255)),
        (Method.ENTROPY, EntropyCalibrater, {}, Settings(entropy_bins=128)),
    ],
    ids=["minmax", "99.999", "99.9", "256 bins", "510 bins", "128 bins"],
)
def test_scales_equal_those_of_onnx_runtime(
    method: Method,
    calibrater: type,
    theirs: dict[str, object],
    ours: Settings,
    proto: onnx.ModelProto,
    model: ir.Model,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    wanted = scales_of_onnx_runtime(calibrater, proto, tmp_path, **theirs)
    got = calibrate(model, FEEDS, list(VALUES), methods=[method], target="int8", settings=ours)[method]
    for name in VALUES:
        if name == "zero":  # for which its quantiser takes 1
            assert wanted[name] == 0
            assert got[name] == EMPTY_SCALE
        else:
            assert got[name] == pytest.approx(wanted[name], rel=1e-4), name


@pytest.mark.slow
def test_entropy_equals_that_of_onnx_runtime_with_as_many_bins(
    proto: onnx.ModelProto, model: ir.Model, tmp_path: Path
) -> None:
    """Ours by default, 2048: ONNX Runtime takes seconds for each value."""
    wanted = scales_of_onnx_runtime(EntropyCalibrater, proto, tmp_path, num_bins=2048)
    got = calibrate(model, FEEDS, list(VALUES), methods=[Method.ENTROPY], target="int8")[Method.ENTROPY]
    assert {name: got[name] for name in VALUES if name != "zero"} == pytest.approx(
        {name: wanted[name] for name in VALUES if name != "zero"}, rel=1e-4
    )


def test_methods_do_not_depend_on_each_other_or_on_how_the_data_is_divided(model: ir.Model) -> None:
    together = calibrate(model, FEEDS, ["heavy", "relu", "x"], methods=METHODS, target="int8")
    assert list(together) == METHODS
    backwards = FEEDS[::-1]
    for method in METHODS:
        alone = calibrate(model, backwards, ["heavy", "relu"], methods=[method], target="int8")
        assert alone == {method: {name: together[method][name] for name in ("heavy", "relu")}}
    assert len({together[method]["heavy"] for method in METHODS}) == 4


def test_fp8_scales_cover_the_same_range(model: ir.Model) -> None:
    as_int8 = calibrate(model, FEEDS, list(VALUES), methods=METHODS, target="int8", settings=QUICK)
    as_fp8 = calibrate(model, FEEDS, list(VALUES), methods=METHODS, target="fp8e4m3", settings=QUICK)
    for method in (Method.MINMAX, Method.PERCENTILE, Method.ENTROPY):
        for name in VALUES:
            factor = 1 if name == "zero" else 127 / 448
            assert as_fp8[method][name] == pytest.approx(as_int8[method][name] * factor)
    assert as_fp8[Method.MSE]["relu"] * 448 != pytest.approx(as_int8[Method.MSE]["relu"] * 127, rel=0.001)


def test_the_model_runs_once_or_twice(model: ir.Model) -> None:
    for methods, passes in (([Method.MINMAX], 1), ([Method.MSE], 2), (METHODS, 2)):
        said: list[tuple[int, int]] = []

        def progress(*each: int, said: list[tuple[int, ...]] = said) -> None:
            said.append(each)

        calibrate(model, FEEDS, ["x", "relu"], methods=methods, target="int8", settings=QUICK, progress=progress)
        total = passes * len(FEEDS)
        assert said == [(number + 1, total) for number in range(total)]


def test_values_in_groups(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 KiB each: three groups of one, and what that changes is the memory."""
    names = ["relu", "heavy", "gelu"]
    whole = calibrate(model, FEEDS, names, methods=METHODS, target="int8", settings=QUICK)
    monkeypatch.setattr(calibration, "GROUP_BYTES", 40_000)
    said = []
    parts = calibrate(
        model, FEEDS, names, methods=METHODS, target="int8", settings=QUICK, progress=lambda *each: said.append(each)
    )
    assert parts == whole
    assert list(parts[Method.MSE]) == names
    assert said[-1] == (48, 48)


def test_half_precision_values() -> None:
    """The scale of an fp16 or bf16 value is that of the numbers it has."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["x"], ["brain"], to=TensorProto.BFLOAT16),
    ]
    kinds = {"half": TensorProto.FLOAT16, "brain": TensorProto.BFLOAT16}
    graph = helper.make_graph(
        nodes,
        "halves",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info(name, kind, [3]) for name, kind in kinds.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    feed = {"x": np.array([0.1, -1.001, 0.7], np.float32)}
    scales = calibrate(model, [feed], ["half", "brain"], methods=[Method.MINMAX], target="int8")[Method.MINMAX]
    assert scales == {"half": float(np.float16(1.001)) / 127, "brain": 1.0 / 127}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_without_a_scale(bad: float, model: ir.Model) -> None:
    broken = {"x": FEEDS[1]["x"].copy()}
    broken["x"][0, 0, 0, 0] = bad
    with pytest.raises(ModelError, match=r"value 'hidden' has \d+ NaN or infinite of 8192 numbers for .* sample 1"):
        calibrate(model, [FEEDS[0], broken], ["hidden"], methods=METHODS, target="int8")


def test_what_cannot_be_calibrated(model: ir.Model) -> None:
    with pytest.raises(ModelError, match="no calibration samples"):
        calibrate(model, [], ["relu"], methods=METHODS, target="int8")
    with pytest.raises(ModelError, match="no value 'nowhere'"):
        calibrate(model, FEEDS, ["nowhere"], methods=METHODS, target="int8")
    with pytest.raises(UsageError, match="target='int4' must be one of int8, uint8, fp8e4m3"):
        calibrate(model, FEEDS, ["relu"], methods=METHODS, target="int4")
    model.graph.inputs[0].dtype = ir.DataType.INT64
    with pytest.raises(ModelError, match="value 'x' is int64: only fp32, fp16, bf16 are calibrated"):
        calibrate(model, FEEDS, ["x"], methods=METHODS, target="int8")


SCALES = {Method.MINMAX: {"a": 0.1, "b/c": 1 / 3}, Method.MSE: {"a": 0.05, "b/c": 1e-30}}


def test_scales_are_kept_under_their_key(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    assert load(path, "key") is None
    save(path, "key", SCALES)
    assert load(path, "key") == SCALES
    assert load(path, "other") is None
    assert [each.name for each in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ('{"format": 1, "key": "key", "scales": {"minmax": {"a": 0.1}', "no JSON"),
        ('{"format": 1, "key": "key"}', "scales is missing"),
        ('{"format": 1, "key": "key", "scales": {"best": {}}}', "'best' is no method"),
        ('{"format": 1, "key": "key", "scales": {"minmax": 3}}', "minmax is 3"),
        ('{"format": 1, "key": "key", "scales": {"minmax": {"a": -1}}}', "a=-1 must be a finite number above 0"),
        ('{"format": 1, "key": "key", "scales": {"minmax": {"a": "x"}}}', "a='x' must be"),
    ],
)
def test_damaged_files_of_scales(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=words) as caught:
        load(path, "key")
    assert "delete it" in str(caught.value)


def test_a_key_is_of_everything_that_scales_depend_on(tmp_path: Path) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    first.write_bytes(b"model")
    second.write_bytes(b"other")
    keys = {
        calibration_key(files, data, values, methods=methods, target=target, settings=settings)
        for files, data, values, methods, target, settings in [
            ([first], "data", ["a"], METHODS, "int8", None),
            ([second], "data", ["a"], METHODS, "int8", None),
            ([first, second], "data", ["a"], METHODS, "int8", None),
            ([first], "more", ["a"], METHODS, "int8", None),
            ([first], "data", ["b"], METHODS, "int8", None),
            ([first], "data", ["a"], METHODS[:1], "int8", None),
            ([first], "data", ["a"], METHODS, "fp8e4m3", None),
            ([first], "data", ["a"], METHODS, "int8", Settings(percentile=99)),
        ]
    }
    assert len(keys) == 8
    again = calibration_key([first], "data", ["a"], methods=METHODS, target="int8", settings=Settings())
    assert again in keys
    with pytest.raises(ModelError, match=r"c\.onnx can't be read"):
        calibration_key([tmp_path / "c.onnx"], "data", [], methods=METHODS, target="int8")
