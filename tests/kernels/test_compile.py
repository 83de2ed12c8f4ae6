"""Compiled code for GPUs that are not here: its instructions, what it takes, and what refuses to compile.

Compilation runs in processes of its own, for this one interprets. A process compiles for one arch: Triton 3.6 settles
on how to convert fp8 at the first arch that it meets.
"""

from __future__ import annotations

import itertools
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.kernels import compiling
from tests.kernels.compiling import assert_clean
from tests.kernels.conformance import every_value
from tilewright.kernels import GemmConfig, GemmProblem, compile, resolve_device
from tilewright.kernels.compile import (
    Binary,
    compile_launch,
    over_limits,
    ptxas_version,
    read_resources,
    triton_version,
)
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.space import SPACE, shared_bytes
from tilewright.tuning_db.errors import CompileError, UsageError
from tilewright.tuning_db.record import Resources

ARCHS = (75, 80, 86, 89, 90, 100, 120)
COMMON = (86, pytest.param(90, marks=pytest.mark.smoke))


def compiled(arch, jobs, **environment):
    """What compiling each (problem, configuration or None for the default) for an arch gives."""
    return compiling.compiled(arch, [("gemm", problem, config) for problem, config in jobs], **environment)


def named(reply):
    return f"sm_{reply['arch']} {reply['problem']} {reply['config']}"


SQUARE = GemmProblem(4096, 4096, 4096)
FUSED = {"bias": "fp16", "residual": "fp16", "activation": "gelu_erf", "alpha": True}


# Instructions


@pytest.mark.parametrize("arch", [75, 80, pytest.param(86, marks=pytest.mark.smoke), COMMON[1], 89, 100, 120])
def test_aligned_operands_are_copied_asynchronously_and_multiplied_on_tensor_cores(arch):
    kinds = [] if arch == 75 else ["bf16", *(["fp8e4m3"] if arch >= 89 else [])]
    problems = [
        SQUARE,
        GemmProblem(512, 512, 512, a_layout="col", b_layout="col", residual="fp16"),
        *(replace(SQUARE, dtype=kind, out_dtype=None, b_layout="col") for kind in kinds),
    ]
    tensor = {90: "wgmma", 100: "tcgen05"}.get(arch, "mma.sync")
    skinny = compiled(arch, [(GemmProblem(16, 4096, 4096), None)])
    for reply in compiled(arch, [(problem, None) for problem in problems]) + skinny:
        found = reply["instructions"]
        assert not found["narrow loads"], named(reply)
        if arch == 75:
            assert not any(found[name] for name in ("cp.async", "mma.sync", "wgmma", "tcgen05")), named(reply)
            continue
        # A warp group of wgmma or tcgen05 needs 64 rows.
        expected = "mma.sync" if reply["config"]["BLOCK_M"] < 64 else tensor
        assert found["cp.async"] or found["bulk tensor"], named(reply)
        assert [name for name in ("mma.sync", "wgmma", "tcgen05") if found[name]] == [expected], named(reply)


@pytest.mark.parametrize("arch", COMMON)
def test_any_length_that_is_no_multiple_of_16_elements_leaves_single_loads(arch):
    problems = [
        replace(SQUARE, K=4104),
        replace(SQUARE, N=4104),
        replace(SQUARE, aligned=False),
        replace(SQUARE, strided=True, aligned=False),
    ]
    # Descriptors, Hopper's default, ask for rows of 16 bytes and no more.
    plain = GemmConfig(128, 128, 32, GROUP_M=8, num_warps=8, num_stages=4)
    for reply in compiled(arch, [(problem, plain) for problem in problems]):
        assert reply["instructions"]["narrow loads"], named(reply)
    # The stride is what has to be aligned, and the rows of A are K long whatever M is.
    for reply in compiled(arch, [(replace(SQUARE, K=4104, strided=True), plain), (replace(SQUARE, M=4097), plain)]):
        assert reply["instructions"]["cp.async"], named(reply)


def test_ieee_fp32_runs_on_cuda_cores_and_tf32_on_tensor_cores():
    small = GemmConfig(32, 32, 32, num_stages=2)
    exact = GemmProblem(512, 512, 512, dtype="fp32")
    ieee, tf32 = compiled(86, [(exact, small), (replace(exact, precision="tf32"), small)])
    assert (ieee["instructions"]["mma.sync"], tf32["instructions"]["mma.sync"] > 0) == (0, True)


