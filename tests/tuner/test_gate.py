"""The correctness gate: what is right passes, to the edge of the tolerance; every planted defect is caught."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tilewright.kernels.dtypes import dtype
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.runtime import InterpretedPlan
from tilewright.tuner import gate
from tilewright.tuner.gate import Expected, OutputLayout, check, compare, expect, poisons, verdict

Array = np.ndarray[Any, Any]
Run = Callable[[Array], None]

PROBLEM = GemmProblem(M=50, N=72, K=100, dtype="fp16", batch=2, bias="fp16", residual="fp16", activation="relu")
ARRAYS = PROBLEM.inputs(3)


def layout_of(problem: GemmProblem, **options: Any) -> OutputLayout:
    return OutputLayout.of(problem.outputs()["out"].shape, np.dtype(dtype(problem.output_dtype).numpy), **options)


def right(problem: GemmProblem = PROBLEM, arrays: Mapping[str, Array] = ARRAYS) -> Run:
    """What a correct kernel does: fp32 sums, one rounding to the output's type."""
    single = {name: array.astype(np.float32) for name, array in arrays.items()}
    result = single["a"] @ single["b"]
    if "bias" in single:
        result = result + single["bias"]
    if "residual" in single:
        result = result + single["residual"]
    if problem.activation == "relu":
        result = np.maximum(result, 0)

    def run(out: Array) -> None:
        out[...] = result.astype(out.dtype)

    return run


def judge(run: Run, problem: GemmProblem = PROBLEM, arrays: Mapping[str, Array] = ARRAYS, **options: Any) -> str | None:
    message = check(
        run, layout_of(problem, **options), expect(GEMM, problem, arrays, 3)["out"], GEMM.tolerance(problem)["out"]
    )
    assert message is None or "\n" not in message
    return message


@pytest.mark.parametrize("out_dtype", ["fp16", "bf16", "fp32", "fp8e4m3", "fp8e5m2"])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_right_result_passes(out_dtype: str, activation: str) -> None:
    problem = GemmProblem(M=65, N=130, K=300, dtype="bf16", out_dtype=out_dtype, activation=activation)
    arrays = problem.inputs(0)
    assert judge(right(problem, arrays), problem, arrays) is None


@pytest.mark.parametrize("seed", range(20))
def test_right_results_are_never_called_biased(seed: int) -> None:
    problem = GemmProblem(M=16, N=24, K=64, dtype="fp16")  # so few elements that the mean error scatters
    arrays = problem.inputs(seed)
    assert judge(right(problem, arrays), problem, arrays) is None


@pytest.mark.parametrize("options", [{"pitch": 80}, {"aligned": False}, {"pitch": 73, "aligned": False}])
def test_a_right_result_passes_with_padded_or_unaligned_rows(options: dict[str, Any]) -> None:
    assert judge(right(), **options) is None


# Planted defects. Each is a correct kernel but for one thing.


def changed(change: Callable[[Array], None]) -> Run:
    def run(out: Array) -> None:
        right()(out)
        change(out)

    return run


def k_tail_dropped(out: Array) -> None:
    cut = {**ARRAYS, "a": ARRAYS["a"][:, :, :96], "b": ARRAYS["b"][:, :96]}
    right(PROBLEM, cut)(out)


def last_k_doubled(out: Array) -> None:
    more = {
        **ARRAYS,
        "a": np.concatenate([ARRAYS["a"], ARRAYS["a"][:, :, -1:]], axis=2),
        "b": np.concatenate([ARRAYS["b"], ARRAYS["b"][:, -1:]], axis=1),
    }
    right(PROBLEM, more)(out)


def activation_skipped(out: Array) -> None:
    right(GemmProblem(**{**PROBLEM.to_dict(), "activation": "none"}))(out)


def without(name: str) -> Run:
    return right(PROBLEM, {key: value for key, value in ARRAYS.items() if key != name})


def last_rows_unwritten(out: Array) -> None:
    result = np.empty(out.shape, out.dtype)
    right()(result)
    out[:, :48] = result[:, :48]


def one_wrong(out: Array) -> None:
    out[1, 49, 71] = out[1, 49, 71] + np.float16(0.05)


def one_nan(out: Array) -> None:
    out[0, 7, 7] = np.nan


def one_infinity(out: Array) -> None:
    out[0, 7, 7] = np.inf


def tiles_swapped(out: Array) -> None:
    out[0, :16, :16], out[0, :16, 16:32] = out[0, :16, 16:32].copy(), out[0, :16, :16].copy()


