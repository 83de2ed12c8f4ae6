"""Suggestions of another package become configurations of ours; the package itself is stood in for."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import heuristics
from benchmarks.heuristics import BOARDS, COUNT, main, nearest, suggestions, wanted
from benchmarks.landscape import named_configs
from tests.tuner.simulation import PROBLEM
from tilewright.kernels.catalogue import CATALOGUE
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.ops.rmsnorm.problem import RmsNormProblem
from tilewright.tuning_db.errors import MissingDependencyError

H200 = resolve_device("h200")
LARGE = GemmProblem(M=4096, N=4096, K=4096, dtype="bf16", b_layout="col")


def kernel(m: int, n: int, k: int, warp: tuple[int, int, int], stages: int, split: int = 1, swizzle: int = 1) -> Any:
    tiles = {f"cta_tile_{axis}": size for axis, size in zip("mnk", (m, n, k), strict=True)}
    tiles |= {f"warp_tile_{axis}": size for axis, size in zip("mnk", warp, strict=True)}
    return SimpleNamespace(**tiles, stages=stages, split_k=split, swizzle_factor=swizzle)


class Interface:
    """Suggests what it is told to, and notes what it was asked."""

    def __init__(self, *kernels: Any) -> None:
        self.kernels = kernels
        self.asked: list[Any] = []

    def makeNvMatmulHeuristicsProblem(self, *of: Any) -> Any:  # noqa: N802
        return of

    def get(self, problem: Any, count: int, precision: str) -> list[dict[str, Any]]:
        self.asked.append((*problem, precision))
        return [{"kernel": each} for each in self.kernels[:count]]


@pytest.fixture
def interface(monkeypatch: pytest.MonkeyPatch) -> Interface:
    stand_in = Interface(
        kernel(256, 128, 64, (64, 64, 64), 4, swizzle=8),
        kernel(128, 128, 32, (64, 64, 32), 8),
        kernel(128, 128, 32, (64, 64, 32), 7),  # the same, for there are no more than 5 stages
        kernel(64, 32, 64, (32, 16, 64), 5, split=2),
    )
    library = SimpleNamespace(boolsToNvMatmulHeuristicsLayout=lambda a, b: f"{'NT'[a]}{'NT'[b]}")
    monkeypatch.setattr(heuristics, "_interface", lambda board: (stand_in, library))
    monkeypatch.setattr(heuristics, "installed", lambda: True)
    return stand_in


def test_a_suggestion_says_tile_warps_stages_split_and_swizzle() -> None:
    assert wanted(kernel(256, 128, 64, (64, 64, 32), 4, split=2, swizzle=8)) == GemmConfig(
        BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, SPLIT_K=2, num_warps=16, num_stages=4
    )


def test_the_nearest_configuration_differs_least_in_tile_then_stages_then_walk() -> None:
    config = GemmConfig(128, 128, 64, GROUP_M=8, num_warps=4, num_stages=8)
    other_tile = replace(config, BLOCK_M=64)
    fewer_stages = replace(config, num_stages=5)
    fewest_stages = replace(config, num_stages=3)
    other_walk = replace(fewer_stages, GROUP_M=1)
    assert nearest(config, [other_tile, fewest_stages, fewer_stages]) == fewer_stages
    assert nearest(config, [other_tile, fewest_stages]) == fewest_stages
    assert nearest(config, [other_walk, fewer_stages]) == fewer_stages
    assert nearest(config, [replace(config, BLOCK_N=16), replace(config, num_warps=8)]).num_warps == 8


def test_suggestions_are_of_our_space_and_none_comes_twice(interface: Interface) -> None:
    found = suggestions(LARGE, H200)
    assert found == [
        GemmConfig(256, 128, 64, GROUP_M=8, num_warps=8, num_stages=4),
        GemmConfig(128, 128, 32, GROUP_M=1, num_warps=4, num_stages=5),
        GemmConfig(64, 32, 64, GROUP_M=1, num_warps=4, num_stages=5),  # no split of that many tiles is worth trying
    ]
    assert set(found) <= set(GEMM.space.configs(LARGE, H200))
    assert interface.asked == [(4096, 4096, 4096, "NT", 1, "TST")]
    suggestions(replace(LARGE, dtype="fp16", a_layout="col", b_layout="row", batch=2), H200)
    assert interface.asked[1] == (4096, 4096, 4096, "TN", 2, "HSH")


@pytest.mark.parametrize(
    ("problem", "board"),
    [
        (RmsNormProblem(M=16, N=64), "h200"),
        (replace(LARGE, dtype="fp8e4m3"), "h200"),
        (replace(LARGE, b_dtype="int8"), "h200"),
        (replace(LARGE, groups=4), "h200"),
        (LARGE, "t4"),
    ],
)
def test_it_is_not_asked_about_what_it_does_not_know(interface: Interface, problem: Any, board: str) -> None:
    assert suggestions(problem, resolve_device(board)) is None
    assert not interface.asked


def test_its_boards_are_boards_of_ours() -> None:
    assert set(BOARDS) <= {device.board for device in CATALOGUE}


def test_without_the_package_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "installed", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[bench\]'"):
        suggestions(LARGE, H200)
    done = CliRunner().invoke(main, ["--problem", str(LARGE), "--device", "h200", "--out", str(tmp_path / "x.json")])
    assert done.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_the_file_is_what_landscapes_begin_with(interface: Interface, tmp_path: Path) -> None:
    out = tmp_path / "first.json"
    options = ["--problem", str(LARGE), "--workload", "bert-base attention", "--device", "h200", "--out", str(out)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    assert "bert-base attention: not asked" in done.output
    assert named_configs(out) == {LARGE: suggestions(LARGE, H200)}
    assert len(json.loads(out.read_text())) == 1


def test_a_board_that_it_has_no_name_for_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--problem", str(PROBLEM), "--device", "t4", "--out", str(tmp_path / "x.json")])
    assert done.exit_code == 2
    assert "has no name for t4" in done.output


@pytest.mark.skipif(find_spec("nvMatmulHeuristics") is None, reason="nvidia-matmul-heuristics is not installed")
def test_the_package_itself_suggests_configurations_of_ours() -> None:
    found = suggestions(LARGE, H200)
    assert found is not None
    assert 4 <= len(found) <= COUNT
    assert set(found) <= set(GEMM.space.configs(LARGE, H200))
