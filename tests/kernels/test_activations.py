"""Activations: the device code against its float64 reference, and the reference against formulas of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import triton
import triton.language as tl

from tests.kernels.conformance import ACTIVATION_NAMES
from tilewright.kernels.activations import ACTIVATIONS, ALIASES, activate, activation, activation_name
from tilewright.kernels.interpreter import interpret
from tilewright.tuning_db.errors import ProblemError

pytestmark = pytest.mark.smoke

ULP = 2.0**-23


@triton.jit
def apply_kernel(x, y, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, activate(tl.load(x + i), ACTIVATION))


def on_device(name, values):
    block = 4096
    x = np.zeros(-(-len(values) // block) * block, np.float32)
    x[: len(values)] = values
    y = np.full_like(x, -77)
    interpret(apply_kernel, (len(x) // block, 1, 1), {"x": x, "y": y, "ACTIVATION": name, "BLOCK": block})
    return y[: len(values)]


def sweep():
    """fp32 numbers: evenly over where curves bend, by magnitude from subnormal to largest, and both ends of tanh."""
    even = np.linspace(-20, 20, 20001)
    magnitudes = 10.0 ** np.linspace(-44, 38.5, 2001)
    near = np.nextafter(np.float32([0.25, 3.0, 0.5, 1.0]), np.float32(9))
    edges = np.concatenate([near, np.nextafter(near, np.float32(-9)), np.float32([0.25, 3.0])])
    return np.concatenate([even, magnitudes, -magnitudes, edges, -edges, [0.0, -0.0]]).astype(np.float32)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_device_code_is_the_reference(name):
    x = sweep()
    expected = activation(name)(x.astype(np.float64))
    actual = on_device(name, x).astype(np.float64)
    # Gates of the form x·(1 + t)/2 cancel where t is near -1: the error there is one of x, and x·gate is below 1.
    # exp(-x) carries the rounding of its argument: |x|/2 ulp, where a gate still is more than nothing.
    cancelled = np.minimum(np.abs(x), 20) if name.startswith("gelu") else 0
    exponent = 1 + np.minimum(np.abs(x), 90) if name in ("silu", "sigmoid", "quick_gelu", "softplus") else 1
    # Past 88.7 exp(-x) overflows, and what is left of x·sigmoid(x) is gone.
    bound = 4 * ULP * (np.abs(expected) * exponent + cancelled) + 3e-37
    with np.errstate(over="ignore"):
        largest = np.abs(expected) > np.finfo(np.float32).max
    error = np.abs(np.where(largest, 0, actual - expected))
    worst = np.argmax(error / bound)
    assert error[worst] <= bound[worst], (x[worst], actual[worst], expected[worst])


def test_tanh_keeps_its_digits_near_zero():
    x = np.concatenate([np.linspace(-0.3, 0.3, 4001), 10.0 ** -np.linspace(0, 37, 999)]).astype(np.float32)
    expected = np.tanh(x.astype(np.float64))
    error = np.abs(on_device("tanh", x) - expected)
    # 1 - exp(-2|x|) alone would be wrong by ulp/x: a quarter of all digits at 1e-3.
    assert (error <= 2.5 * ULP * np.abs(expected)).all()


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_nan_stays_and_infinity_goes_where_the_reference_goes(name):
    special = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38], np.float32)
    with np.errstate(all="ignore"):
        expected = activation(name)(special.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(on_device(name, special), expected, rtol=1e-6)
    assert np.isnan(expected[0])


def test_infinity_by_hand():
    plus, minus = {}, {}
    for name in ACTIVATION_NAMES:
        plus[name], minus[name] = on_device(name, np.array([np.inf, -1e30], np.float32)).tolist()
    bounded = {"sigmoid": 1.0, "tanh": 1.0, "clamp:-0.5:1.25": 1.25}
    assert plus == dict.fromkeys(ACTIVATION_NAMES, math.inf) | bounded
    sloped = {"none": np.float32(-1e30), "leaky_relu:0.3": np.float32(-1e30) * np.float32(0.3)}
    assert minus == dict.fromkeys(ACTIVATION_NAMES, 0.0) | sloped | {"tanh": -1.0, "clamp:-0.5:1.25": -0.5}


FORMULAS = {
    "none": lambda x: x,
    "relu": lambda x: x if x > 0 else 0.0,
    # erfc and expm1 keep their digits where the reference's 1 + erf and 1 + tanh cancel.
    "gelu_erf": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "sigmoid": lambda x: 0.5 * (1 + math.tanh(x / 2)),
    "tanh": lambda x: math.expm1(2 * x) / (math.expm1(2 * x) + 2),
    "hardswish": lambda x: 0.0 if x <= -3 else x if x >= 3 else x * (x + 3) / 6,
    "relu2": lambda x: x * x if x > 0 else 0.0,
    "clamp:-0.5:1.25": lambda x: sorted((-0.5, x, 1.25))[1],
    "leaky_relu:0.3": lambda x: x if x > 0 else 0.3 * x,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "softplus": lambda x: math.log1p(math.exp(x)),
}


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_the_reference_is_the_formula(name):
    x = np.concatenate([np.linspace(-9, 9, 1801), [1e-300, -1e-9, 0.0]])
    expected = [FORMULAS[name](float(value)) for value in x]
    np.testing.assert_allclose(activation(name)(x), expected, rtol=1e-13, atol=2e-15)


def test_references_take_and_give_float64_of_any_shape():
    for name in ACTIVATION_NAMES:
        result = activation(name)(np.linspace(-1, 1, 24).reshape(2, 3, 4))
        assert (result.dtype, result.shape) == (np.float64, (2, 3, 4))


def test_names():
    assert (
        {name.partition(":")[0] for name in ACTIVATION_NAMES}
        == set(ACTIVATIONS)
        == {formula.partition(":")[0] for formula in FORMULAS}
    )
    assert all(activation_name(name) == name for name in ACTIVATION_NAMES)
    aliases = {"gelu": "gelu_erf", "swish": "silu", "relu6": "clamp:0:6"}
    assert {name: activation_name(name) for name in ALIASES} == aliases
    assert activation_name(None) == "none"


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("leaky_relu", "leaky_relu:0.01"),
        ("leaky_relu:.010", "leaky_relu:0.01"),
        ("leaky_relu:1e-1", "leaky_relu:0.1"),
        ("clamp:0.0:6.0", "clamp:0:6"),
        ("clamp:-1:1", "clamp:-1:1"),
        ("clamp:+0.:1E+1", "clamp:0:10"),
        ("clamp:-3.40282347e+38:1e-05", "clamp:-3.40282347e+38:1e-05"),
        ("leaky_relu:1.4e-45", "leaky_relu:1.4e-45"),
        ("clamp:0:0.123456789", "clamp:0:0.123456789"),
    ],
)
def test_parameters_have_one_spelling(given, canonical):
    assert activation_name(given) == canonical
    assert activation_name(canonical) == canonical


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swiglu", "activation 'swiglu' is silu of a gate: where an op takes `gated`, activation='silu' with gated='"),
        ("geglu", "activation 'geglu' is gelu of a gate"),
        ("ReLU", "unknown activation 'ReLU'; did you mean relu? (activations: none, relu, relu2, "),
        ("", "activation='' is no name: leave it out, or say 'none'"),
        ("clamp", "activation 'clamp' has 0 parameters; clamp takes 2"),
        ("clamp:1", "activation 'clamp:1' has 1 parameters; clamp takes 2"),
        ("leaky_relu:1:2", "activation 'leaky_relu:1:2' has 2 parameters; leaky_relu takes 0 to 1"),
        ("relu:1", "activation 'relu:1' has 1 parameters; relu takes 0"),
        ("clamp:a:b", "its parameters must be finite numbers of fp32 in plain digits, as in clamp:0:6"),
        # What Python reads as a number all the same, and as another one than may have been meant.
        *(
            (
                f"leaky_relu:{text}",
                f"activation {f'leaky_relu:{text}'!r}: its parameters must be finite numbers of fp32",
            )
            for text in ("1_0", " 0.1", "0.1 ", "0.1\n", "٣", "0x1", "1e", "e5", ".", "", "+-1")
        ),
        ("leaky_relu:1e39", "its parameters must be finite numbers of fp32"),
        ("clamp:0:3.403e38", "its parameters must be finite numbers of fp32"),
        ("leaky_relu:nan", "its parameters must be finite numbers"),
        ("clamp:0:inf", "its parameters must be finite numbers"),
        ("clamp:6:0", "activation 'clamp:6:0' has a lower bound above the upper one"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ProblemError) as caught:
        activation_name(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_number_of_fp32_is_a_parameter_as_it_is_written():
    numbers = np.random.default_rng(6).integers(0, 2**32, 2000, np.uint32).view(np.float32)
    for number in numbers[np.isfinite(numbers)]:
        # As NumPy and Python write it, and as a name has it.
        for text in (str(number), repr(float(number)), f"{number:.9g}"):
            assert np.float32(activation_name(f"leaky_relu:{text}").partition(":")[2]) == number


def test_gelu_by_erf_is_as_near_as_is_documented():
    x = np.linspace(-20, 20, 40001).astype(np.float32)
    expected = activation("gelu_erf")(x.astype(np.float64))
    error = np.abs(on_device("gelu_erf", x) - expected)
    assert (error <= 5e-7 + 2 * ULP * np.abs(expected)).all()


def test_softplus_keeps_its_digits_where_it_is_small():
    x = -np.linspace(1, 85, 999).astype(np.float32)
    expected = np.log1p(np.exp(x.astype(np.float64)))
    error = np.abs(on_device("softplus", x) - expected)
    # log(1 + exp(x)) alone is 0 below -17.
    assert (error <= 4 * ULP * (1 + np.abs(x)) * expected).all()


def test_the_device_function_refuses_a_name_it_does_not_know():
    with pytest.raises(Exception, match="unknown activation"):
        on_device("swosh", np.zeros(4, np.float32))


@pytest.mark.parametrize("largest", ["3.4028235e38", "3.40282347e+38", "3.4028234663852886e+38"])
def test_the_largest_number_is_taken_however_it_is_written(largest):
    for text in (f"clamp:0:{largest}", f"clamp:-{largest}:{largest}", f"leaky_relu:{largest}"):
        name = activation_name(text)
        assert activation_name(name) == name
