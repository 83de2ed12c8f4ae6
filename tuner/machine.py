"""What fails of the machine while a configuration is tried: a full disk, a folder that can't be written, no memory.

It says nothing about the configuration, and next time it may be gone: it ends the run, and is never on record.
"""

from __future__ import annotations

import errno
import signal
import subprocess
import tempfile

from tilewright.tuning_db.errors import CompileError

_ROOM_BYTES = 1 << 20  # more than the PTX or the code of a kernel takes

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or name another place in TRITON_CACHE_DIR and TMPDIR"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n), or give fewer --jobs"),
    **dict.fromkeys((errno.ENOMEM, errno.EAGAIN), "give fewer --jobs, or the machine more memory"),
}
_OTHER_ADVICE = "see to that, or name another place in TRITON_CACHE_DIR and TMPDIR"


def machine_fault(error: BaseException) -> str:
    """What failed of the machine and what to do, where that is why an error was raised; "" where it isn't.

    An error that is raised because of another (`raise … from …`) has its reasons. What ptxas writes when it refuses a
    kernel is none of them: it ends by itself, and no call of the system fails.
    """
    reason: BaseException | None = error
    while reason is not None:
        # Without a number it is Python's own word, as for a source that can't be found.
        if isinstance(reason, OSError) and reason.errno is not None:
            named = [str(name) for name in (reason.filename, reason.filename2) if name is not None]
            where = " and ".join(named) or _written_to()
            return f"{where}: {reason.strerror}: {_ADVICE.get(reason.errno, _OTHER_ADVICE)}"
        if isinstance(reason, MemoryError):
            return f"out of memory: {_ADVICE[errno.ENOMEM]}"
        reason = reason.__cause__
    return ""


def was_killed(error: CompileError) -> bool:
    """Whether a tool of the compiler, such as ptxas, was killed: by the system for want of memory, say."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, subprocess.CalledProcessError) and reason.returncode == -signal.SIGKILL:
            return True
        reason = reason.__cause__ or reason.__context__  # Triton's own error has no cause, only this
    return False


def heed_machine_fault(error: CompileError) -> None:
    """Raises what the machine has failed with, where that is why a kernel was not compiled; else returns.

    Raises:
        CompileError: the error itself, because of an error of the system.
        OSError: no temporary file can be written.
    """
    if machine_fault(error):
        raise error
    # ptxas writes in a process of its own, and its reasons to a file: where the disk is full, that one is empty too.
    with tempfile.TemporaryFile() as file:
        file.write(bytes(_ROOM_BYTES))


def _written_to() -> str:
    """The folders that a compiler writes to: a write that fails doesn't say where it was."""
    from triton import knobs

    return f"{knobs.cache.dir} (Triton's cache) or {tempfile.gettempdir()} (temporary files)"
