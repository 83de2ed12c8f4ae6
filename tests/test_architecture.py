"""The walls of the project: who may import whom, what is packaged, who reads the environment."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("tuning_db", "kernels", "tuner")  # each may import itself and what stands before it
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))

pytestmark = pytest.mark.smoke


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or anywhere inside."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or node.module is None, f"{path}: use absolute imports across files"
            yield node.module or ""


def top_level_imports(path: Path) -> Iterator[str]:
    """Modules that importing the file imports."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_point_one_way(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    for module in imports(path):
        root, _, rest = module.partition(".")
        if root == "tilewright":
            assert rest.partition(".")[0] in allowed, f"{floor} must not import {module}"
        assert root not in (*FLOORS, "tests", "benchmarks"), f"import tilewright.{module}, not {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_guests_are_never_imported_at_import_time(path: Path) -> None:
    roots = {module.partition(".")[0] for module in top_level_imports(path)}
    if path == ROOT / "tuner" / "sampler.py":  # a class of Optuna's; whoever needs it imports it then
        roots -= {"optuna"}
    assert not roots & {"torch", "jax", "cupy", "cupy_backends", "pynvml", "tensorrt", "optuna", "sqlite_utils"}


def test_torch_is_never_imported() -> None:
    assert not [path for path in SOURCES if any(name.partition(".")[0] == "torch" for name in imports(path))]


def test_tuning_db_knows_no_gpu() -> None:
    for path in (ROOT / "tuning_db").rglob("*.py"):
        roots = {module.partition(".")[0] for module in imports(path)}
        assert not roots & {"triton", "numpy", "cupy", "cupy_backends"}, path


def test_kernels_know_nothing_of_tensorrt() -> None:
    """The stamp of the kernels' code (`kernels.identity`) leaves its folder out."""
    for path in (ROOT / "kernels").rglob("*.py"):
        if "tensorrt" not in path.relative_to(ROOT).parts:
            assert not [name for name in imports(path) if name.startswith("tilewright.kernels.tensorrt")], path


def test_the_environment_is_read_in_one_file() -> None:
    readers = [path for path in SOURCES if re.search(r"\bos\.(environ|getenv)", path.read_text())]
    assert [path.relative_to(ROOT) for path in readers] == [Path("tuning_db/env.py")]


def test_every_package_is_packaged() -> None:
    """A package that is missing from the list imports in an editable install and is absent from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(("tilewright", *path.parent.relative_to(ROOT).parts)) for path in SOURCES}
    assert set(listed) == found
    assert len(listed) == len(set(listed))


def test_the_wheel_has_the_shipped_records(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in FLOORS:
        shutil.copytree(ROOT / name, tree / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "tuning_db" / "shipped" / "board-1sm.sqlite").write_bytes(b"records")
    program = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {Path(name).name for name in archive.namelist() if name.startswith("tilewright/tuning_db/shipped/")}
        assert archive.read("tilewright/tuning_db/shipped/board-1sm.sqlite") == b"records"
    assert found == {path.name for path in (tree / "tuning_db" / "shipped").glob("*.sqlite")}


def test_the_source_distribution_has_all_that_its_tests_need(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    folders = (*FLOORS, "benchmarks", "docs", "examples", "tests")
    for name in folders:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    pages = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")
    for name in ("pyproject.toml", "MANIFEST.in", *pages):
        shutil.copy(ROOT / name, tree)
    wanted = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    cache = tree / "tests" / "__pycache__"
    cache.mkdir()
    (cache / "test_architecture.cpython-311.pyc").write_bytes(b"")
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sources,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sources) as archive:
        found = {PurePosixPath(*PurePosixPath(each.name).parts[1:]) for each in archive if each.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {str(path) for path in found if path.parts[0] != "tilewright.egg-info"} == wanted | made


def test_tests_mirror_the_source() -> None:
    """Every source file has its test file, in the same place under tests."""
    missing = []
    for path in SOURCES:
        relative = path.relative_to(ROOT)
        if path.name == "__init__.py":
            continue
        # An op's files are tested together, by what the op computes.
        op = relative.parts[2] if relative.parts[:2] == ("kernels", "ops") else None
        test = ROOT / "tests" / (f"kernels/ops/test_{op}.py" if op else relative.with_name(f"test_{path.name}"))
        if not test.exists():
            missing.append(str(relative))
    assert not missing


@pytest.mark.parametrize(
    "package", sorted((ROOT / "kernels" / "ops").glob("*/__init__.py")), ids=lambda path: path.parent.name
)
def test_an_op_says_in_which_order_to_read_it(package: Path) -> None:
    _, _, order = (ast.get_docstring(ast.parse(package.read_text())) or "").partition("Read in this order:")
    listed = re.findall(r"\w+", order)
    assert sorted(listed) == sorted(path.stem for path in package.parent.glob("*.py") if path != package)
