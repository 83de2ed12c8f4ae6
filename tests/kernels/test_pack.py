"""The format of packs: what is written is read, and what was damaged or made up is refused in one line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tilewright.kernels import KERNELS, GemmConfig, GemmProblem, resolve_device
from tilewright.kernels import pack as pack_module
from tilewright.kernels.compile import Binary
from tilewright.kernels.kernel import Launch
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.pack import Entry, Facts, Pack, active_pack, specialization_digest, write_pack
from tilewright.tuning_db.errors import PackError, UsageError
from tilewright.tuning_db.record import Provenance, Resources

FACTS = Facts("rtx3090-82sm", 86, "0.1.0", "3.9.0", "12.9.86", {"gemm": "a" * 64})
PROBLEM, TILE = GemmProblem(64, 64, 64), GemmConfig(16, 16, 32)
ENTRY = Entry("gemm", PROBLEM.to_json(), TILE.to_json(), Provenance.MEASURED, "exact", 12.5)
(LAUNCH,) = GEMM.launches(PROBLEM, TILE)
BINARY = Binary("gemm_kernel", 86, b"\x7fELF a cubin", "", 4, 1024, 0, Resources(64, 0, 0, 1024))
DIGEST = specialization_digest(LAUNCH)
CUBIN = hashlib.sha256(BINARY.cubin).hexdigest()


def written(entries=(ENTRY,), binaries=None, facts=FACTS) -> bytes:
    stream = io.BytesIO()
    write_pack(stream, facts, entries, {DIGEST: BINARY} if binaries is None else binaries)
    return stream.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.pack"
    path.write_bytes(written())
    return path


def changed(path: Path, change: Any, **members: bytes) -> Path:
    """A pack with another manifest, and other members; whatever zip makes of it."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(contents["manifest.json"])
    change(manifest)
    contents |= {"manifest.json": json.dumps(manifest).encode(), **members}
    made = path.with_name("changed.pack")
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return made


def test_what_is_written_is_read(path: Path) -> None:
    pack = Pack(path)
    assert pack.facts == FACTS
    assert pack.entries == [ENTRY]
    assert pack.entry("gemm", PROBLEM.to_json()) == ENTRY
    assert pack.entry("conv2d", PROBLEM.to_json()) is None
    assert pack.entry("gemm", replace(PROBLEM, M=65).to_json()) is None
    assert pack.binaries([LAUNCH]) == (BINARY,)
    assert pack.binaries([LAUNCH, replace(LAUNCH, num_warps=8)]) is None
    pack.check("rtx3090-82sm", "gemm", "a" * 64)
    pack.check("rtx3090-82sm", "conv2d", "b" * 64)


def test_equal_contents_give_equal_bytes_and_code_is_kept_once() -> None:
    other = replace(ENTRY, problem=replace(PROBLEM, N=16).to_json())
    twin = "f" * 64
    one = written((ENTRY, other), {DIGEST: BINARY, twin: BINARY})
    assert one == written((other, ENTRY), {twin: BINARY, DIGEST: BINARY})
    with zipfile.ZipFile(io.BytesIO(one)) as archive:
        assert archive.namelist() == ["manifest.json", f"cubins/{CUBIN}.cubin"]
        assert archive.testzip() is None


def test_a_digest_is_of_all_that_code_depends_on() -> None:
    assert specialization_digest(replace(LAUNCH, grid=(7, 1, 1))) == DIGEST
    larger = GEMM.launches(replace(PROBLEM, M=128), TILE)[0]
    assert specialization_digest(larger) == DIGEST, "of another size, with the same code"
    for other in (
        replace(LAUNCH, num_warps=8),
        replace(LAUNCH, num_stages=5),
        replace(LAUNCH, arguments=(LAUNCH.arguments[0]._replace(aligned=False), *LAUNCH.arguments[1:])),
        LAUNCH.with_constants((("BLOCK_M", 32),)),
        LAUNCH.with_constants((("GATED", 0),)),
        LAUNCH.with_constants((("GATED", ""),)),
    ):
        assert specialization_digest(other) != DIGEST


