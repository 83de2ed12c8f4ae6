"""Compiled code for GPUs that are not here: its parameters, what it takes, and what refuses to compile.

Compilation runs in processes of its own, for this one interprets. A process compiles for one arch: Triton 3.6 settles
on how to convert fp8 at the first arch that it meets.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.kernels import compiling
from tests.kernels.compiling import assert_clean, described
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
from tilewright.tuning_db.errors import CompileError, UsageError
from tilewright.tuning_db.record import Resources

ARCHS = (75, 80, 86, 89, 90, 100, 120)


def compiled(arch, jobs, **environment):
    """What compiling each (problem, configuration or None for the default) for an arch gives."""
    return compiling.compiled(arch, [("gemm", problem, config) for problem, config in jobs], **environment)


SQUARE = GemmProblem(4096, 4096, 4096)
FUSED = {"bias": "fp16", "residual": "fp16", "activation": "gelu_erf", "alpha": True}


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
        assert [kind.replace(".b", ".u") for kind in reply["parameters"]] == expected, described(reply)
        assert reply["scratch"] == 0
        assert reply["name"] == "gemm_kernel"
    assert [len(reply["parameters"]) for reply in (plain, fused, strided, with_scratch)] == [8, 11, 19, 10]


# Resources


def ptxas_says(log):
    """Of the last kernel that ptxas reports in its own words: registers, stack and spill stores."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    return int(re.findall(r"Used (\d+) registers", log)[-1]), *map(int, frames[-1])


@pytest.mark.parametrize("arch", [pytest.param(86, marks=pytest.mark.smoke), pytest.param(90, marks=pytest.mark.slow)])
def test_resources_are_what_ptxas_says(arch, tmp_path):
    # 64×128 fp32 sums in 2 warps are 128 registers a thread, twice as many operands pass through: it spills.
    spilling = GemmConfig(64, 128, 64, num_warps=2, num_stages=1)
    unaligned = GemmProblem(512, 512, 513, aligned=False)
    jobs = [(SQUARE, None), (unaligned, spilling), (GemmProblem(1, 512, 512), GemmConfig(16, 32, 64))]
    replies = compiled(arch, jobs, TRITON_DUMP_PTXAS_LOG="1", TRITON_CACHE_DIR=str(tmp_path))
    for reply in replies:
        registers, stack, stores = ptxas_says(reply["log"])
        taken = reply["resources"]
        assert (taken["registers"], taken["stack_bytes"]) == (registers, stack), described(reply)
        # A slot that is stored to twice is one slot.
        assert taken["spill_bytes"] == min(stores, stack), described(reply)
        # Nothing here has static shared memory, and what the driver keeps is not the kernel's.
        assert taken["shared_bytes"] == reply["dynamic_shared"], described(reply)
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
