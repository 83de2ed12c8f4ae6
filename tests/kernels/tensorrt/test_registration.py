"""The plugins in TensorRT's own registry: their whole life, on its real bindings, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.kernels.compiling import archs
from tests.kernels.tensorrt import jobs, stubs, variants
from tests.kernels.tensorrt.lives import Job, check, defaults, lead
from tests.kernels.tensorrt.records import put
from tilewright.kernels import AttentionProblem, Conv2dProblem, GemmConfig, GemmProblem, RmsNormProblem, resolve_device
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.tensorrt import plugin_attributes, plugins, ptx, register
from tilewright.tuning_db.env import compiling_environment
from tilewright.tuning_db.errors import UsageError

needs_bindings = pytest.mark.skipif(stubs.missing() is not None, reason=str(stubs.missing()))
ARCHS = (80, 86, 89, 90, 120)
LAYER = jobs.gemm("fp16")


@needs_bindings
@pytest.mark.parametrize("arch", [*archs(80, 89, 120), pytest.param(86, marks=pytest.mark.slow), 90])
def test_the_contract(arch, tmp_path):
    """Every op, with data types that change from arch to arch, and some tactics of each."""
    chosen = jobs.some(arch)
    answers = lead(f"sm_{arch}", chosen, tactics=2, TILEWRIGHT_DB_DIR=str(tmp_path))
    for job, answer in zip(chosen, answers, strict=True):
        check(job, answer, f"sm_{arch}")


@needs_bindings
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_contract_in_full(arch, tmp_path):
    """Every op with every data type and every tactic, through Python and through C++."""
    chosen = jobs.every(arch)
    chosen += [Job(**{**vars(job), "through": "python"}) for job in chosen]
    answers = lead(f"sm_{arch}", chosen, TILEWRIGHT_DB_DIR=str(tmp_path))
    for job, answer in zip(chosen, answers, strict=True):
        check(job, answer, f"sm_{arch}")
        configs = [one["config"] for one in answer["known"]]
        assert any(config.to_dict() in configs for config in defaults(job, f"sm_{arch}"))


@needs_bindings
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_contract_of_every_plugin(arch, tmp_path):
    """Every plugin with every data type that it takes and the arch has, and its first tactic."""
    device = resolve_device(f"sm_{arch}")
    chosen = [
        job
        for job in variants.jobs().values()
        if variants.kernel_of(job).supported(job.problem(*job.sizes[0]), device) is None
    ]
    answers = lead(f"sm_{arch}", chosen, tactics=1, TILEWRIGHT_DB_DIR=str(tmp_path))
    for job, answer in zip(chosen, answers, strict=True):
        linear = answer | {"formats": answer.get("formats", [])[:1]}  # what else there is depends on the data types
        check(job, linear, f"sm_{arch}")


@needs_bindings
@pytest.mark.parametrize("arch", [pytest.param(86, marks=pytest.mark.slow), 90])
def test_the_contract_of_layers_whose_best_takes_memory(arch, tmp_path):
    """Splits and descriptors, which predictions and defaults take here, are nothing that TensorRT launches."""
    answers = lead(f"sm_{arch}", jobs.static(), tactics=2, TILEWRIGHT_DB_DIR=str(tmp_path))
    for job, answer in zip(jobs.static(), answers, strict=True):
        check(job, answer, f"sm_{arch}")
        assert all(len(each["tactics"]) == 2 for each in answer["formats"])


@needs_bindings
@pytest.mark.parametrize("arch", [pytest.param(86, marks=pytest.mark.slow), 90])
def test_an_aligned_gemm_copies_in_width(arch, tmp_path):
    """Static sizes that 16 divides are told to the compiler: rows may be any number."""
    inputs = [((jobs.ROWS, 512), "fp16"), ((512, 768), "fp16")]
    job = Job("FusedGemm", inputs, lambda m: GemmProblem(M=m, N=768, K=512), sizes=((128,),))
    (answer,) = lead(f"sm_{arch}", [job], tactics=3, TILEWRIGHT_DB_DIR=str(tmp_path))
    check(job, answer, f"sm_{arch}")
    for tactic in answer["formats"][0]["tactics"]:
        assert tactic["wide"] == tactic["copies"] > 0
        assert tactic["narrow"] == 0
    assert any(tactic["wgmma"] for tactic in answer["formats"][0]["tactics"]) == (arch == 90)


@pytest.mark.parametrize("arch", [86, 90])
def test_what_is_taken_out_of_the_ptx_leaves_the_same_machine_code(arch):
    """Hidden pointers, line numbers, debug sections: ptxas makes the same instructions of it without them."""
    script = f"""