# Parameters


@pytest.mark.smoke
def test_the_entry_has_the_present_arguments_and_two_hidden_pointers():
    split = GemmConfig(64, 64, 32, SPLIT_K=2)
    full = replace(SQUARE, strided=True, **FUSED)
    plain, fused, strided, with_scratch = compiled(
        86, [(SQUARE, None), (replace(SQUARE, **FUSED), None), (full, None), (SQUARE, split)]
    )
    for reply in (plain, fused, strided, with_scratch):
        sizes = {"i32": ".u32", "i64": ".u64"}
        expected = [sizes.get(kind, ".u64") for kind in reply["arguments"]] + [".u64"] * compile.HIDDEN_POINTERS
        assert [kind.replace(".b", ".u") for kind in reply["parameters"]] == expected, named(reply)
        assert reply["scratch"] == 0
        assert reply["name"] == "gemm_kernel"
    assert [len(reply["parameters"]) for reply in (plain, fused, strided, with_scratch)] == [8, 11, 19, 10]


# Resources


def ptxas_says(log):
    """Of the last kernel that ptxas reports in its own words: registers, stack and spill stores."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    return int(re.findall(r"Used (\d+) registers", log)[-1]), *map(int, frames[-1])


@pytest.mark.parametrize("arch", COMMON)
def test_resources_are_what_ptxas_says(arch, tmp_path):
    # 64×128 fp32 sums in 2 warps are 128 registers a thread, twice as many operands pass through: it spills.
    spilling = GemmConfig(64, 128, 64, num_warps=2, num_stages=1)
    unaligned = GemmProblem(512, 512, 513, aligned=False)
    jobs = [(SQUARE, None), (unaligned, spilling), (GemmProblem(1, 512, 512), GemmConfig(16, 32, 64))]
    replies = compiled(arch, jobs, TRITON_DUMP_PTXAS_LOG="1", TRITON_CACHE_DIR=str(tmp_path))
    for reply in replies:
        registers, stack, stores = ptxas_says(reply["log"])
        taken = reply["resources"]
        assert (taken["registers"], taken["stack_bytes"]) == (registers, stack), named(reply)
        # A slot that is stored to twice is one slot.
        assert taken["spill_bytes"] == min(stores, stack), named(reply)
        # Nothing here has static shared memory, and what the driver keeps is not the kernel's.
        assert taken["shared_bytes"] == reply["dynamic_shared"], named(reply)
    assert [bool(reply["resources"]["spill_bytes"]) for reply in replies] == [False, True, False]
    assert "spill to local memory" in replies[1]["over"]


def test_stores_of_spills_are_counted_by_their_width():
    sass = """
        /*0010*/  STL [R1], R2 ;
        /*0020*/  @!P0 STL.64 [R1+0x8], R4 ;
        /*0030*/  STL.128 [R1+0x10], R8 ;
        /*0040*/  STL.U8 [R1+0x20], R3 ;
        /*0050*/  STL.S16 [R1+0x22], R3 ;
        /*0060*/  LDL.64 R2, [R1] ;
        /*0070*/  STG.E.128 [R2.64], R4 ;
    """
    assert compile._spilled_bytes(sass) == 4 + 8 + 16 + 1 + 2


def test_what_is_no_cubin_is_refused():
    with pytest.raises(CompileError, match=r"^cuobjdump [^\n]+$"):
        read_resources(b"no cubin", 0)


@pytest.mark.parametrize(
    ("change", "warps", "limit"),
    [
        ({}, 8, None),
        ({"shared_bytes": 101376}, 8, None),
        ({"shared_bytes": 101377}, 8, "101377 B of shared memory are over the 101376 B of rtx3090"),
        ({"spill_bytes": 4}, 8, "4 B a thread spill to local memory"),
        ({"stack_bytes": 4}, 8, None),
        ({"registers": 255}, 8, None),
        ({"registers": 255}, 16, "255 registers × 16 warps are over the 65536 of an SM"),
    ],
)
def test_limits_of_a_device(change, warps, limit):
    resources = replace(Resources(registers=128, spill_bytes=0, stack_bytes=0, shared_bytes=0), **change)
    assert over_limits(resources, resolve_device("rtx3090"), warps) == limit


def sampled(arch, count, seed):
    """Problems and configurations that fit the arch's reference board, at random."""
    device, draw = resolve_device(f"sm_{arch}"), random.Random(f"{arch} {seed}")
    kinds = [kind for kind in ("fp16", "fp32", "fp8e5m2", "fp8e4m3") if kind != "fp8e4m3" or arch >= 89]
    while count:
        problem = GemmProblem(
            *(draw.choice([33, 512]) for _ in range(3)),
            dtype=draw.choice(kinds if arch > 75 else ["fp16", "fp32"]),
            a_layout=draw.choice(["row", "col"]),
            b_layout=draw.choice(["row", "col"]),
            aligned=draw.random() < 0.8,
        )
        if problem.dtype == "fp32" and arch > 75:
            problem = replace(problem, precision="tf32")
        config = replace(
            draw.choice(
                [GemmConfig(*tile) for tile in itertools.product((16, 32, 64, 128), (16, 32, 64), (16, 32, 64))]
            ),
            num_warps=draw.choice([2, 4, 8]),
            num_stages=draw.choice([1, 2, 3, 4, 5]),
        )
        if GEMM.supported(problem, device) is None and SPACE.fits(problem, config, device) is None:
            count -= 1
            yield problem, config


