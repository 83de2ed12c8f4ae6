"""Building an engine: what TensorRT is asked for, and what becomes of its failures. No builder is here: it is made up,
but for the one test that asks the real bindings."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager
from dataclasses import replace

import onnx
import pytest

from tests.kernels.tensorrt import stubs
from tests.kernels.tensorrt.fake_tensorrt import Fake
from tests.kernels.tensorrt.lives import lead
from tilewright.kernels import resolve_device
from tilewright.kernels.tensorrt import build_engine, engine
from tilewright.kernels.tensorrt.context import Tactics, Target
from tilewright.tuning_db.errors import MissingDependencyError, RunError, UnsupportedError, UsageError

PROFILE = {"x": ((1, 512), (64, 512), (512, 512))}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.ModelProto(producer_name="test").SerializeToString())
    return path


@pytest.fixture
def build(model, monkeypatch):
    """Builds by a TensorRT that fails at one step, or not; gives the engine, or raises."""
    asked = []
    monkeypatch.setattr(engine, "register", lambda device, **given: asked.append((device, given)))
    monkeypatch.setattr(engine, "_current_gpu", lambda: "cuda:0")

    def build(fails="", inputs=None, live="cuda:0", layers=(), **given):
        device = replace(resolve_device("rtx3090"), live=live)
        monkeypatch.setattr(engine, "current", lambda: Tactics(Target(device, "12.8", 8)))
        fake = Fake(inputs or {"x": (-1, 512), "mask": (1, 1)}, fails, layers)
        monkeypatch.setattr(engine, "tensorrt", lambda: fake)
        given = {"profiles": PROFILE} | given
        return build_engine(model, model.with_name("model.engine"), **given), fake, asked

    return build


def test_an_engine_and_what_it_was_made_of(build):
    made, fake, asked = build(device="cuda:0", cuda="12.4", tactics=3, db="records", workspace_bytes=2**20)
    assert asked == [("cuda:0", {"cuda": "12.4", "tactics": 3, "db": "records"})]
    assert made.path.read_bytes() == b"the engine"
    flags = [1 << 1 | 1 << 2]  # strongly typed, and plugins ahead of time
    assert fake.did[:3] == [("flags", *flags), ("memory", "workspace", 2**20), ("shape", "x", *PROFILE["x"])]
    assert ("profile",) in fake.did
    written = json.loads(made.provenance_path.read_text())
    assert written == json.loads(json.dumps(made.provenance))
    assert (written["device"], written["cuda"], written["tensorrt"]) == ("rtx3090-82sm", "12.8", "11.4.0")
    assert written["profiles"] == {"x": [[1, 512], [64, 512], [512, 512]]}
    assert set(written["kernels"]) == {"gemm", "conv2d", "attention", "rmsnorm"}
    assert made.provenance_path.name == "model.engine.json"


def test_python_plugins_are_asked_for(build):
    assert build(implementation="jit")[1].did[0] == ("flags", 1 << 1 | 1 << 3)


def test_without_dynamic_inputs_there_is_no_profile(build):
    assert ("profile",) not in build(inputs={"x": (8, 512)}, profiles={})[1].did


def test_a_size_may_be_0_in_a_profile(build):
    profile = ((0, 512), (64, 512), (512, 512))
    assert ("shape", "x", *profile) in build(profiles={"x": profile})[1].did


def test_timings_are_read_and_written(build, tmp_path):
    cache = tmp_path / "timings"
    assert ("timings", b"") in build(timing_cache=cache)[1].did
    assert cache.read_bytes() == b"timings"
    assert ("timings", b"timings") in build(timing_cache=cache)[1].did
    # Those of another GPU are begun anew.
    assert [each for each in build("cache", timing_cache=cache)[1].did if each[0] == "timings"][-1] == ("timings", b"")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"fails": "builder"}, MissingDependencyError, r"this TensorRT 11.4.0 has no builder: pip install"),
        ({"live": ""}, UsageError, "TensorRT builds for the GPU at hand, and rtx3090 is not here: leave device out"),
        ({"fails": "parse"}, UsageError, r"TensorRT can't read .*model.onnx: node 3: no such op$"),
        ({"fails": "build"}, RunError, r"could not build .*model.onnx: no tactic for layer 1$"),
        ({"implementation": "both"}, UsageError, "implementation='both' must be aot or jit"),
        ({"profiles": {}}, UsageError, r"profiles lacks the least, best and largest shape of x \(-1, 512\)"),
        ({"profiles": {"y": PROFILE["x"]}}, UsageError, "the model has no input 'y'; it has x, mask"),
        ({"profiles": {"x": ((1, 5), (2, 5), (3, 5))}}, UsageError, r"\(1, 5\) of x does not go with its shape"),
        ({"profiles": {"x": ((9, 512), (2, 512), (3, 512))}}, UsageError, "the profile of x must grow"),
        (
            {"profiles": {"x": ((9, 512), (12, 512))}},
            UsageError,
            r"profile of x is \(\(9, 512\), .* must be its least, best",
        ),
        (
            {"profiles": 5},
            UsageError,
            "profiles=5 must be a mapping, from inputs to their least, best",
        ),
        ({"profiles": {"x": (1, 2, 3)}}, UsageError, r"the profile of x is \(1, 2, 3\) and must be its least, best"),
        ({"profiles": {"x": ((-1, 512), (2, 512), (3, 512))}}, UsageError, "must be its least, best"),
        ({"fails": "profile"}, UsageError, r"TensorRT refuses the profile x \(1, 512\), \(64, 512\), \(512, 512\)"),
        ({"live": "cuda:1"}, UsageError, "the current GPU, which is cuda:0, not cuda:1: make that current"),
        ({"timing_cache": "/none/timings"}, UsageError, "/none/timings can't be written: there is no folder /none"),
    ],
)
def test_failures_leave_nothing_behind(build, model, given, error, message):
    with pytest.raises(error, match=message) as caught:
        build(**given)
    assert "\n" not in str(caught.value)
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]


def test_places_that_can_not_be_written_are_known_before_the_build(build, model):
    beside = model.with_name("model.engine.json")
    beside.mkdir()
    with pytest.raises(UsageError, match=r"model.engine.json can't be written: it is a folder"):
        build()
    assert not model.with_name("model.engine").exists()
    with pytest.raises(UsageError, match="there is no folder"):
        build_engine(model, model.parent / "none" / "model.engine")


def test_every_fused_node_must_be_a_plugin(build, model):
    """Not one that TensorRT has made of its body, which it finds by the name alone."""
    nodes = [
        onnx.helper.make_node("FusedGemm", ["a", "b"], ["c"], domain="tilewright.0123abcd"),
        onnx.helper.make_node("FusedGemm", ["c", "b"], ["d"], domain="tilewright"),
        onnx.helper.make_node("Relu", ["d"], ["e"]),
        onnx.helper.make_node("FusedGemm", ["e", "b"], ["f"], domain="elsewhere"),
    ]
    model.write_bytes(onnx.ModelProto(graph=onnx.GraphProto(node=nodes)).SerializeToString())
    assert build(layers=["plugin", "plugin", "activation"])[0].path.exists()
    model.with_name("model.engine").unlink()
    with pytest.raises(UsageError, match=r"11.4.0 took 1 of the 2 fused nodes of .*model.onnx for plugins: each"):
        build(layers=["plugin", "matrix", "activation"])
    assert not model.with_name("model.engine").exists()


def test_a_full_disk_leaves_an_engine_and_what_it_was_made_of(build, monkeypatch):
    made, _, _ = build()
    before = made.path.read_bytes(), made.provenance_path.read_bytes()
    whole_file = engine.whole_file

    class Full(io.BytesIO):
        def flush(self):
            raise UsageError("the disk is full")

    @contextmanager
    def full(path):
        with whole_file(path):
            yield Full()

    monkeypatch.setattr(engine, "whole_file", full)
    with pytest.raises(UsageError, match="the disk is full"):
        build()
    assert (made.path.read_bytes(), made.provenance_path.read_bytes()) == before


def test_no_engine_lies_beside_what_another_was_made_of(build, model, monkeypatch):
    """Whoever is killed between the two files leaves an engine without the other."""
    build()

    class Killed(BaseException):
        pass

    whole_file = engine.whole_file

    def killed(path):
        if path.suffix == ".json":
            raise Killed
        return whole_file(path)

    monkeypatch.setattr(engine, "whole_file", killed)
    with pytest.raises(Killed):
        build(timing_cache=model.with_name("timings"))
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.engine", "model.onnx"]


@pytest.mark.parametrize("fails", ["parse", "build"])
def test_what_a_plugin_raised_is_raised(build, monkeypatch, fails):
    """TensorRT only says that a plugin failed."""
    error = UnsupportedError("FusedGemm has no tactic")
    monkeypatch.setattr(Tactics, "take_failure", lambda tactics: error)
    with pytest.raises(UnsupportedError) as raised:
        build(fails)
    assert raised.value is error


def test_a_build_holds_what_is_registered(build, monkeypatch):
    held = []
    monkeypatch.setattr(engine, "register", lambda *_, **__: held.append(engine._building.locked()))
    build()
    assert held == [True]


def test_no_such_model(tmp_path):
    with pytest.raises(UsageError, match=r"there is no file .*none.onnx"):
        build_engine(tmp_path / "none.onnx", tmp_path / "engine")


@pytest.mark.skipif(stubs.missing() is not None, reason=str(stubs.missing()))
def test_bindings_without_a_builder_say_so(model):
    script = f"""
from tilewright.tuning_db.errors import MissingDependencyError
try:
    plugins.build_engine({str(model)!r}, {str(model)!r} + ".engine", device="sm_86")
except MissingDependencyError as error:
    assert "has no builder: pip install" in str(error), error
else:
    raise AssertionError("an engine without a builder")
"""
    lead("sm_86", [], script=script)
