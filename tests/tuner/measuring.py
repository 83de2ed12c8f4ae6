"""Requests to measure, as a process with a GPU gets them."""

from __future__ import annotations

from typing import Any

from tilewright.tuner.timing import BUDGET_S


def measure_request(op: str, problem: Any, config: Any, **more: Any) -> dict[str, Any]:
    """To measure a configuration on GPU 0 as a tuning run does, but for `more`, and without turns."""
    return {
        "do": "measure",
        "op": op,
        "problem": problem.to_dict(),
        "config": config.to_dict(),
        "ordinal": 0,
        "seed": 0,
        "check": True,
        "skip_ragged": "",
        "give_up_above_us": None,
        "budget_s": BUDGET_S,
        "locks": None,
        **more,
    }


def compare_request(op: str, problem: Any, finalists: list[Any], **more: Any) -> dict[str, Any]:
    """To time configurations in turns."""
    return {
        "do": "measure",
        "op": op,
        "problem": problem.to_dict(),
        "finalists": [config.to_dict() for config in finalists],
        "ordinal": 0,
        "seed": 0,
        "check": True,
        "locks": None,
        **more,
    }
