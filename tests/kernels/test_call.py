"""What every op's call has in common, on a small op of its own: libraries, numbers, outputs, overlap, the cache."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tilewright.kernels import call as calling
from tilewright.kernels import gemm, rmsnorm
from tilewright.kernels.call import New, Operation, PlannedCall
from tilewright.kernels.dispatch import forget_plans
from tilewright.kernels.problem import Output
from tilewright.tuning_db.errors import ProblemError, UnsupportedError, UsageError

pytestmark = pytest.mark.smoke

X = np.arange(6, dtype=np.float32).reshape(2, 3)
Y = X + 1


class Recorder:
    """A plan that writes what it was given."""

    def __init__(self):
        self.runs = []

    def bind(self, names, strides):
        def run(arrays, stream):
            pointers = dict(zip(names, arrays, strict=True))
            self.runs.append((pointers, dict(strides), stream))
            pointers["out_ptr"][...] = pointers["x_ptr"] * pointers.get("factor_ptr", np.ones(1))[0]

        return run


def operation(prepared=None, **options):
    """An op of x, y and a factor that gives `out`, and `extra` if its option asks for it."""
    plan = Recorder()

    def prepare(views, values):
        if prepared is not None:
            prepared.append((views, values))
        outputs = {"out": Output((2, 3), "fp32"), "extra": Output((2,), "fp16") if values[0] else None}
        inputs = {name: f"{name}_ptr" for name in ("x", "y", "factor")}
        return PlannedCall.of(plan, views, inputs, outputs, {"x_stride": 3})

    kernel = SimpleNamespace(name="scale")
    made = Operation(
        "scale",
        kernel,
        ("x", "y", "factor"),
        {"extra": "bool", "config": "config"},
        prepare,
        lambda views, values: (New((2, 3), "fp32"), New((2,), "fp16")),
        outputs=("out", "extra"),
        scalars=("factor",),
        in_place=("y",),
        optional={"extra": "extra"},
        **options,
    )
    return made, plan


def run(op, x=X, y=None, factor=None, out=None, extra=None, options=(False, None)):
    return op.run((x, y, factor), (out, extra), options)


def test_new_outputs_are_made_and_absent_ones_are_none():
    op, plan = operation()
    out, extra = run(op)
    assert (out.shape, out.dtype, extra) == ((2, 3), np.float32, None)
    np.testing.assert_array_equal(out, X)
    (pointers, strides, stream) = plan.runs[0]
    assert (set(pointers), strides, stream) == ({"x_ptr", "out_ptr"}, {"x_stride": 3}, 0)
    assert run(op, options=(True, None))[1].dtype == np.float16


def test_outputs_that_are_given_are_written_and_given_back():
    op, _ = operation()
    mine, rest = np.zeros((2, 3), np.float32), np.zeros(2, np.float16)
    out, extra = run(op, out=mine, extra=rest, options=(True, None))
    assert out is mine
    assert extra is rest
    np.testing.assert_array_equal(mine, X)


@pytest.mark.parametrize("factor", [2.0, 2, np.float64(2), np.float32(2), np.full(1, 2, "f4"), np.array([[2]], "f4")])
def test_numbers_and_arrays_of_one_element_are_the_same(factor):
    op, _ = operation()
    np.testing.assert_array_equal(run(op, factor=factor)[0], X * 2)


def test_a_signature_is_prepared_once_and_a_number_is_no_part_of_it():
    prepared = []
    op, _ = operation(prepared)
    for factor in (0.5, 2.0, 3.0):
        run(op, factor=factor)
    run(op, X + 1, factor=0.5)
    assert len(prepared) == 1
    views, options = prepared[0]
    assert (set(views), options) == ({"x", "factor"}, (False, None))
    assert (views["factor"].shape, views["factor"].dtype, views["factor"].device) == ((1,), "fp32", -1)
    for other in ({"x": X.astype(np.float16)}, {"x": X[:, :2]}, {"y": X}, {"options": (True, None)}):
        run(op, **{"factor": 2.0, **other, "out": np.zeros(other.get("x", X).shape, np.float32)})
    assert len(prepared) == 5


def test_a_number_and_its_negative_zero_are_two():
    ones = np.ones((1, 1), np.float32)
    signs = [np.signbit(gemm(ones, ones, alpha=alpha)[0, 0]) for alpha in (0.0, -0.0, 0.0)]
    assert signs == [False, True, False]


def test_an_array_that_is_not_aligned_to_its_elements_is_refused():
    shifted = np.frombuffer(bytes(129), np.uint8)[1:].view(np.float32).reshape(4, 8)
    with pytest.raises(UnsupportedError, match=r"^a starts \d B past a multiple of its elements' 4 B: pass a copy$"):
        gemm(shifted, np.zeros((8, 4), np.float32))
    with pytest.raises(UnsupportedError, match=r"^out starts .* 4 B: pass a contiguous array, and copy "):
        gemm(np.zeros((4, 4), np.float32), np.zeros((4, 8), np.float32), out=shifted)
    memory = np.zeros(136, np.uint8)
    start = -memory.ctypes.data % 4
    for step in (4, 1, 2):  # aligned to elements first: what is known of such calls holds for no other
        given = memory[start + step :][:128].view(np.float32).reshape(4, 8)
        if step == 4:
            rmsnorm(given)
            continue
        with pytest.raises(UnsupportedError, match=rf"^x starts {step} B past"):
            rmsnorm(given)


def test_forgotten_plans_are_forgotten_here_too():
    prepared = []
    op, _ = operation(prepared)
    run(op)
    forget_plans()
    run(op)
    assert len(prepared) == 2


def test_signatures_are_not_kept_without_end(monkeypatch):
    monkeypatch.setattr(calling, "MOST_SIGNATURES", 3)
    op, _ = operation()
    for option in range(10):
        run(op, options=(False, option))
    assert len(op._calls) <= 3


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (UsageError, "factor='2' must be a real number or an array", {"factor": "2"}),
        (UsageError, "factor=2j must be a real number or an array", {"factor": 2j}),
        (UsageError, "factor=[2] must be a real number or an array", {"factor": [2]}),
        (ProblemError, "factor is (2,) of fp32: a number, or one element of fp32", {"factor": np.ones(2, np.float32)}),
        (ProblemError, "factor is (1,) of fp16: a number, or", {"factor": np.ones(1, np.float16)}),
        (UnsupportedError, "a float is no array", {"y": 1.0}),
        (UnsupportedError, "x: a float is no array", {"x": 1.0}),
        (ProblemError, "x is missing", {"x": None}),
        (UsageError, "config={} can't be a dict", {"options": (False, {})}),
        (ProblemError, "out may not share memory with x", {"out": X}),
        (ProblemError, "extra may not share memory with y", {"y": Y, "extra": Y[0, :2], "options": (True, None)}),
    ],
)
def test_misuse_is_one_line(error, message, call):
    op, plan = operation()
    with pytest.raises(error) as caught:
        run(op, **call)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert plan.runs == []


def test_an_output_may_replace_an_input_with_one_dimension_of_one_index_more():
    op, _ = operation()
    y = Y.copy()
    run(op, y=y, out=y[None][0:1].reshape(1, 2, 3)[0])
    np.testing.assert_array_equal(y, X)


def test_an_output_may_replace_an_input_that_is_read_in_place_and_no_part_of_it():
    op, _ = operation()
    wide = np.ones((4, 3), np.float32)
    run(op, y=wide[:2], out=wide[:2])
    with pytest.raises(ProblemError, match="out may not share memory with y"):
        run(op, y=wide[:2], out=wide[1:3])
    with pytest.raises(ProblemError, match="extra may not share memory with out"):
        run(op, out=wide[:2], extra=wide[0, :2], options=(True, None))


def test_outputs_may_lie_between_the_rows_of_inputs():
    op, _ = operation()
    both = np.ones((2, 6), np.float32)
    run(op, both[:, :3], out=both[:, 3:])
    np.testing.assert_array_equal(both, 1)


def test_guards_know_what_to_look_at_and_how_far():
    op, _ = operation()
    both = np.ones((2, 6), np.float32)
    run(op, both[:, :3], y=both[:, 3:], factor=2.0, out=both[:, 3:])
    ((_, (guard,)),) = op._calls.values()
    # The number is nowhere yet.
    assert (guard.place, guard.name, guard.bytes) == (3, "out", (6 + 3) * 4)
    assert guard.others == ((0, "x", (6 + 3) * 4, False), (1, "y", (6 + 3) * 4, True))


def test_what_is_missing_is_named():
    op, _ = operation(required=("x", "y"))
    with pytest.raises(ProblemError, match=r"^y is missing$"):
        run(op)
    out, _ = run(op, y=Y)
    np.testing.assert_array_equal(out, X)
    # The first one too, of which the library would be.
    with pytest.raises(ProblemError, match=r"^x is missing$"):
        run(op, x=None, y=Y)
    for arrays, name in (((None, X), "a"), ((X, None), "b"), ((None, None), "a")):
        with pytest.raises(ProblemError, match=rf"^{name} is missing$"):
            gemm(*arrays)


@pytest.mark.parametrize("factor", [1e39, float("nan"), float("inf"), 10**400, np.float64(-1e300)])
def test_numbers_that_fp32_has_not_are_refused(factor):
    op, plan = operation()
    with pytest.raises(UsageError, match=r"^factor=.* must be a finite number of fp32$"):
        run(op, factor=factor)
    assert plan.runs == []


@pytest.mark.parametrize("scale", [0.0, 0, -0.0, -1.0, 1e-39, 1e39, float("nan"), float("inf")])
def test_a_result_is_divided_by_a_number_above_0(scale):
    x, w = np.ones((16, 16), np.float16), np.ones((16, 16), np.float16)
    gemm(x, w, alpha=0.0, out_scale=1.0, out_dtype="int8")  # what is kept as alpha is no out_scale
    with pytest.raises(UsageError, match=r"^out_scale=.* must be a number of fp32 above 0, from 1.18e-38 to 3.4e\+38$"):
        gemm(x, w, alpha=0.0, out_scale=scale, out_dtype="int8")
    with pytest.raises(UsageError, match=r"^out_scale=.* must be a number of fp32 above 0, from 1.18e-38 to 3.4e\+38$"):
        rmsnorm(x, out_scale=scale, out_dtype="int8")


def test_no_factor_is_a_factor_of_1():
    x, w = np.ones((16, 16), np.float16), np.ones((16, 16), np.float16)
    np.testing.assert_array_equal(gemm(x, w, alpha=None), gemm(x, w))


def test_numbers_are_not_kept_on_the_device_without_end(monkeypatch):
    monkeypatch.setattr(calling, "_numbers", {})
    monkeypatch.setattr(calling, "MOST_NUMBERS", 3)
    op, _ = operation()
    for factor in range(1, 9):
        np.testing.assert_array_equal(run(op, factor=float(factor))[0], X * factor)
    assert len(calling._numbers) == 3


class OnCupysDevice(np.ndarray):
    """Says where it is with an object that has no hash, as CuPy's arrays do."""

    device = property(lambda self: {})


