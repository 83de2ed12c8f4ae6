"""A board that nothing runs on: it goes the way of `TorchBoard` with made-up times, so that all but the GPU is tried.

Our kernels are compiled by nobody and the libraries called by nobody; times are the roofline's, each contender's so
much above it as its name's hash says. Whatever is written from here says that it is simulated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from benchmarks.cases import Case
from benchmarks.contenders import DEFAULT, OURS, Contender
from benchmarks.measuring import environment
from benchmarks.torch_board import Timed
from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.prediction import roofline_us
from tilewright.kernels.registry import find_kernel

LIBRARY = (("library", "library"), ("library + elementwise", "separate"), ("library, fused", "fused"))


class RehearsalBoard:
    """The board of that name (`cuda:0`: an H200's), as far as the catalogue knows it."""

    def __init__(self, device_name: str) -> None:
        self._device = resolve_device("h200" if device_name.startswith("cuda:") else device_name)

    @property
    def device(self) -> Device:
        """The board."""
        return self._device

    @property
    def simulated(self) -> bool:
        """True: no time that comes from here was measured."""
        return True

    def environment(self) -> dict[str, Any]:
        """Where the rehearsal runs."""
        return environment()

    def peaks(self) -> dict[str, float]:
        """The catalogue's."""
        return {"copy_gbs": self._device.bandwidth_gbs, "matmul_tflops": self._device.tensor_tflops["fp16"]}

    def prepare(self, chosen: Sequence[Case], seconds: float) -> int:
        """Nothing is compiled."""
        return 0

    def chosen(self, case: Case) -> dict[str, Any]:
        """The default."""
        config = find_kernel(case.op).default(case.problem, self._device)
        return {"config": config.to_dict(), "provenance": "default", "reason": "rehearsal"}

    def contenders(self, case: Case) -> list[Contender]:
        """Ours, and one of every role."""

        def call(arrays: Any) -> Any:
            raise AssertionError("a rehearsal calls nothing")

        named = ((OURS, "ours"), (DEFAULT, "ours"), *LIBRARY)
        return [Contender(name, role, call) for name, role in named]

    def compare(self, case: Case, contenders: Sequence[Contender]) -> tuple[dict[str, Timed], str]:
        """Made-up times; one of the library's ways fails, as they do."""
        problem = case.problem
        floor_us = roofline_us(problem.flops(), problem.bytes_moved(), problem.unit, self._device)
        found = {}
        for contender in contenders:
            digest = hashlib.sha256(f"{case.name} {contender.name}".encode()).digest()
            if contender.role == "fused" and digest[0] < 128:
                found[contender.name] = Timed(error="RuntimeError: a rehearsed refusal")
                continue
            median_us = floor_us * (1.2 + digest[1] / 256)
            found[contender.name] = Timed(median_us, 0.98 * median_us, 1.03 * median_us, 10, difference=1e-3)
        return found, "replay"

    def dispatch(self) -> list[tuple[str, float]]:
        """Made-up rows."""
        return [("gemm(a, b, out=out), torch's arrays", 5.0), ("the driver's launch alone, of the same kernel", 2.0)]

    def load(self, case: Case, contenders: Sequence[Contender]) -> dict[str, dict[str, float]]:
        """Made-up rates."""
        return {each.name: {"calls_per_s": 1000.0, "joules_per_call": 0.5, "watt": 500.0} for each in contenders}

    def clocks(self) -> dict[str, Any]:
        """None are read."""
        return {}
