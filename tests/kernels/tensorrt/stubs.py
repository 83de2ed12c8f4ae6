"""TensorRT's real bindings and registry where its builder is absent: stub libraries stand in for what it alone has.

The bindings' wheel needs three shared libraries. All but four of the symbols are in the lean runtime's; the stubs give
those four, and a builder that can't be made. Only tests load them, and only where no whole TensorRT is installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCES = {
    "libnvinfer": """
        #include <stddef.h>
        extern void *getPluginRegistry(void);
        void *createInferBuilder_INTERNAL(void *logger, int version) { return NULL; }
        void *getBuilderPluginRegistry(int capability) { return getPluginRegistry(); }
    """,
    "libnvinfer_plugin": """
        #include <stdbool.h>
        bool initLibNvInferPlugins(void *logger, const char *name) { return true; }
    """,
    "libnvonnxparser": """
        #include <stddef.h>
        void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return NULL; }
        void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return NULL; }
        int getNvOnnxParserVersion(void) { return 0; }
    """,
}


def missing() -> str | None:
    """None, or why the real bindings can't be loaded here."""
    for package in ("tensorrt_bindings", "tensorrt_lean_libs"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if compiler() is None:
        return "no C compiler to build the stub libraries"
    return None


def compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def lean_folder() -> Path:
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build(folder: Path) -> dict[str, str]:
    """Builds the stubs in a folder; gives the environment that a process needs for the bindings to find them."""
    lean = lean_folder()
    (library,) = lean.glob("libnvinfer_lean.so.*")
    suffix = library.name.removeprefix("libnvinfer_lean")
    for name, source in SOURCES.items():
        command = [str(compiler()), "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / f"{name}{suffix}")]
        command += [f"-Wl,-soname,{name}{suffix}"]
        if name == "libnvinfer":
            # Its symbols are to be found through the stub, so the link stays though nothing here calls for it.
            command += ["-Wl,--no-as-needed", f"-L{lean}", f"-l:{library.name}", f"-Wl,-rpath,{lean}"]
        subprocess.run(command, input=source, text=True, check=True, capture_output=True)
    paths = [str(folder), str(lean), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_LIBRARY_PATH": os.pathsep.join(paths)}