def estimates_hold(arch, count, seed):
    device = resolve_device(f"sm_{arch}")
    exact = 0
    for reply in compiled(arch, sampled(arch, count, seed)):
        assert "error" not in reply, (named(reply), reply.get("error"))
        estimate = shared_bytes(GemmProblem.parse(reply["problem"]), GemmConfig.from_dict(reply["config"]), device)
        assert estimate <= reply["resources"]["shared_bytes"], named(reply)
        assert estimate == reply["estimate"]
        exact += estimate == reply["resources"]["shared_bytes"]
    return exact / count


@pytest.mark.parametrize("arch", [80, 86, 90])
def test_estimated_shared_memory_is_never_over_the_real(arch):
    # Nor is it a poor one: most of the time it is the real figure.
    assert estimates_hold(arch, 8, seed=0) > 0.5


def test_8_bit_operands_that_wgmma_can_not_read_along_k_are_not_copied_ahead():
    config = GemmConfig(128, 64, 64, num_stages=3)
    layouts = list(itertools.product(("row", "col"), repeat=2))
    problems = [replace(SQUARE, dtype="fp8e4m3", out_dtype=None, a_layout=a, b_layout=b) for a, b in layouts]
    a_tile, b_tile = 128 * 64, 64 * 64
    for (a, b), reply in zip(layouts, compiled(90, [(problem, config) for problem in problems]), strict=True):
        copies = (3 if a == "row" else 1), (3 if b == "col" else 1)
        assert reply["resources"]["shared_bytes"] == copies[0] * a_tile + copies[1] * b_tile, named(reply)
        assert reply["estimate"] == reply["resources"]["shared_bytes"], named(reply)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("arch", ARCHS)
def test_estimated_shared_memory_is_never_over_the_real_in_a_larger_sample(arch, seed):
    estimates_hold(arch, 50, seed)


# The default configuration

SHAPES = {
    "one row": {"M": 1, "N": 4096, "K": 4096},
    "few rows, K ragged": {"M": 16, "N": 4096, "K": 4112},
    "few rows, unaligned": {"M": 17, "N": 4097, "K": 4097},
    "few columns": {"M": 4096, "N": 16, "K": 4096},
    "few columns, unaligned": {"M": 4097, "N": 31, "K": 1001},
    "middle": {"M": 256, "N": 768, "K": 768},
    "middle, ragged": {"M": 200, "N": 304, "K": 528},
    "middle, unaligned": {"M": 201, "N": 303, "K": 527},
    "large": {"M": 4096, "N": 4096, "K": 4096},
    "large, ragged": {"M": 4096, "N": 4112, "K": 4112},
    "large, unaligned": {"M": 4097, "N": 4097, "K": 4097},
    "strided batch": {"M": 2048, "N": 4096, "K": 4096, "batch": 3, "strided": True},
    "strided, unaligned": {"M": 2048, "N": 4096, "K": 4096, "strided": True, "aligned": False},
    "small strided batch, unaligned": {"M": 5, "N": 400, "K": 400, "batch": 2, "strided": True, "aligned": False},
}
KINDS = (("fp16", None), ("bf16", None), ("fp32", "ieee"), ("fp32", "tf32"), ("fp8e4m3", None), ("fp8e5m2", None))
EPILOGUES = ({}, {"bias": "fp32", "residual": "fp16", "activation": "gelu_erf", "alpha": True})
MATRIX = {
    "shape": tuple(SHAPES),
    "kind": KINDS,
    "a_layout": ("row", "col"),
    "b_layout": ("row", "col"),
    "epilogue": EPILOGUES,
}


