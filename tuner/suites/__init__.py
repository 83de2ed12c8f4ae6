"""Named workloads of real models: what the tuner tunes by default, and what tests and benchmarks run.

Dimensions are those of the models' own papers and configuration files, named beside each. Arrays are fp16, which every
board takes, but for weights that say otherwise.
"""

from __future__ import annotations

from tilewright.tuner.suites.bert import BERT_BASE, BERT_LARGE
from tilewright.tuner.suites.calls import read_calls
from tilewright.tuner.suites.convnext import CONVNEXT_T
from tilewright.tuner.suites.llama import LLAMA3_8B, LLAMA3_70B
from tilewright.tuner.suites.mobilenet import MOBILENET_V2
from tilewright.tuner.suites.resnet import RESNET50
from tilewright.tuner.suites.sdxl import SDXL
from tilewright.tuner.suites.vit import VIT_B
from tilewright.tuner.suites.whisper import WHISPER
from tilewright.tuner.suites.workload import Workload, distinct
from tilewright.tuner.suites.yolo import YOLOV8S
from tilewright.tuning_db.errors import UnknownSuiteError
from tilewright.tuning_db.text import did_you_mean

__all__ = ["SUITES", "Workload", "find_suite", "read_calls"]

MODELS: dict[str, tuple[Workload, ...]] = {
    "resnet50": RESNET50,
    "mobilenet-v2": MOBILENET_V2,
    "convnext-t": CONVNEXT_T,
    "yolov8s": YOLOV8S,
    "sdxl": SDXL,
    "bert-base": BERT_BASE,
    "bert-large": BERT_LARGE,
    "vit-b": VIT_B,
    "llama3-8b": LLAMA3_8B,
    "llama3-70b": LLAMA3_70B,
    "whisper": WHISPER,
}

# Tens of minutes on 2 cores, at 12 trials each.
ALL = distinct(workload for suite in MODELS.values() for workload in suite)

# Few enough for 5 minutes on 2 cores, of every op what its forms differ by most, and nothing that sm_75 can't run.
DEFAULT = (
    "llama3-8b qkv, decode",
    "llama3-8b attention output, decode",
    "llama3-8b gate-up, decode",
    "llama3-8b down, decode",
    "llama3-8b qkv, decode batch 16",
    "llama3-8b gate-up, decode batch 16",
    "llama3-8b qkv, prefill 2048",
    "llama3-8b attention output, prefill 2048",
    "llama3-8b gate-up, prefill 2048",
    "llama3-8b down, prefill 2048",
    "llama3-8b norm, prefill 2048",
    "llama3-8b attention, prefill 2048",
    "llama3-8b attention, decode, 4096 keys",
    "llama3-8b attention, decode, 4096 keys, paged batch 16",
    "bert-base qkv",
    "bert-base attention",
    "bert-base up",
    "bert-large attention output",
    "bert-large down",
    "vit-b/16 mlp up",
    "vit-b/16 mlp down",
    "resnet50 conv1 7x7/2 3-64 224x224, batch 32",
    "resnet50 layer1.0.conv2 3x3 64-64 56x56, batch 32",
    "resnet50 layer1.0.conv3 1x1 64-256 56x56, batch 32",
    "resnet50 layer3.0.conv2 3x3/2 256-256 28x28, batch 32",
    "resnet50 layer4.1.conv2 3x3 512-512 7x7, batch 1",
    "mobilenet-v2 features.3 depthwise 3x3 144-144 56x56, batch 32",
    "convnext-t stage 1 depthwise 7x7 192-192 28x28, batch 32",
)


def _named(names: tuple[str, ...]) -> tuple[Workload, ...]:
    by_name = {workload.name: workload for workload in ALL}
    return tuple(by_name[name] for name in names)


SUITES: dict[str, tuple[Workload, ...]] = {"default": _named(DEFAULT), **MODELS, "all": ALL}


def find_suite(name: str) -> tuple[Workload, ...]:
    """The workloads of a suite.

    Raises:
        UnknownSuiteError: there is none of that name; the message names the nearest.
    """
    if name in SUITES:
        return SUITES[name]
    raise UnknownSuiteError(f"unknown suite {name!r}{did_you_mean(name, SUITES)} (suites: {', '.join(SUITES)})")