def batches_mixed_up(out: Array) -> None:
    out[1] = out[0]


def scaled(factor: float) -> Run:
    def run(out: Array) -> None:
        exact = GEMM.reference(PROBLEM, ARRAYS)["out"]
        out[...] = (exact * factor).astype(out.dtype)

    return run


def cut_off(out: Array) -> None:
    """Rounds toward zero, by dropping the bits that fp16 has no room for."""
    exact = GEMM.reference(PROBLEM, ARRAYS)["out"]
    nearest = exact.astype(np.float16)
    too_far = np.abs(nearest.astype(np.float64)) > np.abs(exact)
    out[...] = np.where(too_far, np.nextafter(nearest, np.float16(0)), nearest)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (k_tail_dropped, "elements .* are off"),
        (last_k_doubled, "elements .* are off"),
        (activation_skipped, "elements .* are off"),
        (without("bias"), "elements .* are off"),
        (without("residual"), "elements .* are off"),
        (last_rows_unwritten, r"288 of 7200 elements \(4\.00%\) were never written, first at \(0, 48, 0\)"),
        (
            changed(one_wrong),
            r"^1 of 7200 elements \(0\.01%\) are off, worst at \(1, 49, 71\): got .*, wanted .* times",
        ),
        (changed(one_nan), r"worst at \(0, 7, 7\): got nan, wanted .*, beyond any tolerance"),
        (changed(one_infinity), r"worst at \(0, 7, 7\): got inf, wanted .*, beyond any tolerance"),
        (changed(tiles_swapped), "elements .* are off"),
        (changed(batches_mixed_up), r"are off, worst at \(1, "),
        (scaled(1 + 3e-4), "too large on the whole"),
        (scaled(1 - 3e-4), "too small on the whole"),
        (cut_off, "too small on the whole"),
    ],
)
def test_a_defect_is_caught(run: Run, message: str) -> None:
    found = judge(run)
    assert found is not None
    assert re.search(message, found), found


def beside(where: int) -> Run:
    """Changes one byte outside: so far behind the start of the last element, or ahead of the array if negative."""

    def run(out: Array) -> None:
        right()(out)
        address = out.ctypes.data + (where if where < 0 else out.nbytes - 2 + where)
        base = out  # to become the buffer, zones and all
        while isinstance(base.base, np.ndarray):
            base = base.base
        base.view(np.uint8)[address - base.ctypes.data] ^= 1

    return run


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (2, r"1 bytes behind the output were overwritten, the nearest 0 bytes after its end"),
        (40_000, r"behind the output .* 39998 bytes after its end"),
        (-1, r"before the output .* 1 bytes ahead"),
        (-36_000, r"before the output .* 36000 bytes ahead"),
    ],
)
def test_a_write_out_of_bounds_is_caught(where: int, message: str) -> None:
    found = judge(beside(where))
    assert found is not None
    assert re.search(message, found), found


def test_a_write_between_padded_rows_is_caught() -> None:
    layout = layout_of(PROBLEM, pitch=80)
    buffers = [layout.allocate(byte) for byte in poisons(layout.dtype)]
    for buffer in buffers:
        right()(layout.array(buffer))
        buffer[layout.guard + 3 * 160 + 144] = 0  # the first element behind row 3
    found = verdict(
        layout, buffers[0], buffers[1], expect(GEMM, PROBLEM, ARRAYS, 3)["out"], GEMM.tolerance(PROBLEM)["out"]
    )
    assert found == "1 bytes between its rows were overwritten, the nearest in row 3"


def test_two_runs_that_differ_in_a_bit_are_caught() -> None:
    runs = iter((0, 1))

    def run(out: Array) -> None:
        right()(out)
        out.view(np.uint16)[1, 2, 3] += next(runs)

    found = judge(run)
    assert found is not None
    assert found.startswith("1 of 7200 elements (0.01%) differ between two runs, first at (1, 2, 3): ")


def test_an_integer_left_unwritten_is_caught_even_where_it_looks_right() -> None:
    layout = OutputLayout.of((4, 8), np.dtype(np.int8))
    wanted = np.full((4, 8), float(np.array(0x80, np.uint8).view(np.int8)))  # every element is the first poison

    def run(out: Array) -> None:
        out[:3] = -128

    found = check(run, layout, Expected((4, 8), wanted), Tolerance(0.0, 0.0))
    assert found == "8 of 32 elements (25.00%) were never written, first at (3, 0)"


# Tolerance, NaN, infinity