import re, subprocess, tempfile
from pathlib import Path
import triton
from tilewright.kernels import GemmProblem, resolve_device
from tilewright.kernels.compile import compile_launch
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.tensorrt.ptx import parameter_types, prepared
problem = GemmProblem(M=128, N=128, K=128, bias="fp16")
(launch,) = GEMM.launches(problem, GEMM.default(problem, resolve_device("sm_{arch}")))
binary = compile_launch(launch, {arch}, ptx_isa=87)
name, ptx = prepared(binary, 7)
assert binary.ptx.count("\\n") > 1.5 * ptx.count("\\n")
assert len(parameter_types(binary.ptx, binary.name)) == 9 and len(parameter_types(ptx, name)) == 7
tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ptxas = next(each for each in (tools / "ptxas-blackwell", tools / "ptxas") if each.exists())
def instructions(text):
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(text)
        subprocess.run([ptxas, "--gpu-name=sm_{arch}{"a" if arch >= 90 else ""}", source, "-o", cubin], check=True)
        dumped = subprocess.run([tools / "cuobjdump", "--dump-sass", cubin], capture_output=True, text=True, check=True)
    return [re.sub(r"\\s+", " ", line) for line in dumped.stdout.splitlines() if "/*" in line]
before, after = instructions(binary.ptx), instructions(ptx)
assert len(before) > 100 and before == after
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=compiling_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@needs_bindings
@pytest.mark.parametrize(("arch", "cuda", "version"), [(86, "12.4", "8.4"), (90, "12.4", "8.4"), (86, "13.4", None)])
def test_ptx_is_written_for_the_driver_that_is_named(arch, cuda, version, tmp_path):
    """And in no version that the arch's ptxas doesn't assemble: for sm_80 to sm_89 that may be an older one."""
    script = f"plugins.register('sm_{arch}', cuda={cuda!r}, tactics=1)"
    (answer,) = lead("", [LAYER], script=script, TILEWRIGHT_DB_DIR=str(tmp_path))
    (tactic,) = answer["formats"][0]["tactics"]
    assert version is None or tactic["version"] == [version]
    assert tactic["ptxas"] == ""


def test_the_version_of_ptx_is_one_that_ptxas_assembles(monkeypatch):
    for release, isa in (("12.4.131", 84), ("12.9.86", 88), ("13.0.1", 90), ("13.4.59", 91)):
        monkeypatch.setattr(ptx, "ptxas_version", lambda arch, release=release: release)
        assert ptx.assembled_isa(86) == isa


@needs_bindings
def test_the_cache_decides_the_tactics(tmp_path):
    """Tactic 1 is the cached best; another cache makes other tactics, and another identity of their timings."""
    device = resolve_device("sm_86")
    problem = LAYER.problem(128)
    tiles = [GemmConfig(32, 32, 32, GROUP_M=1, num_warps=2, num_stages=stages) for stages in (2, 3)]
    seen = []
    for time_us, config in ((20.0, tiles[0]), (10.0, tiles[1])):
        put(tmp_path, GEMM, problem, device, config, time_us)
        (answer,) = lead("sm_86", [LAYER], tactics=3, TILEWRIGHT_DB_DIR=str(tmp_path))
        check(LAYER, answer, "sm_86")
        first = answer["known"][0]
        assert first["config"] == config.to_dict()
        assert (first["provenance"], first["reason"]) == ("measured", "exact")
        seen.append(answer)
    assert seen[1]["known"][1]["config"] == tiles[0].to_dict()
    assert seen[0]["timing_id"] != seen[1]["timing_id"]


@needs_bindings
def test_attributes_in_any_order_and_a_timing_identity_of_their_own(tmp_path):
    names = list(plugin_attributes("FusedGemmBias"))
    turned = LAYER.to_dict() | {"order": names[::-1]}
    other = LAYER.to_dict() | {"attributes": {"activation": "relu"}}
    through_python = LAYER.to_dict() | {"through": "python"}
    found = lead("sm_86", [LAYER, turned, other, through_python], tactics=1, TILEWRIGHT_DB_DIR=str(tmp_path))
    check(LAYER, found[1], "sm_86")
    kernels = [answer["formats"][0]["tactics"][0]["name"] for answer in found]
    assert kernels[0] == kernels[1] == kernels[3] != kernels[2]
    ids = [answer["timing_id"] for answer in found]
    assert ids[0] == ids[1] == ids[3] != ids[2]
    assert ids[0].startswith("tilewright-")
    assert found[3]["kind"] == "_TemplateAOTPlugin"


