"""Packs as they are made and used: a program with one goes to the driver's launch and does nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from tilewright.kernels import find_kernel, resolve_device
from tilewright.kernels.lookup import Choice, record_key
from tilewright.kernels.ops.conv2d.problem import as_gemm
from tilewright.kernels.pack import Pack
from tilewright.tuner import packing
from tilewright.tuner.packing import build_pack, problems_on_record
from tilewright.tuning_db import Environment, Provenance, Record, Resources, Status, Times, TuningDB
from tilewright.tuning_db.env import compiling_environment
from tilewright.tuning_db.errors import DatabaseCorruptError, PackError, RunError, UsageError

ROOT = Path(__file__).parents[2]
DEVICE = resolve_device("rtx3090")
CONSTANTS = {"EPS": [1e-5], "SCALE": [0.1]}
PICKS = {
    # Scratch memory in one launch; two launches; none of either.
    "gemm": lambda config: config.SPLIT_K == 4 and config.BLOCK_M == config.BLOCK_N == 32,
    "attention": lambda config: config.SPLIT_KV == 8 and config.BLOCK_N == 64 and config.num_warps == 4,
    "conv2d": lambda config: config.BLOCK_M == config.BLOCK_N == 32,
    "rmsnorm": lambda config: config.num_warps == 4,
}


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`packed_calls` in a process of its own, without a home, with no place that it may write to."""
    chosen = {"HOME": "/nonexistent", "TRITON_CACHE_DIR": "/nonexistent/cache", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.packed_calls", *arguments],
        cwd=ROOT,
        env=compiling_environment() | chosen | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def frozen(pack: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return program(*arguments, TILEWRIGHT_PACK=str(pack), TILEWRIGHT_FROZEN="1", **environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with a measured record of every problem that `packed_calls` has."""
    asked = program("problems")
    assert asked.returncode == 0, asked.stderr
    folder = tmp_path_factory.mktemp("packs")
    with TuningDB.open(DEVICE.key, folder) as db:
        run = db.start_run(Environment("0.1.0", "", "", "", "lab", "cold-l2-1"))
        for place, each in enumerate(json.loads(asked.stdout)):
            kernel = find_kernel(each["op"])
            problem = kernel.problem.from_dict(each["problem"])
            config = next(c for c in kernel.space.configs(problem, DEVICE) if PICKS[kernel.name](c))
            times = Times(10.0 + place, 9.0, 30.0, 20)
            resources = Resources(64, 0, 0, 4096)
            key = record_key(kernel, problem, DEVICE)
            db.add(Record(key, config.to_json(), Status.OK, Provenance.MEASURED, times, resources), run)
    return folder


@pytest.fixture(scope="module")
def pack(folder: Path) -> Path:
    output = folder / "rtx3090.pack"
    packed = build_pack(DEVICE, output, constants=CONSTANTS, jobs=2, db=folder)
    assert packed.counts()[Provenance.MEASURED] == len(packed.entries) == 4
    assert packed.kernels == 1 + 1 + 3 + 2  # gemm; conv2d; attention twice, with one sum; rmsnorm twice
    assert packed.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    return output


def test_a_frozen_program_launches_and_does_nothing_else(pack: Path) -> None:
    done = frozen(pack, "calls")
    assert done.returncode == 0, done.stderr
    calls = {each["call"]: each for each in json.loads(done.stdout)}
    assert len(calls) == 6
    known = {name.removeprefix("cubins/").removesuffix(".cubin") for name in zipfile.ZipFile(pack).namelist()}
    for each in calls.values():
        assert each["provenance"] == "measured"
        assert each["reason"] == "packed: exact"
        assert len(each["launched"]) == (2 if "attention" in each["call"] else 1)
        # The sum of split keys is there already when the other scale comes.
        assert len(each["loaded"]) == (2 if each["call"] == "attention" else 1)
        assert set(each["loaded"]) <= known
    assert calls["gemm"]["config"]["SPLIT_K"] == 4
    assert calls["attention"]["config"]["SPLIT_KV"] == 8
    for op, option in (("attention", "attention with a scale"), ("rmsnorm", "rmsnorm with an eps")):
        assert calls[op]["config"] == calls[option]["config"]
        assert calls[op]["loaded"][0] != calls[option]["loaded"][0]


def test_choices_are_the_same_bytes_in_every_process(pack: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda seed: frozen(pack, "calls", PYTHONHASHSEED=str(seed)), range(3)))
    assert [each.returncode for each in done] == [0] * 3, done[0].stderr
    assert len({each.stdout for each in done}) == 1


def test_the_watch_over_a_frozen_program_is_awake(pack: Path) -> None:
    """Without TILEWRIGHT_FROZEN a call that the pack lacks goes on to the database and the compiler: that is seen."""
    lacking = program("call", "gemm", TILEWRIGHT_PACK="", TILEWRIGHT_FROZEN="0")
    assert lacking.returncode != 0
    assert "nothing may be compiled, predicted or looked up" in lacking.stderr
    script = "import sys; from tests.kernels.packed_calls import forbid; sys.addaudithook(forbid); {}"
    for deed in ("open('/tmp/x', 'a')", "import pickle, io; pickle.loads(pickle.dumps(io.BytesIO))",
                 "import os; os.mkdir('/nonexistent/x')", "import sqlite3; sqlite3.connect(':memory:')",
                 "import subprocess; subprocess.run(['true'])"):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", script.format(deed)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr[:9]) == (3, "forbidden"), deed


def failed(done: subprocess.CompletedProcess[str], error: str) -> str:
    """The one line that a program ended with."""
    assert done.returncode == 1, done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith(f"tilewright.tuning_db.errors.{error}: "), last
    return last


def test_what_the_pack_lacks_is_said_with_what_to_do(folder: Path, pack: Path, tmp_path: Path) -> None:
    less = tmp_path / "less.pack"
    build_pack(DEVICE, less, kernels=["rmsnorm"], jobs=1, db=folder)
    line = failed(frozen(less, "call", "gemm"), "NotPackedError")
    asked = 'gemm "M=64,N=64,K=2048,bias=fp16,activation=gelu_erf"'
    assert f"{less} lacks {asked}, and TILEWRIGHT_FROZEN is set" in line
    assert 'autotune --device rtx3090 --kernel gemm --problem "M=64,N=64,K=2048,bias=fp16,activation=gelu_erf"' in line
    line = failed(frozen(less, "call", "rmsnorm with an eps"), "NotPackedError")
    assert "lacks the kernel of rmsnorm" in line
    assert "eps=" in line
    assert "--constant" in line


def test_a_pack_of_another_device_or_revision_is_refused(pack: Path, tmp_path: Path) -> None:
    line = failed(frozen(pack, "call", "gemm", BOARD="a10"), "PackError")
    assert "is of rtx3090-82sm, and this GPU is a10-72sm: make one for it with `autotune pack`" in line
    old = tmp_path / "old.pack"
    rewritten(pack, old, lambda manifest: manifest["revisions"].update(gemm="0" * 64))
    line = failed(frozen(old, "call", "gemm"), "PackError")
    assert "is of another revision of gemm" in line
    assert "`autotune pack --device rtx3090`" in line
    assert frozen(old, "call", "conv2d").returncode == 0
    # Named without TILEWRIGHT_FROZEN it is a mistake as well, and not passed over.
    failed(program("call", "gemm", TILEWRIGHT_PACK=str(old)), "PackError")


def test_a_cubin_that_is_not_the_manifests_is_not_loaded(pack: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.pack"
    content = bytearray(pack.read_bytes())
    with zipfile.ZipFile(pack) as archive:
        for member in archive.infolist():
            if member.filename.startswith("cubins/"):
                content[member.header_offset + 200] ^= 1
    changed.write_bytes(content)
    line = failed(frozen(changed, "call", "gemm"), "PackError")
    assert "has SHA-256 " in line
    assert "and is not loaded" in line


def test_frozen_without_a_pack_is_a_mistake() -> None:
    line = failed(program("call", "gemm", TILEWRIGHT_FROZEN="1", TILEWRIGHT_PACK=""), "UsageError")
    assert "TILEWRIGHT_FROZEN is set, and TILEWRIGHT_PACK names no pack" in line


def rewritten(pack: Path, to: Path, change: Any) -> None:
    with zipfile.ZipFile(pack) as archive, zipfile.ZipFile(to, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            if name == "manifest.json":
                manifest = json.loads(content)
                change(manifest)
                content = json.dumps(manifest).encode()
            copy.writestr(name, content)


def test_equal_contents_give_equal_bytes(folder: Path, pack: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.pack"
    problems = list(reversed(problems_on_record(DEVICE, folder)))
    build_pack(DEVICE.board, str(again), problems=problems, constants=CONSTANTS, jobs=1, db=folder)
    assert again.read_bytes() == pack.read_bytes()
    assert str(ROOT).encode() not in pack.read_bytes()
    assert b".py" not in pack.read_bytes()


class FakePool:
    """Answers at once, as `replies` says: by the configuration, or for all alike."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def __enter__(self) -> FakePool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, request: dict[str, Any], timeout: float) -> Any:
        future: Future[dict[str, Any]] = Future()
        future.set_result(self.reply(request))
        return future

    @staticmethod
    def reply(request: dict[str, Any]) -> dict[str, Any]:
        return {"status": "compile_error", "message": f"refused {request['config']['BLOCK_M']}"}


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch):
    """Two choices of any problem, with tiles of 16 and 32."""
    gemm = find_kernel("gemm")

    def ranked(kernel, problem, device, folder):
        for tile in (16, 32):
            yield Choice(gemm.space.config(tile, 16, 32), Provenance.PREDICTED, "by the test", 1.0)

    monkeypatch.setattr(packing, "all_ranked", ranked)
    monkeypatch.setattr(packing, "Pool", FakePool)
    return [gemm.problem(64, 64, 64)]


def built(registers: int = 64, spills: int = 0) -> dict[str, Any]:
    resources = {"registers": registers, "spill_bytes": spills, "stack_bytes": spills, "shared_bytes": 0}
    binary = {"name": "k", "cubin": "AAAA", "num_warps": 4, "shared_bytes": 0, "scratch_bytes": 0}
    return {"status": "ok", "binaries": [binary | {"resources": resources}]}


def test_a_choice_that_does_not_fit_gives_way_to_the_next(choices, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        FakePool, "reply", staticmethod(lambda r: built(spills=8 if r["config"]["BLOCK_M"] == 16 else 0))
    )
    packed = build_pack(DEVICE, tmp_path / "p", problems=choices, db=tmp_path)
    (entry,) = packed.entries
    assert json.loads(entry.config)["BLOCK_M"] == 32
    assert packed.kernels == 1, "the code of the refused choice is no part of the pack"


def test_a_descriptors_name_leads_to_the_file_it_had(choices, tmp_path: Path, monkeypatch) -> None:
    """The open one is not that any more once the pack has taken its place."""
    monkeypatch.setattr(FakePool, "reply", staticmethod(lambda request: built()))
    with (tmp_path / "p").open("wb") as stream:
        packed = build_pack(DEVICE, Path(f"/dev/fd/{stream.fileno()}"), problems=choices, db=tmp_path)
    assert packed.sha256 == hashlib.sha256((tmp_path / "p").read_bytes()).hexdigest()
    assert Pack(tmp_path / "p").entries == packed.entries


def test_a_checkout_that_is_not_installed_packs_too(choices, tmp_path: Path, monkeypatch) -> None:
    def absent(distribution: str) -> str:
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(FakePool, "reply", staticmethod(lambda request: built()))
    monkeypatch.setattr("tilewright.tuning_db.version.version", absent)
    build_pack(DEVICE, tmp_path / "p", problems=choices, db=tmp_path)
    assert Pack(tmp_path / "p").facts.tilewright == "0+unknown"


def test_what_is_told_is_of_what_was_packed(choices, tmp_path: Path, monkeypatch) -> None:
    """And not of what another packer put in its place meanwhile."""
    monkeypatch.setattr(FakePool, "reply", staticmethod(lambda request: built()))
    whole_file = packing.whole_file

    @contextmanager
    def raced(path: Path):
        with whole_file(path) as stream:
            yield stream
            written.append(Path(stream.name))
            stream.flush()
            content.append(written[0].read_bytes())
        path.write_bytes(b"another's")

    written: list[Path] = []
    content: list[bytes] = []
    monkeypatch.setattr(packing, "whole_file", raced)
    packed = build_pack(DEVICE, tmp_path / "p", problems=choices, db=tmp_path)
    assert (packed.sha256, packed.bytes) == (hashlib.sha256(content[0]).hexdigest(), len(content[0]))
    assert [entry.op for entry in packed.entries] == ["gemm"]
    assert (tmp_path / "p").read_bytes() == b"another's"


def test_beside_a_convolution_of_one_tap_is_the_product_that_runs_in_its_place(
    choices, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(FakePool, "reply", staticmethod(lambda request: built()))
    monkeypatch.setattr(
        packing,
        "all_ranked",
        lambda kernel, problem, device, folder: iter(
            [Choice(kernel.default(problem, device), Provenance.PREDICTED, "by the test", 1.0)]
        ),
    )
    conv2d = find_kernel("conv2d")
    one, three = (conv2d.problem(N=1, H=16, W=16, C=64, K=64, R=taps, S=taps) for taps in (1, 3))
    packed = build_pack(DEVICE, tmp_path / "p", problems=[one, three], db=tmp_path)
    assert [entry.op for entry in packed.entries] == ["conv2d", "conv2d", "gemm"]
    assert packed.entries[-1].problem == as_gemm(one).to_json()
    again = build_pack(DEVICE, tmp_path / "p", problems=[one, as_gemm(one)], db=tmp_path)
    assert [entry.op for entry in again.entries] == ["conv2d", "gemm"]


def test_when_nothing_fits_the_file_there_was_stays(choices, tmp_path: Path) -> None:
    output = tmp_path / "p"
    output.write_text("the one before")
    with pytest.raises(RunError, match=r'^no configuration of gemm "M=64,N=64,K=64" can be packed: refused 32$'):
        build_pack(DEVICE, output, problems=choices, db=tmp_path)
    assert output.read_text() == "the one before"
    assert list(tmp_path.iterdir()) == [output]


def test_a_mistake_comes_before_any_compiling(choices, tmp_path: Path, monkeypatch) -> None:
    nothing = f"no result of conv2d for {DEVICE.key} is on record in {re.escape(str(tmp_path))}: tune the device first"
    with pytest.raises(UsageError, match=f"^there is nothing to pack: {nothing}"):
        build_pack(DEVICE, tmp_path / "p", kernels=["conv2d"], db=tmp_path)
    with pytest.raises(UsageError, match=r"^there is nothing to do: no workload of these kernels"):
        build_pack(DEVICE, tmp_path / "p", problems=[], db=tmp_path)
    with pytest.raises(UsageError, match=r"^no device is called 'rtx3091'"):
        build_pack("rtx3091", tmp_path / "p", problems=["M=64,N=64,K=64"], db=tmp_path)
    with pytest.raises(UsageError, match=r"no problem to pack takes a constant 'eps' \(they take: none\)"):
        build_pack(DEVICE, tmp_path / "p", problems=choices, db=tmp_path, constants={"EPS": [1.0]})
    rmsnorm = [find_kernel("rmsnorm").problem(16, 16)]
    attention = [find_kernel("attention").problem(1, 1, 16, 16, 16, softcap=True)]
    for problems, name, values, wanted in (
        (rmsnorm, "eps", (float("nan"), 1e39, -1), "a finite number of at least 0, of fp32"),
        (rmsnorm, "weight_offset", (1e39, -1e39), "a finite number of fp32"),
        (attention, "scale", (1e39, -1, 0, 1e-42), "a number above 0, of fp32, from "),
        (attention, "softcap", (3e38, 1e-42), "a number above 0, of fp32, from "),
    ):
        for value in values:
            with pytest.raises(UsageError, match=rf"^{name}={re.escape(repr(value))} must be {wanted}"):
                build_pack(DEVICE, tmp_path / "p", problems=problems, db=tmp_path, constants={name.upper(): [value]})
    monkeypatch.setenv("TILEWRIGHT_FROZEN", "1")
    with pytest.raises(UsageError, match="TILEWRIGHT_FROZEN is set: no pack is made"):
        build_pack(DEVICE, tmp_path / "p", problems=choices, db=tmp_path)
    assert not (tmp_path / "p").exists()


@pytest.mark.timeout(60)
def test_an_output_that_is_no_file_is_refused(choices, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for output in (pipe, Path("/dev/null")):
        with pytest.raises(UsageError, match=rf"^a pack is a file .*: the output can't be {output}, a pipe or a dev"):
            build_pack(DEVICE, output, problems=choices, db=tmp_path)
    with pytest.raises(UsageError, match=r"is a folder: name a file in it$"):
        build_pack(DEVICE, tmp_path, problems=choices, db=tmp_path)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_database_that_cannot_be_read_is_not_passed_over(choices, tmp_path: Path) -> None:
    (tmp_path / f"{DEVICE.key}.sqlite").write_text("no database " * 99)
    with pytest.raises(DatabaseCorruptError):
        build_pack(DEVICE, tmp_path / "p", problems=choices, db=tmp_path)
    assert not (tmp_path / "p").exists()


def test_problems_of_other_revisions_and_ops_are_left_out(folder: Path, tmp_path: Path) -> None:
    assert {problem.op for problem in problems_on_record(DEVICE, folder)} == set(PICKS)
    assert [problem.op for problem in problems_on_record(DEVICE, folder, ["gemm"])] == ["gemm"]
    assert problems_on_record(DEVICE, tmp_path) == []
    (problem,) = problems_on_record(DEVICE, folder, ["gemm"])
    key = record_key(find_kernel("gemm"), problem, DEVICE)
    with TuningDB.open(DEVICE.key, tmp_path) as db:
        run = db.start_run(Environment("", "", "", "", "", ""))
        for op, text in (("gemm", '{"m":1}'), ("unheard of", "{}")):
            stranger = replace(key, op=op, problem=text)
            times, resources = Times.single(1.0), Resources(1, 0, 0, 0)
            db.add(Record(stranger, "{}", Status.OK, Provenance.MEASURED, times, resources), run)
    assert problems_on_record(DEVICE, tmp_path) == []


def test_a_pack_stays_what_it_was_when_another_takes_its_place(pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(pack.read_bytes())
    opened = Pack(path)
    (tmp_path / "other").write_text("another")
    (tmp_path / "other").replace(path)
    assert [opened.binary(each).cubin for each in opened.specializations]
    with pytest.raises(PackError, match="is no pack, or a damaged one"):
        Pack(path)
