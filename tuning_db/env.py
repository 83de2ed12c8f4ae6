"""The environment variables Tilewright reads, all of them, and where results live by default."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs

from tilewright.tuning_db.errors import UsageError

DB_DIR = "TILEWRIGHT_DB_DIR"
"""Folder of the tuning databases; default: `tilewright` under the platform's user data directory."""

SHIPPED = "TILEWRIGHT_SHIPPED"
"""Folder of the shipped records, in place of the package's own; 0 leaves them out."""

PACK = "TILEWRIGHT_PACK"
"""File of `autotune pack` whose configurations and compiled kernels are used before anything else; default: none."""

FROZEN = "TILEWRIGHT_FROZEN"
"""Whether all must come from the pack: nothing is compiled, searched or written. Off by default."""

CALLS = "TILEWRIGHT_CALLS"
"""File to which a program's processes add each problem that they call, for `autotune --calls`; default: none."""

INTERPRET = "TRITON_INTERPRET"
"""Triton's own switch: kernels run on NumPy arrays in its interpreter. Must be set before Triton is imported."""

COMPILER_SWITCHES = (
    "ALLOW_LHS_TMEM_LAYOUT_CONVERSION",
    "DISABLE_LLVM_OPT",
    "DISABLE_MMA_V3",
    "DISABLE_MMA_V5",
    "DISABLE_PTXAS_OPT",
    "LLVM_PASS_PLUGIN_PATH",
    "PTXAS_OPTIONS",
    "TRITON_ENABLE_ASAN",
    "TRITON_ENABLE_EXPERIMENTAL_CONSAN",
    "TRITON_F32_DEFAULT",
    "TRITON_FORCE_DISABLE_FP_FUSION",
    "TRITON_INSTRUMENTATION_MODE",
    "TRITON_KERNEL_OVERRIDE",
    "TRITON_LIBDEVICE_PATH",
    "TRITON_OVERRIDE_ARCH",
    "TRITON_PLUGIN_PATHS",
    "TRITON_PREFER_TMEM_16x256_LAYOUT",
)
"""Triton's own switches, of 3.6 to 3.9, with which it makes other machine code of the same source."""

_OWN_SHIPPED = Path(__file__).parent / "shipped"

_ON = {"1", "true", "on", "y", "yes"}
_OFF = {"", "0", "false", "off", "n", "no"}


def database_dir(override: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the tuning databases: `override`, else `$TILEWRIGHT_DB_DIR`, else the user data directory.

    Raises:
        UsageError: what is no path, an empty name, or one of a user's home that there is not; or none is named, and
            this user has no home.
    """
    if override is not None:
        given: Any = override
        name = os.fspath(given) if isinstance(given, str | os.PathLike) else given
        if not isinstance(name, str) or "\0" in name:
            raise UsageError(f"the folder of the databases (--db) must be a path, as a text; got {override!r}")
        if not name:
            raise UsageError("the folder of the databases (--db) is empty: name one, or leave it out")
    if override is not None:
        return _expanded(override, "the folder of the databases")
    chosen = os.environ.get(DB_DIR)
    return _expanded(chosen, DB_DIR) if chosen else _user_data_dir()


def _user_data_dir() -> Path:
    try:
        # Of platformdirs some raise, and some give a path with ~, where there is no home.
        return Path(platformdirs.user_data_dir("tilewright", appauthor=False)).expanduser()
    except RuntimeError as error:
        raise UsageError(f"no folder of databases is named, with --db or {DB_DIR}, and {error}") from None


def shipped_dir() -> Path | None:
    """The folder of the records that come with the package, or of those that `$TILEWRIGHT_SHIPPED` names instead; None
    where it is off.

    Raises:
        UsageError: it names a user's home that there is not.
    """
    named = os.environ.get(SHIPPED, "").strip()
    if not named or named.lower() in _ON:
        return _OWN_SHIPPED
    return None if named.lower() in _OFF else _expanded(named, SHIPPED)


def no_shipped_folder() -> str | None:
    """None, or what to say where what `$TILEWRIGHT_SHIPPED` names is not a folder: its files would be missed in
    silence.

    Raises:
        UsageError: as `shipped_dir`.
    """
    folder = shipped_dir()
    if folder is None or folder == _OWN_SHIPPED or _is(folder.is_dir):
        return None
    return f"{SHIPPED}={folder} is no folder: nothing that was shipped is found (0 leaves it out)"


def no_database_folder(folder: Path) -> str | None:
    """None, or what to say where a file stands in the place of the folder of the databases. One that isn't there is
    that of somebody who has not tuned yet."""
    if not _is(folder.is_file):
        return None
    return f"{a_file_for_a_folder(folder)} ({DB_DIR}): nothing that was tuned is found"


def a_file_for_a_folder(folder: Path) -> str:
    """What a message begins with where there is a file of the name of the folder of the databases."""
    return f"{folder} is a file, where the folder of databases should be"


def _is(asked: Callable[[], bool]) -> bool:
    try:
        return asked()
    except OSError:
        return False  # in a folder that may not be looked into


def pack_file() -> Path | None:
    """The pack that `$TILEWRIGHT_PACK` names; None without one.

    Raises:
        UsageError: it names a user's home that there is not.
    """
    named = os.environ.get(PACK)
    return _expanded(named, PACK) if named else None


def calls_file() -> Path | None:
    """The file of calls that `$TILEWRIGHT_CALLS` names; None without one.

    Raises:
        UsageError: it names a user's home that there is not.
    """
    named = os.environ.get(CALLS)
    return _expanded(named, CALLS) if named else None


def _expanded(name: str | os.PathLike[str], what: str) -> Path:
    """A path with ~ as a home: a shell leaves it as it is behind an = in an env file or in quotes."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{what} {os.fspath(name)!r} can't be found: {error}") from None


def frozen() -> bool:
    """Whether `$TILEWRIGHT_FROZEN` is on.

    Raises:
        UsageError: it is neither on nor off: a misspelt lock must not be an open one.
    """
    word = os.environ.get(FROZEN, "").strip().lower()
    if word not in _ON | _OFF:
        raise UsageError(f"{FROZEN}={word!r} is neither on nor off: set it to 1, or to 0")
    return word in _ON


def refuse_if_frozen(what: str) -> None:
    """Does nothing but where `$TILEWRIGHT_FROZEN` is on.

    Raises:
        UsageError: it is; the message says that `what` isn't done then.
    """
    if frozen():
        raise UsageError(f"{FROZEN} is set: {what}; unset it to do so")


def refuse_compiler_switches(what: str) -> None:
    """Does nothing but where one of `COMPILER_SWITCHES` is on: no key has them, so outcomes with one would stand as
    those of the plain compiler.

    Raises:
        UsageError: one is on; the message names it, and says that `what` isn't done then.
    """
    for name in COMPILER_SWITCHES:
        value = os.environ.get(name, "")
        if value.strip().lower() not in _OFF:
            raise UsageError(f"{name}={value} makes Triton compile other machine code: {what}; unset it to do so")


def interpreting() -> bool:
    """Whether this process was told to interpret kernels, by Triton's own reading of the variable."""
    return os.environ.get(INTERPRET, "").lower() in _ON


def compiling_environment() -> dict[str, str]:
    """This process's environment without the interpreter switch, for a process that compiles."""
    return {name: value for name, value in os.environ.items() if name != INTERPRET}


def ptxas_chosen() -> bool:
    """Whether Triton was told of another ptxas than its own, by its own variables."""
    names = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_MOCK_PTX_VERSION")
    return any(os.environ.get(name) for name in names)