def raw(**changed: Any) -> dict[str, Any]:
    """The layer with other attributes, as they come."""
    given = plugin_attributes("FusedGemmBias") | changed
    return LAYER.to_dict() | {"raw": {name: value for name, value in given.items() if value is not None}}


def normalised(**changed: Any) -> dict[str, Any]:
    """RMSNorm with other attributes, as they come."""
    job = Job("FusedRmsNorm", [((4, 64), "fp16")], lambda: RmsNormProblem(4, 64))
    return job.to_dict() | {"raw": plugin_attributes("FusedRmsNorm") | changed}


def with_inputs(*inputs: Any) -> dict[str, Any]:
    return LAYER.to_dict() | {"inputs": [{"dims": list(dims), "dtype": dtype} for dims, dtype in inputs]}


@needs_bindings
def test_wrong_use_gets_one_clear_line(tmp_path):
    rows = jobs.ROWS
    wrong = {
        "FusedGemmBias lacks the attributes activation (str): plugin_attributes() fills them in": raw(activation=None),
        "FusedGemmBias: attribute trans_a is FLOAT32 and must be int": raw(trans_a=1.0),
        "FusedGemmBias: attribute activation is INT64 and must be str": raw(activation=1),
        "FusedGemmBias has no attribute 'colour'; it has activation": raw(colour=1),
        "FusedGemmBias: attribute trans_a is [1, 1] and must be one finite number": raw(trans_a=[1, 1]),
        "FusedRmsNorm: attribute eps is [nan] and must be one finite number": normalised(eps=float("nan")),
        "K, as in b, dimension 1 of a, must be static: it is dynamic": with_inputs(
            ((rows, rows), "fp16"), ((128, 192), "fp16"), ((192,), "fp16")
        )
        | {"sizes": [[1, 1]]},
        "fp8e4m3 needs sm_89": with_inputs(((rows, 128), "fp8e4m3"), ((128, 192), "fp8e4m3"), ((192,), "fp16")),
        "is INT64, which is not supported": with_inputs(((rows, 128), "INT64"), ((128, 192), "fp16"), ((192,), "fp16")),
        "b must have 128 rows for K=128": with_inputs(((rows, 128), "fp16"), ((64, 192), "fp16"), ((192,), "fp16")),
        "N of gated columns, dimension 1 of b, must be static: it is dynamic": with_inputs(
            ((rows, 128), "fp16"), ((128, rows), "fp16"), ((rows,), "fp16")
        )
        | {"attributes": {"gated": "halves"}, "sizes": [[1, 2, 2]]},
    }
    asked = [job | {"through": "python"} for job in wrong.values()]
    for (message, _), answer in zip(
        wrong.items(), lead("sm_86", asked, tactics=1, TILEWRIGHT_DB_DIR=str(tmp_path)), strict=True
    ):
        assert message in answer["error"], message
        assert "\n" not in answer["error"]


@needs_bindings
@pytest.mark.parametrize("through", ["python", "c++"])
def test_matrices_of_another_rank_and_sizes_that_a_profile_holds_fast(tmp_path, through):
    """TensorRT knows no dimension while it asks for data types; and one that a profile leaves no room is as static."""
    one = GemmProblem(M=96, N=32, K=64)
    turned = GemmProblem(M=16, N=32, K=64, batch=6, a_broadcast=True)
    keys = ([2, 2, 2], 2, 40, 64)
    asked = [
        Job("FusedGemm", [((2, 3, 16, 64), "fp16"), ((1, 64, 32), "fp16")], lambda: one, sizes=((),)),
        Job("FusedGemm", [((1, 16, 64), "fp16"), ((2, 3, 64, 32), "fp16")], lambda: turned, sizes=((),)),
        Job("FusedGemm", [((96, [64, 64, 64]), "fp16"), ((64, 32), "fp16")], lambda k: one, sizes=((64,),)),
        Job(
            "FusedAttention",
            [(([2, 2, 2], 2, 40, 64), "fp16"), ((2, 2, 40, 64), "fp16"), (keys, "fp16")],
            lambda *_: AttentionProblem(2, 2, 40, 40, 64),
            sizes=((2, 2),),
            constants=(("SCALE", 1 / 8),),
        ),
        Job(
            "FusedConv2d",
            [((2, 32, 8, 8), "fp16"), ((16, 32, [3, 3, 3], [3, 3, 3]), "fp16")],
            lambda r, s: Conv2dProblem(2, 8, 8, 32, 16, 3, 3, layout="nchw", w_layout="kcrs"),
            sizes=((3, 3),),
            formats=[("HWC8", "LINEAR", "HWC8")],
        ),
    ]
    jobs_through = [Job(**{**vars(job), "through": through}) for job in asked]
    answers = lead("sm_86", jobs_through, tactics=1, TILEWRIGHT_DB_DIR=str(tmp_path))
    for job, answer in zip(jobs_through, answers, strict=True):
        check(job, answer, "sm_86")


