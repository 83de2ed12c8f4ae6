"""The documentation is true: its commands, options, names and snippets exist and run."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import numpy as np
import pytest

from tilewright.kernels import KERNELS, pack
from tilewright.kernels.activations import ACTIVATIONS, ALIASES
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.prediction import Term
from tilewright.kernels.tensorrt import build_engine, plugins, register
from tilewright.kernels.tensorrt.catalogue import OPERATIONS
from tilewright.tuner.cli import cli
from tilewright.tuner.model.report.document import VERSION, ModelReport
from tilewright.tuner.suites import SUITES
from tilewright.tuner.tune import resolve_workloads
from tilewright.tuning_db import env, interchange
from tilewright.tuning_db.env import compiling_environment
from tilewright.tuning_db.record import Provenance, Status

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_has_its_two_commands() -> None:
    blocks = [text.strip() for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)]
    assert 'pip install -e ".[cuda13]" && autotune --device sm_86' in blocks
    assert 'pip install -e ".[test]" && pytest' in blocks


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if "x, w, bias=b" not in s], ids=lambda s: s.split("\n")[0])
def test_snippets_run(snippet: str, tmp_path: Path) -> None:
    environment = {**compiling_environment(), "TILEWRIGHT_DB_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    for expected in re.findall(r"print\(.*\)  # (.*)", snippet):
        assert run.stdout.strip() == expected


def test_the_sampler_serves_any_study(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCS["search.md"], re.DOTALL)
    shown = "\nprint(len(study.trials), study.best_params)"
    run = subprocess.run(
        [sys.executable, "-c", snippet + shown],
        env=compiling_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.strip() == "10 {'m': 64, 'warps': 4}", run.stderr


def test_figures_of_the_search_are_those_of_the_results() -> None:
    document = json.loads((ROOT / "benchmarks" / "results" / "search_quality.json").read_text())
    rows = re.findall(r"^\| ([a-z][\w+, -]*?) \| (0\..*) \| ([\d.]+) \|$", DOCS["search.md"], re.MULTILINE)
    assert {name for name, _, _ in rows} == set(document["results"])
    for name, cells, ms in rows:
        result = document["results"][name]
        shown = [f"{result['mean'][point]:.3f} / {result['p10'][point]:.3f}" for point in ("10", "30", "50", "100")]
        assert cells.split(" | ") == shown
        assert ms == f"{result['ms_per_trial']:.1f}"
    beside = json.loads((ROOT / "benchmarks" / "results" / "search_quality_gp.json").read_text())
    for name in ("optuna-gp", "tilewright"):
        means = " / ".join(f"{beside['results'][name]['mean'][point]:.3f}" for point in ("30", "50", "100"))
        assert means in DOCS["search.md"]
    assert f"Over {beside['seeds']} seeds" in DOCS["search.md"]
    own = json.loads((ROOT / "benchmarks" / "results" / "search_quality_landscapes.json").read_text())
    for name, result in own["results"].items():
        shown = [f"{result['mean'][point]:.3f} / {result['p10'][point]:.3f}" for point in ("10", "20", "30", "50")]
        assert f"| {name} | {' | '.join(shown)} | {result['evals98']:g} trials |" in DOCS["search.md"]
    noise = json.loads((ROOT / "benchmarks" / "results" / "search_quality_noise.json").read_text())
    assert noise["noise"]
    assert f"after 50 trials is {noise['results']['tilewright']['mean']['50']:.3f}" in DOCS["search.md"]


def test_the_first_snippet_runs_on_numpy_arrays() -> None:
    rng = np.random.default_rng(0)
    shapes = {"x": (4, 32), "w": (32, 16), "b": (16,), "r": (4, 16), "weight": (32,)}
    shapes |= {"image": (1, 4, 5, 8), "filters": (16, 3, 3, 8), "c": (16,)}
    shapes |= {"q": (1, 4, 6, 16), "k": (1, 2, 9, 16), "v": (1, 2, 9, 16)}
    scope = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    wide = {name: array.astype(np.float64) for name, array in scope.items()}
    exec(SNIPPETS[0], scope)

    h = wide["x"] @ wide["w"] + wide["b"] + wide["r"]
    wanted = {"y": h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))}
    padded = np.pad(wide["image"], ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    wanted["z"] = np.maximum(np.einsum("npqcrs,krsc->npqk", windows, wide["filters"]) + wide["c"], 0)
    scores = np.einsum("bhid,bhjd->bhij", wide["q"], wide["k"].repeat(2, axis=1)) / 4
    scores[:, :, np.arange(6)[:, None] + 3 < np.arange(9)] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    wanted["o"] = shares / shares.sum(-1, keepdims=True) @ wide["v"].repeat(2, axis=1)
    wanted["n"] = wide["x"] / np.sqrt((wide["x"] ** 2).mean(-1, keepdims=True) + 1e-6) * wide["weight"]
    for name, expected in wanted.items():
        np.testing.assert_allclose(scope[name], expected, rtol=1e-4, atol=1e-5)


def test_what_torch_has_is_what_the_table_says() -> None:
    rng = np.random.default_rng(0)
    shapes = {"x": (4, 32), "weight": (16, 32), "bias": (16,), "gate_up": (48, 32)}
    scope = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    rows = dict(re.findall(r"^\| `(F\..*?)` \| `(.*?)`", README, re.MULTILINE))
    assert [call.partition("(")[0] for call in rows.values()] == [
        "gemm",
        "gemm",
        "conv2d",
        "conv2d",
        "attention",
        "rmsnorm",
    ]
    linear, gated, convolution, skipped, attention, norm = rows.values()
    exec("from tilewright.kernels import attention, conv2d, gemm, rmsnorm", scope)

    h = scope["x"] @ scope["weight"].T + scope["bias"]
    np.testing.assert_allclose(
        eval(linear, scope), h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2))), rtol=1e-4, atol=1e-5
    )
    g, u = scope["x"] @ scope["gate_up"][:24].T, scope["x"] @ scope["gate_up"][24:].T
    np.testing.assert_allclose(eval(gated, scope), g / (1 + np.exp(-g)) * u, rtol=1e-4, atol=1e-5)
    image = {"x": rng.standard_normal((1, 8, 4, 5), np.float32), "w": rng.standard_normal((16, 8, 3, 3), np.float32)}
    scope |= image | {"r": rng.standard_normal((1, 16, 4, 5), np.float32)}
    padded = np.pad(image["x"], ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    sums = np.einsum("ncpqrs,kcrs->nkpq", windows, image["w"]) + scope["bias"][:, None, None] + scope["r"]
    np.testing.assert_allclose(eval(convolution, scope), np.maximum(sums, 0), rtol=1e-4, atol=1e-4)
    bare = sums - scope["r"]
    wanted = bare / (1 + np.exp(-bare)) + scope["r"]
    np.testing.assert_allclose(eval(skipped, scope), wanted, rtol=1e-4, atol=1e-4)
    assert f"o = {attention}" in SNIPPETS[0]  # whose values another test looks at
    scope |= {"x": rng.standard_normal((4, 32), np.float32), "weight": rng.standard_normal(32, np.float32)}
    wanted = scope["x"] / np.sqrt((scope["x"] ** 2).mean(-1, keepdims=True) + 1e-5) * scope["weight"]
    np.testing.assert_allclose(eval(norm, scope), wanted, rtol=1e-4, atol=1e-5)


def commands(group: click.Group, path: str = "autotune") -> dict[str, click.Command]:
    """Every command there is by what people type, subcommands of subcommands too."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{path} {name}")
        else:
            found[f"{path} {name}"] = command
    return found