def supported(arch, rows):
    """The problems of rows of MATRIX that an arch has, each machine code once."""
    device, seen = resolve_device(f"sm_{arch}"), set()
    for row in rows:
        kind, precision = row["kind"]
        layouts = {name: row[name] for name in ("a_layout", "b_layout")}
        problem = GemmProblem(**SHAPES[row["shape"]], dtype=kind, precision=precision, **layouts, **row["epilogue"])
        if GEMM.supported(problem, device) is None:
            code = GEMM.launches(problem, GEMM.default(problem, device))[0].specialization
            if code not in seen:
                seen.add(code)
                yield problem


@pytest.mark.parametrize("arch", [pytest.param(86, marks=pytest.mark.smoke), 90])
def test_the_default_compiles_without_spills(arch):
    # Every shape, dtype, layout and epilogue occurs; all of their combinations are a slow test.
    problems = supported(arch, every_value(MATRIX, seed=arch))
    assert_clean(compiled(arch, [(problem, None) for problem in problems]))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_default_compiles_without_spills_whatever_the_problem(arch):
    rows = [dict(zip(MATRIX, values, strict=True)) for values in itertools.product(*MATRIX.values())]
    problems = list(supported(arch, rows))
    parts = [[(problem, None) for problem in problems[start::4]] for start in range(4)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for replies in threads.map(lambda part: compiled(arch, part), parts):
            assert_clean(replies)


# A spill that need not be


@pytest.fixture
def assembled(monkeypatch):
    """Stands in for Triton: each compilation takes the next of `assembled.resources`; its options are kept."""

    class Assembled:
        resources: list = []  # noqa: RUF012 - set by each test
        options: list = []  # noqa: RUF012

    def assemble(source, arch, options):
        Assembled.options.append(options)
        taken = Assembled.resources[len(Assembled.options) - 1]
        return Binary("gemm_kernel", arch, b"", "", options["num_warps"], 0, 0, taken)

    Assembled.options = []
    monkeypatch.setattr(compile.env, "interpreting", lambda: False)
    monkeypatch.setattr(compile, "ASTSource", lambda *arguments: arguments)
    monkeypatch.setattr(compile, "_assemble", assemble)
    monkeypatch.setattr(compile, "_binaries", {})
    return Assembled


def taking(registers, spilled):
    return Resources(registers=registers, spill_bytes=spilled, stack_bytes=spilled, shared_bytes=0)


def launch_with(num_warps=4, **fields):
    return GEMM.launches(replace(SQUARE, **fields), GemmConfig(64, 64, 32, num_warps=num_warps))[0]


def test_a_spill_with_registers_to_spare_is_compiled_again_with_all_of_them(assembled):
    assembled.resources = [taking(96, 8), taking(116, 0)]
    assert compile_launch(launch_with(), 86).resources == taking(116, 0)
    assert [options.get("maxnreg") for options in assembled.options] == [None, 255]
    assembled.resources, assembled.options = [taking(64, 8), taking(70, 0)], []
    compile_launch(launch_with(num_warps=16), 86)
    assert assembled.options[1]["maxnreg"] == 128  # 65536 registers for 512 threads


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (taking(96, 0), None, 0),  # no spill
        (taking(255, 800), None, 800),  # none to spare
        (taking(96, 8), taking(255, 8), 8),  # no better
        (taking(96, 8), taking(255, 4), 4),
    ],
)
def test_the_better_of_two_is_kept(assembled, first, second, kept):
    assembled.resources = [first, second]
    assert compile_launch(launch_with(), 86).resources.spill_bytes == kept
    assert len(assembled.options) == 1 + (second is not None)


def test_launches_that_share_code_are_compiled_once_and_each_arch_by_itself(assembled):
    assembled.resources = [taking(96, 0)] * 9
    one = compile_launch(launch_with(), 86)
    assert compile_launch(launch_with(M=8192), 86) is one
    assert compile_launch(launch_with(), 90) is not one
    assert compile_launch(launch_with(activation="relu"), 86) is not one
    assert len(assembled.options) == 3
    assert all(options["enable_fp_fusion"] for options in assembled.options)