def test_the_edge_of_the_tolerance_passes_and_beyond_it_fails() -> None:
    wanted = np.array([[1.0, -4.0], [0.0, 100.0]])
    allowance = 2.0**-4 + 2.0**-5 * np.abs(wanted)  # exact in fp32
    tolerance = Tolerance(relative=2.0**-5, absolute=2.0**-4)
    alternate = np.array([[1, -1], [-1, 1]])
    assert compare((wanted + alternate * allowance).astype(np.float32), wanted, tolerance) is None
    for at in np.ndindex(2, 2):
        result = wanted.astype(np.float32)
        result[at] += allowance[at] * 1.001
        found = compare(result, wanted, tolerance)
        assert found is not None
        assert found.startswith(f"1 of 4 elements (25.00%) are off, worst at {at}")
        assert found.endswith("1 times the tolerance")


@pytest.mark.parametrize(
    ("got", "wanted", "passes"),
    [
        (np.nan, np.nan, True),
        (np.nan, 0.0, False),
        (0.0, np.nan, False),
        (np.inf, np.inf, True),
        (-np.inf, np.inf, False),
        (65504.0, np.inf, False),
        (np.inf, 65504.0 * 1.01, True),  # past what fp16 holds
        (np.inf, 65519.0, True),  # within tolerance of what rounds to infinity
        (-np.inf, 65519.0, False),
        (np.inf, 60000.0, False),
        (65504.0, 70000.0, True),
        (60000.0, 70000.0, False),
        (np.nan, 70000.0, False),
    ],
)
def test_nan_and_infinity_are_right_only_where_they_are_wanted(got: float, wanted: float, passes: bool) -> None:
    tolerance = GEMM.tolerance(GemmProblem(M=1, N=1, K=1))["out"]
    found = compare(np.array([got], np.float16), np.array([wanted]), tolerance)
    assert (found is None) == passes


@pytest.mark.parametrize(("got", "passes"), [(448.0, True), (np.nan, False), (416.0, False), (-448.0, False)])
def test_a_type_without_infinity_saturates(got: float, passes: bool) -> None:
    result = np.array([got]).astype(ml_dtypes.float8_e4m3fn)
    assert (compare(result, np.array([np.inf]), Tolerance(2.0**-6, 0.0)) is None) == passes


def test_zero_tolerance_takes_equal_values() -> None:
    assert compare(np.zeros(3, np.float32), np.zeros(3), Tolerance(0.0, 0.0)) is None
    assert compare(np.full(3, 1e-30, np.float32), np.zeros(3), Tolerance(0.0, 0.0)) is not None


# Large problems, in part


@pytest.fixture
def in_part(monkeypatch: pytest.MonkeyPatch) -> tuple[GemmProblem, dict[str, Array], Expected]:
    """A problem that counts as large."""
    monkeypatch.setattr(gate, "FULL_FLOPS", 1000)
    problem = GemmProblem(M=700, N=1100, K=40, batch=3, b_broadcast=True, bias="fp32", residual="fp16")
    arrays = problem.inputs(1)
    return problem, arrays, expect(GEMM, problem, arrays, 1)["out"]