def test_a_benchmark_that_measures_is_told_when_to_end() -> None:
    """Left alone, a landscape goes on to the last of thousands of configurations."""
    said = "\n".join([README, *DOCS.values(), *(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))])
    found = re.findall(r"^ {4}(python -m benchmarks\.(?:landscape|gpu) .*)", said, re.MULTILINE)
    assert len(found) > 5
    assert [command for command in found if "--minutes" not in command] == []


def test_every_option_is_documented() -> None:
    text = DOCS["command-line.md"]
    assert isinstance(cli, click.Group)
    named = commands(cli)
    options = {
        option
        for command in (cli, *named.values())
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    documented = set(re.findall(r"^\| `(--[a-z-]+)", text, re.MULTILINE))
    assert documented | {"--version"} == options
    for name in named:
        assert f"\n{name} " in text


def test_the_problems_shown_are_problems() -> None:
    shown = re.findall(
        r'^autotune --device (\w+)(?: --kernel (\w+))? --problem "(.*)"$', DOCS["command-line.md"], re.MULTILINE
    )
    assert {op or "gemm" for _, op, _ in shown} == {kernel.name for kernel in KERNELS}
    for device, op, text in shown:
        (workload,) = resolve_workloads(resolve_device(device), [op] if op else None, [text])
        assert workload.op == (op or "gemm")


def test_every_environment_variable_is_documented() -> None:
    names = set(re.findall(r'"([A-Z][A-Za-z0-9]*_[A-Za-z0-9_]+)"', inspect.getsource(env)))
    assert names > {env.DB_DIR, env.SHIPPED, env.PACK, env.FROZEN, env.INTERPRET, "TRITON_PTXAS_PATH"}
    for name in names:
        assert f"`{name}`" in DOCS["command-line.md"], name


def test_every_key_of_a_models_report_is_documented() -> None:
    rows = dict(re.findall(r"^\| `(\w+)`(?:, `tilewright`)? \| (.*) \|$", DOCS["command-line.md"], re.MULTILINE))

    def keys(kind: Any) -> Iterator[str]:
        """Of a document's part, all the way down."""
        for hint in get_type_hints(kind).values() if dataclasses.is_dataclass(kind) else get_args(kind):
            yield from keys(hint)
        if dataclasses.is_dataclass(kind):
            yield from (field.name for field in dataclasses.fields(kind))

    assert f"| `version`, `tilewright` | of the document, {VERSION}; of the program |" in DOCS["command-line.md"]
    for name, kind in get_type_hints(ModelReport).items():
        for key in (name, *keys(kind)):
            assert key == "tilewright" or f"`{key}`" in f"`{name}` {rows[name]}", f"{name}: {key}"


def test_every_field_of_the_formats_is_documented() -> None:
    for fields in (
        interchange._HEADER,
        interchange._RUN,
        interchange._RECORD,
        interchange._TIMES,
        interchange._RESOURCES,
    ):
        for field in fields:
            assert f"`{field}`" in DOCS["interchange.md"], field
    for fields in (pack._FIELDS, pack._ENTRY, pack._KERNEL):
        for field in fields:
            assert f"`{field}`" in DOCS["packs.md"], field
    assert f"version {interchange.VERSION}\n" in DOCS["interchange.md"]
    assert f"version {pack.VERSION}\n" in DOCS["packs.md"]


def test_every_name_a_user_can_type_is_documented() -> None:
    for suite in SUITES:
        assert f"`{suite}`" in DOCS["command-line.md"]
    for activation in (*ACTIVATIONS, *ALIASES):
        assert f"`{activation}" in DOCS["epilogue.md"] or not activation, activation
    for kernel in KERNELS:
        text = DOCS[f"{kernel.name}.md"]
        for field in (*[f.name for f in dataclasses.fields(kernel.problem)], *kernel.space.axes):
            assert f"`{field}`" in text, f"{kernel.name}: {field}"
    for status in Status:
        assert f"`{status}`" in DOCS["tuning-database.md"]
    for provenance in Provenance:
        assert f"`{provenance}`" in README


def test_every_plugin_is_documented() -> None:
    text = DOCS["tensorrt.md"]
    assert f"lists all {len(plugins())}" in text
    for operation in OPERATIONS:
        (row,) = re.findall(rf"^\| `{operation.title}` \| `\w+` \(.*$", text, re.MULTILINE)
        for name in (*operation.required, *(name for group in operation.optional for name in group)):
            assert f"`{name}`" in row, f"{operation.title}: {name}"
        for attribute in operation.attributes:
            assert f"`{attribute.name}`" in text, f"{operation.title}: {attribute.name}"
    for function in (register, build_engine):
        for name in inspect.signature(function).parameters:
            assert name in text, f"{function.__name__}: {name}"


def test_every_term_of_the_model_is_documented() -> None:
    for term in Term:
        assert term.name in DOCS["prediction.md"] or term.value in DOCS["prediction.md"]


def test_every_link_leads_somewhere() -> None:
    pages = {ROOT / "README.md": README, **{ROOT / "docs" / name: text for name, text in DOCS.items()}}
    for path, text in pages.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_file_the_architecture_names_exists() -> None:
    for name in re.findall(r"`((?:kernels|tuner|tuning_db|tests)/[\w/]+\.py)`", DOCS["architecture.md"]):
        assert (ROOT / name).exists(), name


def test_the_errors_and_public_names_have_docstrings() -> None:
    from tilewright import kernels, tuner, tuning_db
    from tilewright.kernels import tensorrt

    for package in (kernels, tensorrt, tuner, tuning_db):
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert (value.__doc__ or "").strip(), f"{package.__name__}.{name}"


def raised(value: Any) -> set[str]:
    """The errors under `Raises:` of a function, or of a class and its public methods."""
    parts = [value]
    if inspect.isclass(value):
        parts += [getattr(value, name) for name in vars(value) if not name.startswith("_")]
    texts = [inspect.getdoc(part) or "" for part in parts]
    blocks = [block for text in texts for block in re.findall(r"^Raises:\n((?: {4}.*\n?)+)", text, re.MULTILINE)]
    lines = [line for block in blocks for line in re.findall(r"^ {4}((?:\w+, )*\w+):", block, re.MULTILINE)]
    return {name for line in lines for name in line.split(", ")}


def test_errors_are_importable_beside_what_raises_them() -> None:
    from tilewright import kernels, tuner, tuning_db
    from tilewright.kernels import tensorrt
    from tilewright.tuning_db import errors

    for package, beside in ((kernels, kernels), (tensorrt, kernels), (tuner, tuner), (tuning_db, tuning_db)):
        values = [getattr(package, name) for name in package.__all__]
        ours = {name for value in values if callable(value) for name in raised(value) if hasattr(errors, name)}
        assert {"UsageError"} < ours, package.__name__
        assert ours <= set(beside.__all__), package.__name__


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_database_page_says_what_is_near(kernel) -> None:
    (row,) = re.findall(rf"^\| `{kernel.name}` \|(.*)\|(.*)\|$", DOCS["tuning-database.md"], re.MULTILINE)
    may_differ, multiples = (set(re.findall(r"\w+", cell)) for cell in row)
    for problem in [feature[1] for feature in kernel.feature_cases]:
        near = kernel.near(problem)
        assert may_differ.issuperset(near.sizes + near.free)
        assert multiples.issuperset(name for name, _ in near.multiples)


def test_errors_the_docs_name_are_importable_beside_the_kernels() -> None:
    from tilewright import kernels
    from tilewright.tuning_db import errors

    named = {name for text in (README, *DOCS.values()) for name in re.findall(r"`(\w+Error)`", text)}
    ours = {name for name in named if hasattr(errors, name)}
    assert {"ProblemError", "UnsupportedError", "NotPackedError", "PackError"} <= ours
    documented = {
        name
        for function in (kernels.gemm, kernels.grouped_gemm, kernels.conv2d, kernels.attention, kernels.rmsnorm)
        for name in re.findall(r"\b(\w+Error)\b", function.__doc__ or "")
    }
    assert ours | documented <= set(kernels.__all__)


def test_the_models_of_the_default_suite_are_named() -> None:
    words = {"llama3-8b": "Llama-3-8B", "bert": "BERT", "vit": "ViT", "resnet50": "ResNet-50"}
    words |= {"mobilenet": "MobileNetV2", "convnext": "ConvNeXt-T"}
    for workload in SUITES["default"]:
        (word,) = {word for start, word in words.items() if workload.name.startswith(start)}
        assert word in README[: README.index("autotune devices")]
