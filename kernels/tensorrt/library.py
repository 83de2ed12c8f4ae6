"""TensorRT itself: imported when it is needed, with a clear word where it is absent or too old."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tilewright.tuning_db.errors import MissingDependencyError, UnsupportedError
from tilewright.tuning_db.text import one_line

OLDEST = (10, 16)
"""The first TensorRT whose plugin API these plugins are tested with."""


def tensorrt() -> Any:
    """The module `tensorrt`.

    Raises:
        MissingDependencyError: it is not installed, or can't be loaded.
        UnsupportedError: it is older than `OLDEST`.
    """
    try:
        import tensorrt as module
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"TensorRT is not installed here ({one_line(error)}): pip install 'tensorrt>=10.16'"
        ) from None
    if not hasattr(module, "__version__"):
        places = ", ".join(map(str, getattr(module, "__path__", ())))
        raise MissingDependencyError(f"{places} is taken for TensorRT, and is not: run Python in another folder")
    check_version(module)
    return module


def plugin_api() -> Any:
    """The module `tensorrt.plugin`.

    Raises:
        MissingDependencyError, UnsupportedError: as `tensorrt`; or it has no plugins that are compiled ahead of time.
    """
    module = tensorrt()
    import tensorrt.plugin as plugin

    if not hasattr(plugin, "aot_impl"):
        raise UnsupportedError(f"TensorRT {module.__version__} has no tensorrt.plugin.aot_impl: install 10.16 or newer")
    return plugin


def check_version(module: ModuleType) -> None:
    """Does nothing for a TensorRT that is new enough.

    Raises:
        UnsupportedError: it is not.
    """
    version = str(module.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise UnsupportedError(
            f"TensorRT {version} is too old for these plugins: install {OLDEST[0]}.{OLDEST[1]} or newer"
        )
