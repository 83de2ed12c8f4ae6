"""Packs: the configurations and compiled kernels of one device in one file, for programs that must not compile.

A pack is a zip archive of `manifest.json` and `cubins/<SHA-256>.cubin`, stored without compression; docs/packs.md has
the manifest. `$TILEWRIGHT_PACK` names the one that this process uses. Nothing in it is ever unpickled or run on the
processor, and no cubin is handed out whose bytes don't have the SHA-256 that the manifest says.

This file knows no kernels: ops, problems and configurations are names and JSON here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import struct
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import triton.language as tl

from tilewright.kernels.catalogue import CATALOGUE
from tilewright.kernels.compile import HIDDEN_POINTERS, Binary
from tilewright.kernels.kernel import Launch
from tilewright.tuning_db import env
from tilewright.tuning_db import strict_json as is_
from tilewright.tuning_db.errors import PackError, UsageError
from tilewright.tuning_db.record import Provenance, Resources, canonical_json
from tilewright.tuning_db.rows import RESOURCES
from tilewright.tuning_db.text import shown

_Name = TypeVar("_Name")
_Value = TypeVar("_Value")

FORMAT = "tilewright-pack"
VERSION = 1

MANIFEST = "manifest.json"
MOST_MANIFEST_BYTES = 1 << 26
MOST_CUBIN_BYTES = 1 << 26
"""An entry takes about 1 KB of the manifest; a cubin 10 to 300 KB."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a pack says of one problem."""

    op: str
    problem: str  # canonical JSON
    config: str  # canonical JSON
    provenance: Provenance  # of the choice when the pack was made
    reason: str
    time_us: float | None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a pack is made with and for."""

    device: str  # `Device.key`
    arch: int
    tilewright: str
    triton: str
    ptxas: str
    revisions: Mapping[str, str]  # of each op: the hash of its code


def specialization_digest(launch: Launch) -> str:
    """SHA-256 of what the compiled code of a launch depends on, besides the target.

    Numbers are compared as the kernel has them, in fp32: eps=1e-6 and its fp32 neighbour are one kernel.
    """
    return hashlib.sha256(json.dumps(_rounded(launch.specialization)).encode()).hexdigest()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return struct.unpack("<f", struct.pack("<f", value))[0]
    if isinstance(value, tl.dtype):
        return f"dtype {value.name}"
    return [_rounded(each) for each in value] if isinstance(value, tuple) else value


def write_pack(stream: BinaryIO, facts: Facts, entries: Iterable[Entry], binaries: Mapping[str, Binary]) -> None:
    """Write a pack; `binaries` by `specialization_digest`. Equal contents give equal bytes.

    Raises:
        OSError: the stream can't be written.
    """
    kernels = []
    cubins = {}
    for specialization, binary in sorted(binaries.items()):
        digest = hashlib.sha256(binary.cubin).hexdigest()
        cubins[digest] = binary.cubin
        fields = {name: getattr(binary, name) for name in _BINARY}
        kernels.append(
            {
                "specialization": specialization,
                "cubin": digest,
                "bytes": len(binary.cubin),
                **fields,
                "resources": asdict(binary.resources),
            }
        )
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **{name: getattr(facts, name) for name in _FACTS},
        "revisions": dict(facts.revisions),
        "hidden_pointers": HIDDEN_POINTERS,
        "entries": [
            {**asdict(entry), "problem": json.loads(entry.problem), "config": json.loads(entry.config)}
            for entry in sorted(entries, key=lambda entry: (entry.op, entry.problem))
        ],
        "kernels": kernels,
    }
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, MANIFEST, canonical_json(manifest).encode())
        for digest, cubin in sorted(cubins.items()):
            _add(archive, _member(digest), cubin)


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    member.create_system = 3  # Unix, wherever it is made
    member.external_attr = 0o644 << 16
    archive.writestr(member, content)


def _member(digest: str) -> str:
    return f"cubins/{digest}.cubin"


def _hash(value: Any) -> str | None:
    fine = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return None if fine else "a SHA-256 of 64 hexadecimal digits"


def _list(value: Any) -> str | None:
    return None if isinstance(value, list) and all(isinstance(each, dict) for each in value) else "a list of objects"


def _warps(value: Any) -> str | None:
    # A kernel with warps of several tasks has a sum of theirs, in groups of four.
    fine = is_.integer(1, 32)(value) is None and (value in (1, 2) or value % 4 == 0)
    return None if fine else "1, 2 or a multiple of 4 up to 32"


def _identifier(value: Any) -> str | None:
    fine = isinstance(value, str) and value.isascii() and value.isidentifier()
    return None if fine else "the name of a function, of letters, digits and _"


_FACTS = {
    "device": is_.name,
    "arch": is_.integer(1, 9999),
    "tilewright": is_.line,
    "triton": is_.line,
    "ptxas": is_.line,
}
_FIELDS = {
    "format": is_.one_of((FORMAT,)),
    "version": is_.integer(VERSION, VERSION),
    **_FACTS,
    "revisions": is_.plain,
    "hidden_pointers": is_.integer(),
    "entries": _list,
    "kernels": _list,
}
_ENTRY = {
    "op": is_.name,
    "problem": is_.plain,
    "config": is_.plain,
    "provenance": is_.one_of([str(provenance) for provenance in Provenance]),
    "reason": is_.line,
    "time_us": is_.optional(is_.positive),
}
_BINARY = {
    "name": _identifier,
    "num_warps": _warps,
    "shared_bytes": is_.integer(0, 1 << 20),
    "scratch_bytes": is_.integer(0, 1 << 30),
}
_KERNEL = {
    "specialization": _hash,
    "cubin": _hash,
    "bytes": is_.integer(1, MOST_CUBIN_BYTES),
    **_BINARY,
    "resources": is_.anything,
}
_RESOURCES = dict.fromkeys(RESOURCES, is_.integer())


class Pack:
    """An open pack. It keeps its file open: what is renamed into its place afterwards doesn't change it.

    Safe to share between threads, and between a process and its forks.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file and checks its manifest; cubins are read when they are asked for.

        Raises:
            PackError: there is no such file, it can't be read, or it is no pack or a damaged one.
        """
        self.path = path
        try:
            # A pipe would be waited for, until someone writes to it.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise PackError(f"the pack {path} can't be read: {error.strerror}") from None
        weakref.finalize(self, os.close, self._descriptor)
        mode = os.fstat(self._descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise PackError(f"the pack {path} is {kind} and must be a file: name the one that `autotune pack` wrote")
        try:
            self._members, text = self._directory()
            manifest = is_.read_object(text)
            if manifest.get("format") == FORMAT and _is_newer(manifest.get("version")):
                newer = shown(manifest["version"])
                raise PackError(f"{path} is a newer Tilewright's (version {newer}): upgrade tilewright")
            is_.check_fields(manifest, _FIELDS)
            self._entries = _once(((entry.op, entry.problem), entry) for entry in map(_entry, manifest["entries"]))
            self._kernels = _once((kernel["specialization"], kernel) for kernel in map(_kernel, manifest["kernels"]))
            _check_whole(manifest)
        except (ValueError, OSError, OverflowError) as error:
            raise self._damaged(str(error)) from None
        if manifest["hidden_pointers"] != HIDDEN_POINTERS:
            raise PackError(
                f"{path} has kernels with {manifest['hidden_pointers']} hidden parameters, and this Tilewright passes "
                f"{HIDDEN_POINTERS}: make the pack again"
            )
        self.facts = Facts(**{name: manifest[name] for name in _FACTS}, revisions=manifest["revisions"])

    @property
    def entries(self) -> list[Entry]:
        """Every problem's, by op and problem."""
        return list(self._entries.values())

    @property
    def specializations(self) -> list[str]:
        """Digests of what kernels there are of."""
        return list(self._kernels)

    def check(self, device: str, op: str, revision: str) -> None:
        """Does nothing for a pack that serves this device and this revision of an op, if it has the op at all.

        Raises:
            PackError: it is of another device or revision.
        """
        if device != self.facts.device:
            raise PackError(
                f"{self.path} is of {self.facts.device}, and this GPU is {device}: make one for it with "
                f"`autotune pack`, or unset {env.PACK}"
            )
        if self.facts.revisions.get(op, revision) != revision:
            raise PackError(
                f"{self.path} is of another revision of {op} (made with Tilewright {self.facts.tilewright}): make it "
                f"again with `autotune pack --device {self.facts.device.rpartition('-')[0]}`, or unset {env.PACK}"
            )

    def entry(self, op: str, problem: str) -> Entry | None:
        """What the pack says of a problem (canonical JSON); None if it lacks it."""
        return self._entries.get((op, problem))

    def binaries(self, launches: Sequence[Launch]) -> tuple[Binary, ...] | None:
        """The compiled kernels of launches, each read from the file and held against its hash; None if it lacks one.

        Raises:
            PackError: the file is damaged, or was changed after it was opened.
        """
        digests = [specialization_digest(launch) for launch in launches]
        if not all(digest in self._kernels for digest in digests):
            return None
        for launch, digest in zip(launches, digests, strict=True):
            self._check_warps(launch, self._kernels[digest]["num_warps"])
        return tuple(map(self.binary, digests))

    def binary(self, specialization: str) -> Binary:
        """One compiled kernel, as `binaries`."""
        kernel = self._kernels[specialization]
        cubin = self._cubin(kernel["cubin"], kernel["bytes"])
        return Binary(
            arch=self.facts.arch,
            cubin=cubin,
            ptx="",
            resources=Resources(**kernel["resources"]),
            **{name: kernel[name] for name in _BINARY},
        )

    def _check_warps(self, launch: Launch, found: int) -> None:
        """Does nothing for a number of warps that the code of a launch can have: the launch's own, and of a
        warp-specialised one a multiple, which Triton chooses.

        Raises:
            PackError: it is another; the driver would run the code with the wrong number of threads.
        """
        specialised = dict(launch.constexprs).get("WARP_SPECIALIZE", False)
        if found != launch.num_warps and not (specialised and found % launch.num_warps == 0):
            raise self._damaged(f"a kernel has num_warps={found} and its configuration {launch.num_warps}")

    def _directory(self) -> tuple[dict[str, zipfile.ZipInfo], bytes]:
        """The archive's members by name, and the manifest's text."""
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    members = {member.filename: member for member in archive.infolist()}
            except (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError) as error:
                raise ValueError(f"it is no zip archive ({error})") from None
        if MANIFEST not in members:
            raise ValueError(f"it has no {MANIFEST}")
        text = self._content(members[MANIFEST], MOST_MANIFEST_BYTES)
        if zlib.crc32(text) != members[MANIFEST].CRC:
            raise ValueError(f"{MANIFEST} doesn't have its check sum")
        return members, text

    def _cubin(self, digest: str, size: int) -> bytes:
        name = _member(digest)
        try:
            if name not in self._members:
                raise ValueError(f"it has no {name}")
            content = self._content(self._members[name], size)
        except (ValueError, OSError, OverflowError) as error:
            raise self._damaged(str(error)) from None
        found = hashlib.sha256(content).hexdigest()
        if found != digest or len(content) != size:
            raise self._damaged(f"{name} has SHA-256 {found}, and is not loaded")
        return content

    def _content(self, member: zipfile.ZipInfo, most: int) -> bytes:
        """The bytes of a member, as they stand in the file. By their place, not by a position that forks share."""
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.file_size > most:
            raise ValueError(f"{member.filename} is compressed, encrypted or over {most} bytes")
        header = os.pread(self._descriptor, 30, member.header_offset)
        if len(header) < 30:
            raise ValueError("it was cut short")
        name, extra = struct.unpack("<HH", header[26:])
        content = os.pread(self._descriptor, member.file_size, member.header_offset + 30 + name + extra)
        if len(content) != member.file_size:
            raise ValueError(f"{member.filename} was cut short")
        return content

    def _damaged(self, reason: str) -> PackError:
        return PackError(f"{self.path} is no pack, or a damaged one: {reason}; make it again with `autotune pack`")


