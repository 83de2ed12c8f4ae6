"""The errors that Tilewright raises on purpose and its functions' pages name. This is the lowest floor of the package,
so that all of it can raise them; an exception that one file raises and a neighbour catches stands where it is raised.

    TilewrightError
    ├── UsageError (also ValueError)        the caller's mistake: the command line exits 2
    │   ├── UnknownDeviceError              no board, arch or live GPU of that name
    │   ├── UnknownKernelError              no kernel of that name
    │   │   └── UnknownSuiteError           no suite of that name
    │   ├── ProblemError                    malformed, missing or impossible problem; shapes that don't match
    │   │   └── UnsupportedProblemError     (also UnsupportedError) well formed, and nothing here computes it
    │   ├── UnsupportedError (also NotImplementedError)   right in itself, but not on this device or in this kernel
    │   ├── IllegalConfigError              the configuration breaks a limit; the search skips this and nothing else
    │   ├── ExportFileError                 what is to be imported is no export, or a broken one
    │   └── ModelError                      an ONNX file, or its data, that can't be used
    ├── DatabaseError                       the tuning database
    │   ├── DatabaseCorruptError            not a database, or damaged; the next opening for writing sets it aside
    │   ├── DatabaseSchemaError             written by a newer Tilewright
    │   ├── DatabaseAccessError             the file or folder can't be read or written
    │   └── StorageError                    the storage that runs share can't be opened, read or written
    ├── PackError                           the pack can't be used: damaged, another device's, another revision's
    │   └── NotPackedError                  the pack lacks what was asked for, and nothing may be compiled
    ├── MissingDependencyError (also ImportError)   an optional package or a GPU is needed and absent
    └── RunError                            the run itself failed: the command line exits 1
        ├── CompileError                    Triton or ptxas refused the kernel
        ├── LaunchError                     the driver refused the kernel
        ├── WorkerError                     a worker process could not be started or kept alive
        └── MachineError                    a full disk or the like, in the midst of a trial: no fault of what was tried

Messages carry the values and what to do about them, in one line.
"""

from __future__ import annotations


class TilewrightError(Exception):
    """Root of all errors raised on purpose."""


class UsageError(TilewrightError, ValueError):
    """The caller's mistake: fix the call and try again."""


class UnknownDeviceError(UsageError):
    """No board, architecture or live GPU has that name."""


class UnknownKernelError(UsageError):
    """No kernel has that name."""


class UnknownSuiteError(UnknownKernelError):
    """No suite has that name. What to tune is unknown in both cases, which one `except` may serve."""


class ProblemError(UsageError):
    """A problem that is malformed, incomplete or impossible, or arrays that don't form one."""


class UnsupportedError(UsageError, NotImplementedError):
    """Right in itself, but this device or this kernel can't do it."""


class UnsupportedProblemError(ProblemError, UnsupportedError):
    """A problem that is well formed, and that no kernel here computes."""


class IllegalConfigError(UsageError):
    """The configuration breaks a limit of the problem or the device; the message names it."""


class ExportFileError(UsageError):
    """A file to import is no export of records, or a broken one; the message has file, line and value."""


class ModelError(UsageError):
    """An ONNX model, or the data for it, that can't be used; the message names file, node or tensor, and the value."""


class DatabaseError(TilewrightError):
    """The tuning database can't be used."""


class DatabaseCorruptError(DatabaseError):
    """The file is damaged or no database. Opening it for writing sets it aside, under a name that is reported."""


class DatabaseSchemaError(DatabaseError):
    """The file was written by a newer Tilewright than this one, or by something else."""


class DatabaseAccessError(DatabaseError):
    """The file or its folder can't be read or written."""


class StorageError(DatabaseError):
    """The storage that runs on several hosts share can't be opened, read or written, or its driver is absent."""


class PackError(TilewrightError):
    """The pack can't be used: it is damaged, of another device, or of another revision of the kernels."""


class NotPackedError(PackError):
    """The pack lacks what was asked for, and this process may not compile it."""


class MissingDependencyError(TilewrightError, ImportError):
    """An optional package, or the GPU itself, is needed and absent."""


class RunError(TilewrightError):
    """The run failed through no mistake in how it was called."""


class CompileError(RunError):
    """Triton or ptxas refused the kernel."""


class LaunchError(RunError):
    """The driver refused the kernel."""


class WorkerError(RunError):
    """A worker process could not be started or kept alive."""


class MachineError(RunError):
    """The machine failed in the midst of a trial: a full disk, a folder that can't be written, no memory."""