def test_a_part_is_the_same_part_of_the_whole(in_part: tuple[GemmProblem, dict[str, Array], Expected]) -> None:
    problem, arrays, expected = in_part
    assert expected.shape == (3, 700, 1100)
    assert expected.index is not None
    batch, rows, columns = expected.index
    np.testing.assert_allclose(
        expected.values, GEMM.reference(problem, arrays)["out"][np.ix_(batch, rows, columns)], rtol=1e-12
    )
    # Both ends and both sides of every last tile, and no 16 rows without one.
    assert {0, 699, 639, 640, 671, 672, 687, 688, 511, 512} <= set(rows)
    assert {0, 1099, 1023, 1024, 1087, 1088} <= set(columns)
    assert len(set(rows // 16)) == 44
    assert len(set(columns // 16)) == 69
    assert set(batch) == {0, 1, 2}
    again = expect(GEMM, problem, arrays, 1)["out"].index
    assert again is not None
    assert all(np.array_equal(one, other) for one, other in zip(expected.index, again, strict=True))


def test_in_part_a_right_result_passes(in_part: tuple[GemmProblem, dict[str, Array], Expected]) -> None:
    problem, arrays, expected = in_part
    assert check(right(problem, arrays), layout_of(problem), expected, GEMM.tolerance(problem)["out"]) is None


@pytest.mark.parametrize("tile", [(0, 0, 0), (2, 30, 50), (1, 43, 68), (0, 43, 0), (0, 0, 68)])
def test_in_part_one_wrong_tile_is_caught(
    in_part: tuple[GemmProblem, dict[str, Array], Expected], tile: tuple[int, int, int]
) -> None:
    problem, arrays, expected = in_part
    batch, row, column = tile

    def run(out: Array) -> None:
        right(problem, arrays)(out)
        out[batch, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += np.float16(1)

    found = check(run, layout_of(problem), expected, GEMM.tolerance(problem)["out"])
    assert found is not None
    assert f"worst at ({batch}, " in found


def test_in_part_poison_and_nan_are_found_anywhere(in_part: tuple[GemmProblem, dict[str, Array], Expected]) -> None:
    problem, arrays, expected = in_part
    assert expected.index is not None
    row = next(row for row in range(700) if row not in expected.index[1])

    def nan(out: Array) -> None:
        right(problem, arrays)(out)
        out[2, row, 3] = np.nan

    def unwritten(out: Array) -> None:
        kept = out[1, row, 3].copy()
        right(problem, arrays)(out)
        out[1, row, 3] = kept

    judged = [check(run, layout_of(problem), expected, GEMM.tolerance(problem)["out"]) for run in (nan, unwritten)]
    assert judged[0] == f"the result is NaN at (2, {row}, 3), among others perhaps"
    assert judged[1] is not None
    assert judged[1].endswith(f"were never written, first at (1, {row}, 3)")


# The interpreter


@pytest.mark.parametrize(
    ("problem", "config"),
    [
        (GemmProblem(M=64, N=64, K=64, bias="fp16", activation="silu"), GemmConfig(32, 32, 32)),
        (GemmProblem(M=64, N=64, K=320, dtype="bf16", b_layout="col"), GemmConfig(32, 64, 32, SPLIT_K=2)),
        (GemmProblem(M=17, N=33, K=65, dtype="fp32", batch=2, residual="fp32"), GemmConfig(16, 16, 16)),
    ],
)
def test_the_interpreted_kernel_passes_on_its_problem_and_on_the_ragged_one(
    problem: GemmProblem, config: GemmConfig
) -> None:
    assert GEMM.ragged is not None
    ragged = GEMM.ragged(problem, config)
    for each in (problem, ragged):
        arrays = each.inputs(0)
        plan = InterpretedPlan(GEMM.launches(each, config))

        def run(out: Array, arrays: dict[str, Array] = arrays, plan: InterpretedPlan = plan) -> None:
            plan.run({**{f"{name}_ptr": array for name, array in arrays.items()}, "out_ptr": out}, {}, 0)

        assert judge(run, each, arrays) is None


@pytest.mark.parametrize(
    "sizes", [(4096, 4096, 4096), (1, 28672, 4096), (197, 3072, 768), (129, 127, 17), (16, 16, 16)]
)
@pytest.mark.parametrize("blocks", [(16, 16, 32), (128, 256, 64), (64, 32, 128)])
@pytest.mark.parametrize("split_k", [1, 4])
def test_a_ragged_problem_is_small_cut_in_every_tile_and_as_aligned(
    sizes: tuple[int, int, int], blocks: tuple[int, int, int], split_k: int
) -> None:
    problem = GemmProblem(**dict(zip("MNK", sizes, strict=True)), batch=5)
    config = GemmConfig(*blocks, SPLIT_K=split_k)
    assert GEMM.ragged is not None
    ragged = GEMM.ragged(problem, config)
    for name, block in zip("MNK", blocks, strict=True):
        was, size = getattr(problem, name), getattr(ragged, name)
        assert (size % 16 == 0) == (was % 16 == 0)
        assert size % block != 0 or (block == 16 and was % 16 == 0)
        assert size <= block * (2 * split_k + 1 if name == "K" else 2)
    assert ragged.batch == 2
    assert ragged.flops() < 2**31


def test_large_inputs_are_quick_random_and_do_not_repeat_by_rows() -> None:
    problem = GemmProblem(M=8, N=8192, K=2048, dtype="bf16", b_layout="col")
    b = problem.inputs(0)["b"]
    assert b.shape == (1, 2048, 8192)
    assert b.strides[1] == 2
    values = b.astype(np.float32)
    assert abs(float(values.mean())) < 2e-3
    assert float(values.std()) == pytest.approx(1, abs=2e-3)
    assert len({values[0, :8, column].tobytes() for column in range(8192)}) == 8192