def _is_newer(version: object) -> bool:
    return isinstance(version, int) and version > VERSION


def _check_whole(manifest: dict[str, Any]) -> None:
    """Does nothing for a manifest whose fields go together.

    Raises:
        ValueError: the arch is not the device's, or an op's revision is missing, and would not be looked at.
    """
    device, arch = manifest["device"], manifest["arch"]
    board = device.rpartition("-")[0]  # a slice of it has other SMs
    for known in CATALOGUE:
        if known.board == board and known.arch != arch:
            raise ValueError(f"arch={arch} must be {known.arch}, as {device} is")
    is_.check_fields(manifest["revisions"], dict.fromkeys(manifest["revisions"], _hash))
    for entry in manifest["entries"]:
        if entry["op"] not in manifest["revisions"]:
            raise ValueError(f"revisions lacks that of {entry['op']}, which has entries")


def _once(pairs: Iterable[tuple[_Name, _Value]]) -> dict[_Name, _Value]:
    """A mapping in which no name is given twice."""
    found: dict[_Name, _Value] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice")
        found[name] = value
    return found


def _entry(values: dict[str, Any]) -> Entry:
    is_.check_fields(values, _ENTRY)
    texts = {name: canonical_json(values[name]) for name in ("problem", "config")}
    return Entry(**{**values, **texts, "provenance": Provenance(values["provenance"])})


def _kernel(values: dict[str, Any]) -> dict[str, Any]:
    is_.check_fields(values, _KERNEL)
    is_.check_fields(values["resources"], _RESOURCES)
    return values


def active_pack() -> Pack | None:
    """The pack of this process, opened once; None if it has none.

    Raises:
        PackError: as `Pack`.
        UsageError: `$TILEWRIGHT_FROZEN` is on, and `$TILEWRIGHT_PACK` names no pack.
    """
    path = env.pack_file()
    if path is not None:
        return _opened(path)
    if env.frozen():
        raise UsageError(f"{env.FROZEN} is set, and {env.PACK} names no pack: set that too, or unset {env.FROZEN}")
    return None


@functools.lru_cache(maxsize=4)
def _opened(path: Path) -> Pack:
    return Pack(path)