@needs_bindings
@pytest.mark.parametrize("through", ["python", "c++"])
def test_one_matrix_of_a_profile_makes_no_other_result_than_tensorrt_knows(tmp_path, through):
    """Shapes are worked out before profiles are known: a result of another would be written past."""
    one, weights = (([1, 1, 1], 64, 32), "fp16"), GemmProblem(128, 32, 64)
    fine = [
        Job("FusedGemm", [(([8, 8, 8], 16, 64), "fp16"), one], lambda *_: weights, sizes=((8, 1),), through=through),
        Job("FusedGemm", [((8, 16, 64), "fp16"), one], lambda _: weights, sizes=((1,),), through=through),
    ]
    wrong = Job(
        "FusedGemm",
        [(([1, 1, 1], 16, 64), "fp16"), ((8, 64, 32), "fp16")],
        lambda _: GemmProblem(16, 32, 64, batch=8, a_broadcast=True),
        sizes=((1,),),
        through=through,
    )
    *answers, refused = lead("sm_86", [*fine, wrong], tactics=1, TILEWRIGHT_DB_DIR=str(tmp_path))
    for job, answer in zip(fine, answers, strict=True):
        check(job, answer, "sm_86")
    assert "error" in refused
    assert through == "c++" or "out is (1, 16, 32) to TensorRT and (8, 16, 32) to the kernel" in refused["error"]


@needs_bindings
def test_what_a_plugin_raises_is_noted_for_the_build(tmp_path):
    """Through C++ it becomes a number."""
    wrong = with_inputs(((jobs.ROWS, 128), "fp16"), ((64, 192), "fp16"), ((192,), "fp16"))
    script = f"""
plugins.register("sm_86")
current().begin()
assert current().take_failure() is None
try:
    live({wrong!r})
except RuntimeError as error:
    assert "returned -" in str(error)
assert str(current().take_failure()).endswith("b must have 128 rows for K=128")
current().begin()
try:
    created("FusedGemmBias", {{}}, "PREFER_AOT")
except Exception:
    pass
assert "lacks the attributes" in str(current().take_failure())
"""
    lead("sm_86", [], script=script, TILEWRIGHT_DB_DIR=str(tmp_path))


@needs_bindings
def test_errors_reach_the_builder_through_cxx_too(tmp_path):
    wrong = [with_inputs(((jobs.ROWS, 128), "fp16"), ((64, 192), "fp16"), ((192,), "fp16")), raw(activation=None)]
    found = lead("sm_86", wrong, tactics=1, TILEWRIGHT_DB_DIR=str(tmp_path))
    assert "getNbSupportedFormatCombinations returned -" in found[0]["error"]
    assert "createPlugin returned null" in found[1]["error"]


@needs_bindings
def test_registering_again_and_from_many_threads(tmp_path):
    script = """
import threading
from concurrent.futures import ThreadPoolExecutor
from tilewright.kernels.tensorrt.context import current
start = threading.Barrier(8)
def register(index):
    start.wait()
    plugins.register("sm_86", tactics=2)
with ThreadPoolExecutor(8) as pool:
    list(pool.map(register, range(8)))
assert current().target.device.board == "rtx3090"
kept = current()
plugins.register("sm_86", tactics=2)
assert current() is kept
plugins.register("a10", tactics=2)
assert current().target.device.board == "a10"
assert str(current().target.folder) == os.environ["TILEWRIGHT_DB_DIR"]
elsewhere = os.environ["TILEWRIGHT_DB_DIR"] + "/elsewhere"
os.mkdir(elsewhere)
plugins.register("a10", tactics=2, db=elsewhere)
assert str(current().target.folder) == elsewhere
registry = trt.get_plugin_registry()
assert all(registry.get_creator(name, "1", "tilewright") is not None for name in plugins.plugins())
"""
    lead("sm_86", [], script=script, TILEWRIGHT_DB_DIR=str(tmp_path))