def test_a_process_keeps_the_latest_used(assembled, monkeypatch):
    monkeypatch.setattr(compile, "MOST_BINARIES", 2)
    assembled.resources = [taking(96, 0)] * 9
    first, second, third = (launch_with(activation=name) for name in ("none", "relu", "silu"))
    for launch in (first, second, first, third, first):
        compile_launch(launch, 86)
    assert len(assembled.options) == 3
    compile_launch(second, 86)  # forgotten in favour of the third
    assert len(assembled.options) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "problem"),
    [
        (86, "M=32,N=4096,K=4096,dtype=fp8e5m2,a_layout=col,b_layout=col"),
        (86, "M=2048,N=4096,K=4096,dtype=fp32,b_layout=col,strided=true,aligned=false"),
        (80, "M=200,N=304,K=528,dtype=fp32,b_layout=col,precision=tf32"),
        (100, "M=4096,N=4112,K=4112,dtype=fp32,a_layout=col,precision=tf32"),
        (120, "M=200,N=304,K=528,dtype=bf16,b_layout=col"),
        (120, "M=256,N=768,K=768,dtype=fp32,a_layout=col,b_layout=col,precision=tf32"),
    ],
)
def test_defaults_that_ptxas_has_spilled(arch, problem):
    assert_clean(compiled(arch, [(GemmProblem.parse(problem), None)]))


# Refusals


@pytest.mark.smoke
def test_a_process_that_interprets_does_not_compile():
    with pytest.raises(UsageError) as raised:
        compile_launch(launch_with(), 86)
    assert str(raised.value) == (
        "this process interprets kernels (TRITON_INTERPRET is set) and can't compile: unset it"
    )


@pytest.mark.smoke
def test_what_does_not_compile_is_one_line_and_costs_nothing_else():
    fp8, odd, ordinary = compiled(
        86,
        [
            (GemmProblem(64, 64, 64, dtype="fp8e4m3"), None),
            (GemmProblem(64, 64, 64), GemmConfig(48, 16, 16)),
            (GemmProblem(64, 64, 64), None),
        ],
    )
    assert re.fullmatch(r"CompilationError: [^\n]*type fp8e4nv not supported in this architecture[^\n]*", fp8["error"])
    assert odd["error"] == "CompilationError: arange's range must be a power of 2"
    assert ordinary["over"] is None


def test_the_reason_of_ptxas_is_found():
    said = "ptxas /tmp/x.ptx, line 5; error   : Feature 'cvt' requires sm_89"
    log = f"Internal Triton PTX codegen error\n`ptxas` stderr:\n{said}\n{said}\n"
    assert compile._first_line(RuntimeError(log)) == "Feature 'cvt' requires sm_89"
    assert (
        compile._first_line(RuntimeError("at 1:0:\ndef kernel(\n^\nThe operation failed here"))
        == "The operation failed here"
    )
    assert compile._first_line(RuntimeError("at 1:0:\nx = 1\n^\nno such thing")) == "no such thing"
    assert compile._first_line(RuntimeError("")) == "no reason given"


@pytest.mark.smoke
def test_versions():
    assert re.fullmatch(r"3\.\d+\.\d+.*", triton_version())
    for arch in ARCHS:
        assert re.fullmatch(r"1\d\.\d+\.\d+", ptxas_version(arch))


def test_a_ptxas_that_can_not_be_run_is_named(monkeypatch):
    import triton.backends.nvidia.compiler as backend

    def missing(arch):
        raise FileNotFoundError("no ptxas here")

    monkeypatch.setattr(backend, "get_ptxas_version", missing)
    ptxas_version.cache_clear()
    with pytest.raises(CompileError, match=r"^Triton's ptxas can't be run: no ptxas here$"):
        ptxas_version(86)
    ptxas_version.cache_clear()


def test_a_frozen_process_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_FROZEN", "1")
    monkeypatch.setattr(compile.env, "interpreting", lambda: False)
    monkeypatch.setattr(compile, "_compile", None)
    with pytest.raises(UsageError, match="TILEWRIGHT_FROZEN is set: nothing is compiled"):
        compile_launch(GEMM.launches(SQUARE, GemmConfig(16, 16, 32))[0], 86)