def test_numbers_are_compared_as_the_kernel_has_them() -> None:
    digests = {
        value: specialization_digest(LAUNCH.with_constants((("PRECISION", value),)))
        for value in (1e-6, 9.999999974752427e-07, 1.0000001e-6, 1.1e-6)
    }
    assert digests[1e-6] == digests[9.999999974752427e-07]
    assert len(set(digests.values())) == 3


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernels_code_has_a_digest(kernel) -> None:
    device = resolve_device("h100")
    for name, problem, config in kernel.feature_cases:
        for launch in kernel.launches(problem, config or kernel.default(problem, device)):
            assert len(specialization_digest(launch)) == 64, name


def test_another_device_and_revision_are_refused(path: Path) -> None:
    pack = Pack(path)
    with pytest.raises(PackError, match=r"a.pack is of rtx3090-82sm, and this GPU is a10-72sm: make one"):
        pack.check("a10-72sm", "gemm", "a" * 64)
    with pytest.raises(PackError, match=r"is of another revision of gemm .*`autotune pack --device rtx3090`"):
        pack.check("rtx3090-82sm", "gemm", "b" * 64)


def kernel_of(manifest: dict) -> dict:
    return manifest["kernels"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(format="zip"), "format='zip' must be one of tilewright-pack"),
        (lambda m: m.update(version=2), "is a newer Tilewright's (version 2): upgrade tilewright"),
        (lambda m: m.update(version=10**400), "0… (401 characters)): upgrade tilewright"),
        (lambda m: m.update(version="1"), "version='1' must be an integer from 1 to 1"),
        (lambda m: m.pop("arch"), "arch is missing"),
        (lambda m: m.update(more=1), "'more' is no field"),
        (lambda m: m.update(hidden_pointers=1), "has kernels with 1 hidden parameters, and this Tilewright passes 2"),
        (lambda m: m.update(entries={}), "entries={} must be a list of objects"),
        (lambda m: m.update(kernels=[1]), "kernels=[1] must be a list of objects"),
        (lambda m: m["entries"][0].update(provenance="sure"), "provenance='sure' must be one of measured"),
        (lambda m: m["entries"][0].update(problem=[]), "problem=[] must be an object of plain values"),
        (lambda m: m["entries"][0].update(time_us=-1), "time_us=-1 must be a finite number above 0"),
        (lambda m: kernel_of(m).update(cubin="../../etc/passwd"), "must be a SHA-256"),
        (lambda m: kernel_of(m).update(cubin=CUBIN.upper()), "must be a SHA-256"),
        (lambda m: kernel_of(m).update(num_warps=0), "num_warps=0 must be 1, 2 or a multiple of 4 up to 32"),
        (lambda m: kernel_of(m).update(num_warps=5), "num_warps=5 must be 1, 2 or a multiple of 4 up to 32"),
        (lambda m: kernel_of(m).update(num_warps=True), "num_warps=True must be 1, 2 or a multiple of 4"),
        (lambda m: kernel_of(m).update(name="k\0"), r"name='k\x00' must be the name of a function"),
        (lambda m: m.update(device="x\n\x1b[31m"), r"device='x\n\x1b[31m' must be a text of printable characters"),
        (lambda m: m.update(tilewright="1\n2"), r"tilewright='1\n2' must be a text of printable characters"),
        (lambda m: m["entries"][0].update(reason="\x1b[2J"), r"reason='\x1b[2J' must be a text of printable"),
        (lambda m: m["entries"][0].update(op="gemm\r"), r"op='gemm\r' must be a text of printable characters"),
        (lambda m: m.update(arch=90), "arch=90 must be 86, as rtx3090-82sm is"),
        (lambda m: m.update(arch=90, device="a10-36sm"), "arch=90 must be 86, as a10-36sm is"),
        (lambda m: m.update(revisions={}), "revisions lacks that of gemm, which has entries"),
        (lambda m: m.update(revisions={"gemm": "new"}), "gemm='new' must be a SHA-256 of 64 hexadecimal digits"),
        (lambda m: kernel_of(m).update(bytes=10**12), "bytes=1000000000000 must be an integer"),
        (lambda m: kernel_of(m).update(resources={}), "registers is missing"),
        (lambda m: m["entries"].append(m["entries"][0]), " is there twice"),
        (lambda m: m["kernels"].append(kernel_of(m)), " is there twice"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(path: Path, change: Any, said: str) -> None:
    made = changed(path, change)
    with pytest.raises(PackError) as caught:
        Pack(made)
    message = str(caught.value)
    assert said in message
    assert str(made) in message
    assert "\n" not in message
    assert "again" in message or "upgrade" in message


@pytest.mark.parametrize(
    ("change", "members", "said"),
    [
        (lambda m: kernel_of(m).update(cubin="0" * 64), {}, f"it has no cubins/{'0' * 64}.cubin"),
        (lambda m: None, {f"cubins/{CUBIN}.cubin": b"\x7fELF another"}, "has SHA-256 "),
        (lambda m: kernel_of(m).update(bytes=5), {}, "is compressed, encrypted or over 5 bytes"),
        (lambda m: kernel_of(m).update(bytes=5000), {}, "has SHA-256 "),
        (lambda m: kernel_of(m).update(num_warps=32), {}, "a kernel has num_warps=32 and its configuration 4"),
    ],
)  # fmt: skip
def test_code_that_is_not_the_manifests_is_not_handed_out(path: Path, change: Any, members: dict, said: str) -> None:
    pack = Pack(changed(path, change, **members))
    with pytest.raises(PackError) as caught:
        pack.binaries([LAUNCH])
    assert said in str(caught.value)
    assert "make it again with `autotune pack`" in str(caught.value)


def handed_out(path: Path, launch: Launch = LAUNCH) -> tuple[Binary, ...] | str | None:
    """The kernels of a pack, or why there are none."""
    try:
        return Pack(path).binaries([launch])
    except PackError as error:
        return str(error)


def test_a_specialised_loop_has_the_warps_that_its_compiler_chose(path: Path) -> None:
    config = GemmConfig(128, 128, 64, num_warps=4, num_stages=4, PERSISTENT=True, TMA=True, WARP_SPECIALIZE=True)
    (launch,) = GEMM.launches(GemmProblem(512, 512, 512), config)
    for warps, fine in ((4, True), (12, True), (2, False)):
        path.write_bytes(written(binaries={specialization_digest(launch): replace(BINARY, num_warps=warps)}))
        assert isinstance(handed_out(path, launch), tuple) == fine, warps


def test_any_damage_is_found(path: Path) -> None:
    """One bit flipped at each place in turn: the pack is refused, or what it hands out is what was put in."""
    content = path.read_bytes()
    damaged = path.with_name("damaged.pack")
    manifest = content.index(b'{"arch"'), content.index(b"cubins/" + CUBIN.encode()) - 30
    for place in range(0, len(content), 2):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        found = handed_out(damaged)
        assert found == (BINARY,) or (isinstance(found, str) and "\n" not in found), place
        if manifest[0] <= place < manifest[1]:
            assert isinstance(found, str), place
    for length in range(0, len(content), 7):
        damaged.write_bytes(content[:length])
        assert isinstance(handed_out(damaged), str)


def test_what_is_no_pack(tmp_path: Path, path: Path) -> None:
    for name, content, said in (
        ("empty", b"", "it is no zip archive"),
        ("text", b"not a zip " * 99, "it is no zip archive"),
        ("other", _zip({"readme": b"of something else"}), "it has no manifest.json"),
        ("broken", _zip({"manifest.json": b"{"}), "is no JSON"),
        ("deep", _zip({"manifest.json": b'{"a":' * 99999}), "is nested too deeply"),
        ("packed", _zip({"manifest.json": b"{}"}, zipfile.ZIP_DEFLATED), "manifest.json is compressed, encrypted"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PackError, match=r"is no pack, or a damaged one: ") as caught:
            Pack(tmp_path / name)
        assert said in str(caught.value)
    with pytest.raises(PackError, match=r"the pack .*absent can't be read: No such file"):
        Pack(tmp_path / "absent")


def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, kind in ((tmp_path, "a folder"), (pipe, "a pipe or a device"), (Path("/dev/zero"), "a pipe or a device")):
        with pytest.raises(PackError, match=rf"^the pack {path} is {kind} and must be a file: name the one that"):
            Pack(path)


@pytest.mark.parametrize("member", [0, 1], ids=["manifest", "cubin"])
def test_a_place_past_every_file_is_damage(path: Path, member: int) -> None:
    """Where a member begins may have 64 bits in a zip archive, and a place in a file has 63."""
    content = bytearray(path.read_bytes())
    record = content.index(b"PK\1\2")
    for _ in range(member):
        record = content.index(b"PK\1\2", record + 4)
    end = content.index(b"PK\5\6")
    name = int.from_bytes(content[record + 28 : record + 30], "little")
    extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)  # zip64: the place alone
    content[record + 30 : record + 32] = struct.pack("<H", len(extra))
    content[record + 42 : record + 46] = b"\xff" * 4
    (size,) = struct.unpack_from("<I", content, end + 12)
    content[end + 12 : end + 16] = struct.pack("<I", size + len(extra))
    content[record + 46 + name : record + 46 + name] = extra
    path.write_bytes(content)
    found = handed_out(path)
    assert isinstance(found, str)
    assert f"{path} is no pack, or a damaged one: " in found
    assert "\n" not in found


def _zip(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def test_an_open_pack_is_the_file_it_was(path: Path) -> None:
    pack = Pack(path)
    path.with_name("new").write_bytes(b"another")
    path.with_name("new").replace(path)
    assert pack.binaries([LAUNCH]) == (BINARY,)


FORKS = """
import os, sys
from pathlib import Path
from tilewright.kernels.pack import Pack
pack = Pack(Path(sys.argv[1]))
digests = sorted(pack.specializations)
children = []
for start in range(4):
    child = os.fork()
    if child == 0:
        order = digests[16 * start :] + digests[: 16 * start]
        good = all(set(pack.binary(each).cubin) == {int(each, 16)} for _ in range(5) for each in order)
        os._exit(0 if good else 1)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_forks_read_at_once_without_disturbing_one_another(path: Path) -> None:
    binaries = {f"{number:064x}": replace(BINARY, cubin=bytes([number]) * 9000) for number in range(64)}
    path.write_bytes(written(binaries=binaries))
    done = subprocess.run([sys.executable, "-c", FORKS, path], capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 0, 0, 0]\n"


def test_the_file_is_closed_with_the_pack(path: Path) -> None:
    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before = descriptors()
    packs = [Pack(path) for _ in range(10)]
    assert descriptors() == before + 10
    del packs
    assert descriptors() == before


def test_the_pack_of_this_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILEWRIGHT_PACK", raising=False)
    monkeypatch.delenv("TILEWRIGHT_FROZEN", raising=False)
    assert active_pack() is None
    monkeypatch.setenv("TILEWRIGHT_FROZEN", "1")
    with pytest.raises(UsageError, match="TILEWRIGHT_FROZEN is set, and TILEWRIGHT_PACK names no pack"):
        active_pack()
    monkeypatch.setenv("TILEWRIGHT_PACK", str(path))
    pack = active_pack()
    assert pack is not None
    assert pack.path == path
    assert active_pack() is pack
    pack_module._opened.cache_clear()