@needs_bindings
def test_registering_goes_on_where_it_was_interrupted(tmp_path):
    script = """
from tilewright.kernels.tensorrt import registration
waiting = [(step, late) for step in ("register", "autotune", "aot_impl", "impl", "watch") for late in (False, True)]
def interrupt(step, late):
    if (step, late) in waiting:
        waiting.remove((step, late))
        raise KeyboardInterrupt
def interrupted(step, function):
    def call(*arguments):
        interrupt(step, False)
        result = function(*arguments)
        interrupt(step, True)
        return result
    return call
def decorator(step, real):
    return lambda identifier: interrupted(step, real(identifier))
for step in ("register", "autotune", "aot_impl", "impl"):
    setattr(api, step, decorator(step, getattr(api, step)))
registration._watch_creator = interrupted("watch", registration._watch_creator)
left = len(waiting)
while waiting:
    try:
        plugins.register("sm_86")
    except KeyboardInterrupt:
        left -= 1
assert left == 0
plugins.register("sm_86")
registry = trt.get_plugin_registry()
for name in plugins.plugins():
    create = registry.get_creator(name, "1", "tilewright").create_plugin
    assert not hasattr(create.__wrapped__.__wrapped__, "__wrapped__"), name
"""
    (answer,) = lead("sm_86", [LAYER], script=script, tactics=2, TILEWRIGHT_DB_DIR=str(tmp_path))
    check(LAYER, answer, "sm_86")


@needs_bindings
def test_python_plugins_too(tmp_path):
    """With the other preference the very same nodes become plugins that launch from Python."""
    script = """
plugins.register("sm_86")
made, kept = created("FusedGemmBias", plugins.plugin_attributes("FusedGemmBias"), "PREFER_JIT")
assert type(made).__name__ == "_TemplateJITPlugin"
assert made.expects_tactic is False
# Its formats come without tactics, and without a kernel compiled: each shape runs its own configuration.
from types import SimpleNamespace
from tilewright.kernels.tensorrt import context
from tilewright.tuning_db.errors import UnsupportedError
context.tactics = None
def formats(dtype):
    made, kept = created("FusedConv2d", plugins.plugin_attributes("FusedConv2d"), "PREFER_JIT")
    shapes = (2, 8, 7, 7), (16, 8, 1, 1), (2, 16, 7, 7)
    *inputs, output = (SimpleNamespace(shape=shape, dtype=dtype, format=trt.TensorFormat.LINEAR) for shape in shapes)
    found = made.autotune_function(*inputs, *made.attrs.values(), [output])
    return [combination for each in found for combination in each._get_combinations()]
assert len(formats(trt.float16)) == 2
assert not any(combination.tactics for combination in formats(trt.float16))
try:
    formats(trt.fp8)
except UnsupportedError as error:
    assert "fp8e4m3 needs sm_89" in str(error)
else:
    raise AssertionError("fp8 on sm_86")
# All attributes go into the engine: what runs it makes the plugin of these.
assert [field.name for field in made.get_fields_to_serialize()] == list(plugins.plugin_attributes("FusedGemmBias"))
"""
    lead("sm_86", [], script=script, TILEWRIGHT_DB_DIR=str(tmp_path))


