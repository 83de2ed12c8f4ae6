"""Launch plans as TensorRT was given them, in a file for a GPU machine that need not have TensorRT.

    python -m tests.gpu.plan_files plans.jsonl --device sm_90

leads the plugins' lives on TensorRT's bindings (`tests/kernels/tensorrt`) and writes one line for every op, data type,
format and tactic. On the GPU machine, `pytest -m gpu -n 0 tests/gpu/test_tensorrt.py` with TILEWRIGHT_PLANS=plans.jsonl
launches them all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tests.kernels.tensorrt import jobs, stubs
from tests.kernels.tensorrt.lives import Job, check, lead

NAMES = [f"{op} {dtype}" for op, (_, dtypes) in jobs.DTYPES.items() for dtype in dtypes]
NAMES += ["weights int8", "weights int4"]


def job_of(name: str) -> Job:
    """The job of a name in `NAMES`."""
    op, dtype = name.split()
    return jobs.weights(dtype == "int4") if op == "weights" else jobs.DTYPES[op][0](dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description="writes launch plans for a GPU machine")
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="sm_90", help="what they are compiled for (default: sm_90)")
    parser.add_argument("--tactics", type=int, default=4, help="of each op, data type and format (default: 4)")
    asked = parser.parse_args()
    reason = stubs.missing()
    if reason is not None:
        parser.error(reason)
    arch = int(asked.device.removeprefix("sm_"))
    names = [name for name in NAMES if "fp8" not in name or arch >= 89]
    chosen = [job_of(name) for name in names]
    answers = lead(asked.device, [job.to_dict() | {"plans": True} for job in chosen], tactics=asked.tactics)
    lines: list[dict[str, Any]] = []
    for name, job, answer in zip(names, chosen, answers, strict=True):
        check(job, answer, asked.device)
        lines += [
            {"job": name, "formats": [which for _, which in each["combination"]], "plan": tactic["plan"]}
            for each in answer["formats"]
            for tactic in each["tactics"]
        ]
    asked.file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines)} plans of {len(chosen)} cases in {asked.file}")


if __name__ == "__main__":
    main()
