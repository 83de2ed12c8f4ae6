"""Plugins' lives, led in a process of their own (`plugin_life`), and what must be true of each."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kernels.tensorrt import stubs
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.kernel import Launch
from tilewright.kernels.problem import Problem
from tilewright.kernels.registry import find_kernel
from tilewright.kernels.tensorrt.catalogue import find_plugin
from tilewright.tuning_db.env import compiling_environment

Dim = int | list[int]
SCALARS = {"u32": "i32"}


@dataclass(frozen=True)
class Job:
    """One plugin with its tensors, and the problem that it is for given sizes of its dynamic dimensions."""

    plugin: str
    inputs: Sequence[tuple[Sequence[Dim], str]]
    problem: Callable[..., Problem]
    sizes: Sequence[tuple[int, ...]] = ((),)
    attributes: dict[str, Any] = field(default_factory=dict)
    formats: Sequence[tuple[str, ...]] = ()  # beyond the linear one
    constants: tuple[tuple[str, float], ...] = ()
    through: str = "c++"

    def to_dict(self) -> dict[str, Any]:
        return {
            "plugin": self.plugin,
            "through": self.through,
            "attributes": self.attributes,
            "inputs": [{"dims": list(dims), "dtype": dtype} for dims, dtype in self.inputs],
            "sizes": [list(sizes) for sizes in self.sizes],
        }


def lead(
    device: str, jobs: Sequence[Job | dict[str, Any]], *, tactics: int = 8, script: str = "", **environment: str
) -> list[dict[str, Any]]:
    """Leads the lives; gives what `plugin_life` says of each. A `script` runs in that process before."""
    asked = {
        "device": device,
        "tactics": tactics,
        "script": script,
        "jobs": [job.to_dict() if isinstance(job, Job) else job for job in jobs],
    }
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.json"
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("plugin_life.py")), str(answers)],
            input=json.dumps(asked),
            env=compiling_environment() | stubs.build(Path(folder)) | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(answers.read_text())
    return found


def check(job: Job, answer: dict[str, Any], board: str) -> None:
    """The contract: what TensorRT was given is what this package's own launcher would do."""
    assert "error" not in answer, (job.plugin, answer)
    device = resolve_device(board)
    kernel = find_plugin(job.plugin).operation.kernel
    problems = [job.problem(*sizes) for sizes in job.sizes]
    outputs = list(problems[0].outputs())
    assert answer["output_types"] == [problems[0].outputs()[name].dtype for name in outputs]
    for name, shapes in zip(outputs, answer["output_shapes"], strict=True):
        # Leading dimensions that the problem has made one are still several to TensorRT.
        assert [_volume(shape) for shape in shapes] == [_volume(problem.outputs()[name].shape) for problem in problems]
    linear = ("LINEAR",) * (len(job.inputs) + len(outputs))
    found = [tuple(which for _, which in each["combination"]) for each in answer["formats"]]
    assert found == [linear, *job.formats]
    dtypes = [dtype for _, dtype in job.inputs] + answer["output_types"]
    assert all([dtype for dtype, _ in each["combination"]] == dtypes for each in answer["formats"])
    names = [tactic["name"] for each in answer["formats"] for tactic in each["tactics"]]
    assert len(set(names)) == len(names)
    for each, formats in zip(answer["formats"], found, strict=True):
        known = {one["number"]: one for one in answer["known"] if tuple(one["formats"]) == formats}
        numbers = [tactic["number"] for tactic in each["tactics"]]
        assert numbers == sorted(known)
        assert all(0 < number < 2**31 for number in numbers)
        configs = {number: kernel.space.config.from_dict(one["config"]) for number, one in known.items()}
        assert len(set(configs.values())) == len(configs)
        for tactic in each["tactics"]:
            config = configs[tactic["number"]]
            for index, problem in enumerate(problems):
                seen = as_formats(problem, formats)
                (launch,) = kernel.launches(seen, config)
                _check_tactic(tactic, index, launch.with_constants(job.constants).on(device.sms), config)
            assert tactic["ptxas"] == ""
            (version,) = tactic["version"]
            assert tuple(map(int, version.split("."))) <= (8, 7)
            assert tactic["local_paths"] == 0


def _check_tactic(tactic: dict[str, Any], index: int, launch: Launch, config: Any) -> None:
    at = tactic["launch"][index]
    assert (at["grid_x"], at["grid_y"], at["grid_z"]) == launch.grid, (config, launch.arguments)
    assert (at["block_x"], at["block_y"], at["block_z"]) == (32 * launch.num_warps, 1, 1)
    present = [argument for argument in launch.arguments if argument.type is not None]
    scalars = [argument.value for argument in present if not argument.is_pointer]
    assert tactic["scalars"][index] == scalars
    assert tactic["scalar_types"] == ["INT32"] * len(scalars)
    assert tactic["parameters"] == ["u64" if argument.is_pointer else "u32" for argument in present]


def as_formats(problem: Problem, formats: tuple[str, ...]) -> Problem:
    """The problem with its arrays in those formats."""
    if set(formats) == {"LINEAR"}:
        return problem
    return type(problem).from_dict({**problem.to_dict(), "layout": "nhwc", "w_layout": "kcrs"})


def _volume(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def defaults(job: Job, board: str) -> list[Any]:
    """The default configuration of the problem for each of the sizes."""
    device = resolve_device(board)
    kernel = find_kernel(job.problem(*job.sizes[0]).op)
    return [kernel.default(job.problem(*sizes), device) for sizes in job.sizes]