@needs_bindings
def test_what_register_refuses(tmp_path):
    script = """
from tilewright.kernels.tensorrt import registration
from tilewright.tuning_db.errors import MissingDependencyError, TilewrightError, UnknownDeviceError, UsageError
from dataclasses import replace
from tilewright.kernels import resolve_device
def refused(kind, message, *given, **named):
    try:
        plugins.register(*given, **named)
    except TilewrightError as error:
        assert isinstance(error, kind) and message in str(error) and chr(10) not in str(error), error
    else:
        raise AssertionError(message)
registration.live_cuda = lambda: ""
registration.resolve_device = lambda name: exec("raise MissingDependencyError('no GPU')")
refused(MissingDependencyError, "name the device to build for, register(device=")
refused(MissingDependencyError, "no GPU", "cuda:0")
registration.resolve_device = resolve_device
refused(UnknownDeviceError, "no device is called 'rtx9999'", "rtx9999")
refused(UsageError, "sm_120 needs PTX 8.7, and the driver of CUDA 12.4 reads up to 8.4", "sm_120", cuda="12.4")
refused(UsageError, "the folder of the databases (--db) is empty", "sm_86", db="")
refused(UsageError, "there is no folder none of tuning databases", "sm_86", db="none")
refused(UsageError, "db=3 must be a folder's path", "sm_86", db=3)
for number in (0, "3", 2.5, True):
    refused(UsageError, f"tactics={number!r} must be an integer of at least 1", "sm_86", tactics=number)
refused(UsageError, "cuda=12.4 must be the CUDA version of the driver as text", "sm_86", cuda=12.4)
registration.resolve_device = lambda name: replace(resolve_device("sm_86"), live="cuda:0")
registration.live_cuda = lambda: "12.4"
refused(UsageError, "cuda='12.8' is newer than the driver at hand, which is of CUDA 12.4", cuda="12.8")
plugins.register()
assert current().target.cuda == "12.4"  # the older of the driver's and the default
registration.live_cuda = lambda: "13.0"
plugins.register()
assert current().target.cuda == "12.8"
registration.resolve_device = resolve_device
"""
    lead("sm_86", [], script=script, TILEWRIGHT_DB_DIR=str(tmp_path))


@needs_bindings
def test_every_plugin_through_the_network_api(tmp_path):
    script = """
plugins.register("sm_86", tactics=1)
tensor = trt.ITensor.__new__(trt.ITensor)
names = api.op.tilewright
for name, variant in plugins.plugins().items():
    attributes = plugins.plugin_attributes(name)
    layer = getattr(names, name)(*[tensor] * len(variant.inputs), **attributes)
    inputs, shapes, made = layer(trt.QuickPluginCreationRequest.PREFER_AOT)
    assert (len(inputs), len(shapes)) == (len(variant.inputs), 0)
    assert (type(made).__name__, made.plugin_name, made.attrs) == ("_TemplateAOTPlugin", name, attributes)
"""
    lead("sm_86", [], script=script, TILEWRIGHT_DB_DIR=str(tmp_path))


@needs_bindings
def test_an_attribute_that_is_no_text(tmp_path):
    script = """
plugins.register("sm_86", tactics=1)
kept = fields(plugins.plugin_attributes("FusedGemm"))
kept[0] = trt.PluginField("activation", bytes([255, 254]), trt.PluginFieldType.CHAR)
try:
    creator_of("FusedGemm").create_plugin(
        "FusedGemm", "tilewright", trt.PluginFieldCollection(kept), trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.PREFER_AOT,
    )
except Exception as error:
    assert "FusedGemm: attribute activation is no UTF-8: b" in str(error), error
else:
    raise AssertionError("no text")
"""
    lead("sm_86", [], script=script, TILEWRIGHT_DB_DIR=str(tmp_path))


@needs_bindings
def test_python_plugins_launch_what_tensorrt_hands_over(tmp_path):
    """bf16, which TensorRT's own array interface refuses, on TensorRT's stream."""
    script = """
from types import SimpleNamespace
from tilewright.kernels.tensorrt import jit
launched = []
def plan_for(kernel, problem, ordinal, *, constants):
    return SimpleNamespace(run=lambda *given: launched.append((str(problem), *given))), None
jit.plan_for = plan_for
jit.require_cupy = lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: 0)))
plugins.register("sm_86")
made, kept = created("FusedGemmBias", plugins.plugin_attributes("FusedGemmBias", activation="relu"), "STRICT_JIT")
shapes = ([5, 64], 4096), ([64, 32], 8192), ([32], 512), ([5, 32], 1024)
tensors = [(shape, trt.bfloat16, address) for shape, address in shapes]
for stream, through in ((77, "python"), (99, "c++")):
    enqueue(made, tensors, 3, stream, through)
addresses = {"a_ptr": 4096, "b_ptr": 8192, "bias_ptr": 512, "out_ptr": 1024}
problem = "M=5,N=32,K=64,dtype=bf16,bias=bf16,activation=relu"
assert launched == [(problem, addresses, {}, stream) for stream in (77, 99)], launched
"""
    lead("sm_86", [], script=script, TILEWRIGHT_DB_DIR=str(tmp_path))


def test_a_process_that_interprets_registers_nothing():
    with pytest.raises(UsageError, match="TRITON_INTERPRET is set: plugins are compiled"):
        register("sm_86")


def test_there_are_plugins():
    assert {"FusedGemm", "FusedConv2d", "FusedAttention", "FusedRmsNorm"} <= set(plugins())