def test_numbers_go_beside_arrays_whose_device_has_no_hash():
    op, _ = operation()
    mine = X.view(OnCupysDevice)
    for factor in (2.0, 2, 3.0):
        np.testing.assert_array_equal(run(op, mine, factor=factor)[0], X * factor)


def test_a_number_is_made_once_for_each_device_and_too_many_for_their_call_alone(monkeypatch):
    monkeypatch.setattr(calling, "_numbers", {})
    monkeypatch.setattr(calling, "MOST_NUMBERS", 3)
    alive, launched = [], []

    class Kind:
        """Of arrays whose memory is anybody's once they are let go."""

        def lasting_scalar(self, ordinal, value):
            return f"kept {value} on {ordinal}", object()

        def scalar(self, like, value):
            array = type("Array", (), {"__del__": lambda _: alive.remove(value)})()
            alive.append(value)
            return array

        def argument(self, array):
            return "the call's own"

        def stream(self, ordinal):
            return 7

    def launch(arguments, stream):
        launched.append((arguments[0], list(alive)))

    for ordinal, value in ((0, 2.0), (1, 2.0), (0, 2.0), (0, -0.0), (0, 0.0)):
        PlannedCall(launch, ((0, "factor"),), (), ordinal).run(Kind(), (X,), (), [value])
    assert launched == [
        ("kept 2.0 on 0", []),
        ("kept 2.0 on 1", []),
        ("kept 2.0 on 0", []),
        ("kept -0.0 on 0", []),
        ("the call's own", [0.0]),
    ]
    assert alive == []


def test_an_argument_that_is_no_array_is_named():
    op, _ = operation()
    with pytest.raises(UnsupportedError, match=r"^y: arrays of dtype int64 are not supported"):
        run(op, y=X.astype(np.int64))
    with pytest.raises(UnsupportedError, match=r"^y: a list is no array"):
        run(op, y=[1.0])


def test_an_output_that_overlaps_itself_or_is_read_only_is_refused():
    op, plan = operation()
    shared = np.lib.stride_tricks.as_strided(np.zeros(5, np.float32), (2, 3), (8, 4))
    with pytest.raises(UnsupportedError, match=r"^out has strides \(2, 1\) for shape \(2, 3\): it overlaps itself$"):
        run(op, out=shared)
    frozen = np.zeros((2, 3), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ProblemError, match=r"^out is read-only$"):
        run(op, out=frozen)
    assert plan.runs == []
    run(op, out=np.zeros((2, 3), np.float32))
    assert len(plan.runs) == 1
    with pytest.raises(ProblemError, match=r"^out is read-only$"):  # whatever was written before it
        run(op, out=frozen)
    assert len(plan.runs) == 1
