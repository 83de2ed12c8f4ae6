"""What TensorRT's plugins give it, on a GPU: launched through the driver in TensorRT's argument order, and from Python.

TensorRT itself is not needed. With TILEWRIGHT_PLANS, the plans in that file are launched too, which were recorded
where TensorRT's bindings are: see `plan_files`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.gpu.conforming import fault, skip_unless
from tests.gpu.plan_files import NAMES, job_of
from tests.gpu.plan_launch import Arrays, LoadedPlan
from tests.kernels.tensorrt.cases import case
from tests.kernels.tensorrt.lives import Job, as_formats
from tilewright.kernels.device import Device
from tilewright.kernels.live import live_cuda
from tilewright.kernels.problem import Problem
from tilewright.kernels.registry import find_kernel
from tilewright.kernels.tensorrt.catalogue import find_plugin, plugin_attributes
from tilewright.kernels.tensorrt.jit import enqueue
from tilewright.kernels.tensorrt.plans import LaunchPlan
from tilewright.kernels.tensorrt.ptx import CUDA
from tilewright.kernels.tensorrt.tactics import tactics
from tilewright.kernels.tensorrt.types import TENSORRT_NAMES

pytestmark = pytest.mark.gpu

PLANS = os.environ.get("TILEWRIGHT_PLANS", "")
SOAK = 2000


def places(job: Job) -> list[tuple[str, int]]:
    """The dynamic dimensions, in the order of a job's sizes."""
    names = find_plugin(job.plugin).inputs
    dims = zip(names, (dims for dims, _ in job.inputs), strict=True)
    return [(name, axis) for name, each in dims for axis, dim in enumerate(each) if isinstance(dim, list)]


def check_plan(cupy: Any, plan: LaunchPlan, job: Job, formats: tuple[str, ...]) -> None:
    """The plan's results are the reference's for every size."""
    loaded = LoadedPlan(cupy, plan)
    for sizes in job.sizes:
        problem = as_formats(job.problem(*sizes), formats)
        arrays = Arrays(cupy, problem)
        loaded.launch(arrays.addresses, dict(zip(places(job), sizes, strict=True)))
        check_results(arrays.results(), problem, arrays.host)


def check_results(results: Mapping[str, Any], problem: Problem, host: Mapping[str, Any]) -> None:
    kernel = find_kernel(problem.op)
    assert not fault(kernel, problem, kernel.reference(problem, host), results), problem


def driver() -> str:
    return min(live_cuda(), CUDA, key=lambda version: tuple(map(int, version.split("."))))


@pytest.mark.parametrize("name", NAMES)
def test_every_tactic_is_right(cupy: Any, board: Device, tmp_path: Path, name: str) -> None:
    job = job_of(name)
    problem = job.problem(*job.sizes[0])
    skip_unless(find_kernel(problem.op), problem, board)
    outputs = len(problem.outputs())
    for formats in (("LINEAR",) * (len(job.inputs) + outputs), *job.formats):
        made = case(job.plugin, job.inputs, formats=formats, **job.attributes)
        found = tactics(made, board, tmp_path, cuda=driver(), most=2)
        assert found
        for tactic in found:
            check_plan(cupy, tactic.plan, job, formats)


@pytest.mark.skipif(not PLANS, reason="TILEWRIGHT_PLANS names no file of plans")
@pytest.mark.parametrize("name", NAMES)
def test_what_tensorrt_was_given_is_right(cupy: Any, board: Device, name: str) -> None:
    lines = [json.loads(line) for line in Path(PLANS).read_text().splitlines()]
    found = [line for line in lines if line["job"] == name]
    if not found:
        pytest.skip(f"{PLANS} has no plans of {name}")
    for line in found:
        plan = LaunchPlan.from_json(line["plan"])
        (target,) = {part.split()[1].rstrip("a,") for part in plan.ptx.splitlines() if part.startswith(".target")}
        if target != board.sm:
            pytest.skip(f"{PLANS} is for {target}, and this is {board.sm}")
        check_plan(cupy, plan, job_of(name), tuple(line["formats"]))


# --- plugins that launch from Python

DataType = Enum(
    "DataType", {{"FP32": "FLOAT", "FP16": "HALF"}.get(text, text): name for name, text in TENSORRT_NAMES.items()}
)
Format = Enum("Format", "LINEAR HWC HWC8 HWC16")


def described(shape: tuple[int, ...], dtype: str, which: str, address: int) -> Any:
    """A tensor as `tensorrt.plugin` hands it over."""
    return SimpleNamespace(shape=shape, dtype=DataType(dtype), format=Format[which], data_ptr=address)


def tensors(job: Job, sizes: tuple[int, ...], formats: tuple[str, ...], addresses: Mapping[str, int]) -> Any:
    """Inputs and outputs of a job for these sizes, over arrays in device memory."""
    made = case(job.plugin, job.inputs, formats=formats, **job.attributes)
    at = dict(zip(places(job), sizes, strict=True))
    return tuple(
        [described(each.at(at).shape, each.dtype, each.format, addresses[each.name]) for each in group]
        for group in (made.inputs, made.outputs)
    )


@pytest.mark.parametrize("name", NAMES)
def test_python_plugins_are_right(cupy: Any, board: Device, name: str) -> None:
    job = job_of(name)
    problem = job.problem(*job.sizes[0])
    skip_unless(find_kernel(problem.op), problem, board)
    attributes = plugin_attributes(job.plugin, **job.attributes)
    outputs = len(problem.outputs())
    stream = cupy.cuda.Stream(non_blocking=True)
    for formats in (("LINEAR",) * (len(job.inputs) + outputs), *job.formats):
        for sizes in job.sizes:
            problem = as_formats(job.problem(*sizes), formats)
            arrays = Arrays(cupy, problem)
            cupy.cuda.runtime.deviceSynchronize()
            inputs, results = tensors(job, sizes, formats, arrays.addresses)
            enqueue(find_plugin(job.plugin), inputs, results, attributes, stream.ptr)
            check_results(arrays.results(), problem, arrays.host)


def used(cupy: Any) -> int:
    free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)


@pytest.mark.alone
def test_a_soak_of_shape_changes_takes_no_memory(cupy: Any, board: Device, tmp_path: Path) -> None:
    """Launches of ever other sizes, of one loaded plan and from Python: device memory stays as it is."""
    job = job_of("gemm fp16")
    formats = ("LINEAR",) * 4
    attributes = plugin_attributes(job.plugin, **job.attributes)
    made = case(job.plugin, job.inputs, **job.attributes)
    loaded = LoadedPlan(cupy, tactics(made, board, tmp_path, cuda=driver(), most=1)[0].plan)
    arrays = Arrays(cupy, job.problem(1000))  # the largest: the others lie within
    (place,) = places(job)
    random = np.random.default_rng(0)
    rows = [int(row) for row in random.choice(random.integers(1, 1001, 16), SOAK)]

    def both(m: int) -> None:
        loaded.launch(arrays.addresses, {place: m})
        inputs, results = tensors(job, (m,), formats, arrays.addresses)
        enqueue(find_plugin(job.plugin), inputs, results, attributes, 0)

    for m in sorted(set(rows)):  # the first call of each shape compiles and loads
        both(m)
    cupy.cuda.runtime.deviceSynchronize()
    before = used(cupy)
    pool = cupy.get_default_memory_pool().total_bytes()
    for m in rows:
        both(m)
    cupy.cuda.runtime.deviceSynchronize()
    assert used(cupy) == before
    assert cupy.get_default_memory_pool().total_bytes() == pool
    problem = job.problem(1000)
    both(1000)
    check_results(arrays.results(), problem, arrays.host)
