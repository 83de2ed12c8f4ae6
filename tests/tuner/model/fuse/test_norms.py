"""Layer norms that are written out become one node, and only they."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.tuner.model.fuse.forms import Graph
from tests.tuner.model.graphs import normal, relative_error, results
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.fuse.norms import LAYER_NORM
from tilewright.tuner.model.precision.half import lower

WIDTH = 16
SHAPE = (2, 4, WIDTH)
SCALE, BIAS = 1 + normal(1, WIDTH) / 4, normal(2, WIDTH)


class Norm:
    """Writes a norm of `x` in a data type; what differs from the usual form is given by name."""

    def __init__(self, dtype: str = "fp32", *, axes: tuple[int, ...] = (-1,), epsilon: float = 1e-5) -> None:
        self.g, self.dtype = Graph(), dtype
        self.kind = {"fp32": np.float32, "fp16": np.float16}[dtype]
        self.axes, self.epsilon = axes, epsilon

    def c(self, values: object) -> str:
        return self.g.array(values, self.kind)

    def mean(self, x: str, axes: tuple[int, ...] | None = None) -> str:
        return str(self.g("ReduceMean", x, self.g.shape(*(axes or self.axes))))

    def centred(self, x: str) -> str:
        return str(self.g("Sub", x, self.mean(x)))

    def root(self, d: str) -> str:
        return str(self.g("Sqrt", self.g("Add", self.mean(self.g("Pow", d, self.c(2))), self.c(self.epsilon))))

    def affine(self, y: str) -> str:
        return str(self.g("Add", self.g("Mul", y, self.c(SCALE)), self.c(BIAS)))


def usual(n: Norm, x: str) -> str:
    d = n.centred(x)
    return n.affine(n.g("Div", d, n.root(d)))


def product_of_the_inverse(n: Norm, x: str) -> str:
    d = n.centred(x)
    return n.affine(n.g("Mul", n.g("Reciprocal", n.root(d)), d))


def squared_by_itself(n: Norm, x: str) -> str:
    d = n.centred(x)
    root = n.g("Sqrt", n.g("Add", n.c(n.epsilon), n.mean(n.g("Mul", d, d))))
    return n.affine(n.g("Div", d, root))


def centred_twice(n: Norm, x: str) -> str:
    return n.affine(n.g("Div", n.centred(x), n.root(n.centred(x))))


def constants_first(n: Norm, x: str) -> str:
    d = n.centred(x)
    y = n.g("Mul", n.c(SCALE), n.g("Div", d, n.root(d)))
    return str(n.g("Add", n.c(BIAS.reshape(1, 1, WIDTH)), y))


def without_parameters(n: Norm, x: str) -> str:
    d = n.centred(x)
    return str(n.g("Div", d, n.root(d)))


def one_number_for_all(n: Norm, x: str) -> str:
    return str(n.g("Add", n.g("Mul", without_parameters(n, x), n.c(2)), n.c([0.5])))


def over_two_axes(n: Norm, x: str) -> str:
    n.axes = (2, 1)
    d = n.centred(x)
    y = n.g("Div", d, n.root(d))
    return str(n.g("Add", n.g("Mul", y, n.c(normal(3, 4, WIDTH))), n.c(normal(4, 4, 1))))


FORMS = (
    usual,
    product_of_the_inverse,
    squared_by_itself,
    centred_twice,
    constants_first,
    without_parameters,
    one_number_for_all,
    over_two_axes,
)


def made(norm: Norm, form: Callable[[Norm, str], str], *more: str) -> tuple[ir.Model, ir.Model]:
    """A model before and after fusing."""
    y = form(norm, norm.g.input("x", *SHAPE, dtype=norm.dtype))
    before, after = norm.g.model(y, *more), norm.g.model(y, *more)
    fuse(after)
    return before, after


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_norm_is_one_node(form: Callable[[Norm, str], str], dtype: str) -> None:
    before, after = made(Norm(dtype), form)
    assert operators(after) == [LAYER_NORM]
    (node,) = after.graph
    assert node.outputs[0].name == before.graph.outputs[0].name
    assert node.name == next(each for each in before.graph if each.outputs[0].name == node.outputs[0].name).name
    assert node.attributes["epsilon"].as_float() == float(Norm(dtype).kind(1e-5))
    feeds = {"x": 3 + normal(5, *SHAPE, dtype=Norm(dtype).kind)}
    (wanted,), (got,) = results(before, feeds), results(after, feeds)
    assert got.dtype == wanted.dtype
    assert relative_error(got, wanted) < (1e-6 if dtype == "fp32" else 4e-3)


def cast_inside(n: Norm, x: str) -> str:
    """As PyTorch exports a norm of fp16: the deviation in fp32."""
    d = n.g("Cast", n.centred(x), to=1)
    square = n.g("Pow", d, n.g.array(2, np.float32))
    root = n.g("Sqrt", n.g("Add", n.mean(square), n.g.array(1e-5, np.float32)))
    return n.affine(n.g("Cast", n.g("Div", d, root), to=10))


def cast_for_good(n: Norm, x: str) -> str:
    """The same, and nothing is cast back."""
    d = n.g("Cast", n.centred(x), to=1)
    square = n.g("Pow", d, n.g.array(2, np.float32))
    root = n.g("Sqrt", n.g("Add", n.mean(square), n.g.array(1e-5, np.float32)))
    return str(n.g("Mul", n.g("Div", d, root), n.g.array(SCALE, np.float32)))


def cast_behind(n: Norm, x: str) -> str:
    """The same, cast back behind both parameters."""
    return str(n.g("Cast", n.g("Add", cast_for_good(n, x), n.g.array(BIAS, np.float32)), to=10))


def cast_between(n: Norm, x: str) -> str:
    """The same, cast back between them."""
    return str(n.g("Add", n.g("Cast", cast_for_good(n, x), to=10), n.g.array(BIAS, np.float16)))


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        (cast_inside, [LAYER_NORM]),
        (cast_for_good, ["Cast", LAYER_NORM]),
        (cast_behind, ["Cast", LAYER_NORM, "Cast"]),
        (cast_between, ["Cast", LAYER_NORM, "Cast", "Add"]),
    ],
)
def test_a_norm_of_fp16_that_is_computed_in_fp32(form: Callable[[Norm, str], str], wanted: list[str]) -> None:
    before, after = made(Norm("fp16"), form)
    assert operators(after) == wanted
    feeds = {"x": normal(5, *SHAPE, dtype=np.float16)}
    assert relative_error(results(after, feeds)[0], results(before, feeds)[0]) < 4e-3


def cast_down(n: Norm, x: str) -> str:
    return str(n.g("Mul", n.g("Cast", without_parameters(n, x), to=10), n.g.array(SCALE, np.float16)))


def test_what_is_of_another_type_comes_after_the_norm() -> None:
    before, after = made(Norm(), cast_down)
    assert operators(after) == [LAYER_NORM, "Cast", "Mul"]
    feeds = {"x": normal(5, *SHAPE)}
    assert relative_error(results(after, feeds)[0], results(before, feeds)[0]) < 2e-3


def other_axes(n: Norm, x: str) -> str:
    n.axes = (1,)
    return without_parameters(n, x)


def two_axes(n: Norm, x: str) -> str:
    d = n.centred(x)
    square = n.mean(n.g("Pow", d, n.c(2)), (1, 2))
    return str(n.g("Div", d, n.g("Sqrt", n.g("Add", square, n.c(1e-5)))))


def cubed(n: Norm, x: str) -> str:
    d = n.centred(x)
    return str(n.g("Div", d, n.g("Sqrt", n.g("Add", n.mean(n.g("Pow", d, n.c(4))), n.c(1e-5)))))


def of_another(n: Norm, x: str) -> str:
    return str(n.g("Div", n.centred(x), n.root(n.centred(n.g("Neg", x)))))


def lessened(n: Norm, x: str) -> str:
    d = n.centred(x)
    return str(n.g("Div", d, n.g("Sqrt", n.g("Add", n.mean(n.g("Pow", d, n.c(2))), n.c(-0.01)))))


def turned(n: Norm, x: str) -> str:
    d = n.centred(x)
    return str(n.g("Div", n.root(d), d))


@pytest.mark.parametrize("form", [other_axes, two_axes, cubed, of_another, lessened, turned])
def test_what_is_no_layer_norm_is_left(form: Callable[[Norm, str], str]) -> None:
    _, after = made(Norm(), form)
    assert LAYER_NORM not in operators(after)


def test_what_others_need_is_left() -> None:
    n = Norm()
    d = n.centred(n.g.input("x", *SHAPE))
    root = n.root(d)
    y = n.g("Div", d, root)
    model = n.g.model(y, root)
    fuse(model)
    assert LAYER_NORM not in operators(model)


@pytest.mark.parametrize("shape", [(4, 1), (2, 1, 1), (4, WIDTH)])
def test_parameters_that_are_none_of_a_norm_come_after_it(shape: tuple[int, ...]) -> None:
    scale = 1 + normal(6, *shape)
    before, after = made(Norm(), lambda n, x: str(n.g("Mul", without_parameters(n, x), n.c(scale))))
    assert operators(after) == [LAYER_NORM, "Mul"]
    feeds = {"x": normal(5, *SHAPE)}
    assert relative_error(results(after, feeds)[0], results(before, feeds)[0]) < 1e-6


@pytest.mark.parametrize("target", ["fp16", "bf16"])
def test_onnx_runtime_loads_what_is_lowered(target: str) -> None:
    """A norm behind a `Cast`, as lowering leaves it, is what ONNX Runtime's own fusion fails at (1.32)."""

    def between_moves(n: Norm, x: str) -> str:
        return str(n.g("Neg", usual(n, n.g("Transpose", x, perm=[1, 0, 2]))))

    def opened(fusing: bool) -> None:
        norm = Norm()
        model = norm.g.model(between_moves(norm, norm.g.input("x", *SHAPE)))
        fold(model)
        if fusing:
            fuse(model)
        lower(model, {}, target)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto)
        onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])

    opened(fusing=True)
    with pytest.raises(Exception, match="bound to different types"):
        opened(fusing=False)
