from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from tests.tuner.model.graphs import model_of, normal, results
from tilewright.tuner.model import write
from tilewright.tuner.model.reading.read import read_model
from tilewright.tuner.model.write import write_model
from tilewright.tuning_db.errors import ModelError, UsageError


def layers(count: int = 3, width: int = 128) -> ir.Model:
    """A chain of matrix products, with a bias of few bytes each."""
    nodes = []
    constants = {}
    for place in range(count):
        used, made = f"h{place}" if place else "x", f"h{place + 1}" if place < count - 1 else "y"
        nodes += [
            helper.make_node("MatMul", [used, f"w{place}"], [f"m{place}"]),
            helper.make_node("Add", [f"m{place}", f"b{place}"], [made]),
        ]
        constants |= {f"w{place}": normal(place, width, width), f"b{place}": normal(place, 1)}
    return model_of(nodes, {"x": (2, width)}, ["y"], constants)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(one: ir.Model, other: ir.Model) -> bool:
    x = normal(9, 2, 128)
    return bool(np.array_equal(results(one, {"x": x})[0], results(other, {"x": x})[0]))


def test_a_model_comes_back(tmp_path: Path) -> None:
    model = layers()
    write_model(model, tmp_path / "m.onnx")
    assert files(tmp_path) == ["m.onnx"]
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    again = read_model(tmp_path / "m.onnx")
    assert same(model, again)
    for name, value in model.graph.initializers.items():
        held, wanted = again.graph.initializers[name].const_value, value.const_value
        assert held is not None
        assert wanted is not None
        np.testing.assert_array_equal(held.numpy(), wanted.numpy())


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_model(layers(), tmp_path / name)
    write_model(read_model(tmp_path / "one"), tmp_path / "three")
    write_model(read_model(tmp_path / "three"), tmp_path / "four")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "three").read_bytes() == (tmp_path / "four").read_bytes()


def test_writing_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = layers()
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    write_model(model, tmp_path / "m.onnx")
    assert list(model.graph.initializers) == list(before)
    assert all(model.graph.initializers[name].const_value is tensor for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [ir.DataType.INT4, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, ir.DataType.BOOL])
def test_types_that_numpy_lacks(dtype: ir.DataType, tmp_path: Path) -> None:
    array = (normal(3, 3001) > 0).astype(dtype.numpy())
    tensor = ir.tensor(array, dtype=dtype, name="w")
    out = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3001]))
    weight = ir.Value(name="w", type=ir.TensorType(dtype), shape=ir.Shape([3001]), const_value=tensor)
    node = ir.node("Cast", [weight], {"to": int(ir.DataType.FLOAT)}, outputs=[out])
    graph = ir.Graph([], [out], nodes=[node], initializers=[weight], opset_imports={"": 21}, name="g")
    write_model(ir.Model(graph, ir_version=10), tmp_path / "m.onnx")
    held = read_model(tmp_path / "m.onnx").graph.initializers["w"].const_value
    assert held is not None
    assert held.dtype == dtype
    np.testing.assert_array_equal(held.numpy().astype(np.float32), array.astype(np.float32))


def test_large_models_have_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "LARGEST_FILE", 150_000)
    model = layers()
    for path in (tmp_path / "m.onnx", tmp_path / "again" / "m.onnx"):
        path.parent.mkdir(exist_ok=True)
        names = sorted(file.name for file in write_model(model, path))
    assert names == files(tmp_path / "again")
    assert len(names) == 2
    assert (tmp_path / "m.onnx").stat().st_size < 5000
    for name in names:
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    assert same(read_model(tmp_path / "m.onnx"), model)
    # Onto itself: what is mapped is another file by then.
    write_model(read_model(tmp_path / "m.onnx"), tmp_path / "m.onnx")
    assert same(read_model(tmp_path / "m.onnx"), model)


def test_until_a_model_is_replaced_it_has_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "LARGEST_FILE", 150_000)
    first, second = layers(), layers(count=4)
    file, data = write_model(first, tmp_path / "m.onnx")

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(onnx.ModelProto, "SerializeToString", killed, raising=False)
        with pytest.raises(Killed):
            write_model(second, file)
    assert same(read_model(file), first)
    written = write_model(second, file)
    assert same(read_model(file), second)
    assert data not in written
    # What fits into one file has none.
    monkeypatch.setattr(write, "LARGEST_FILE", 2**30)
    assert write_model(first, file) == (file,)
    assert same(read_model(file), first)


def test_no_second_copy_of_the_weights_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers(count=16, width=512)
    for limit in (2**30, 10**6):
        monkeypatch.setattr(write, "LARGEST_FILE", limit)
        tracemalloc.start()
        try:
            write_model(model, tmp_path / "m.onnx")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 4 * 512 * 512 * 4  # of sixteen


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers()
    write_model(model, tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes()

    def full() -> ir.TensorProtocol:
        raise OSError(28, "No space left on device")

    last = model.graph.initializers["w2"]
    assert last.const_value is not None
    array = last.const_value.numpy()
    last.const_value = ir.LazyTensor(full, dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape), name="w2")
    for limit in (2**30, 150_000):
        with monkeypatch.context() as patch:
            patch.setattr(write, "LARGEST_FILE", limit)
            with pytest.raises(UsageError, match=r"can.t be written .No space left on device.: free some space"):
                write_model(model, tmp_path / "m.onnx")
        assert files(tmp_path) == ["m.onnx"]
        assert (tmp_path / "m.onnx").read_bytes() == before


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"can't be written \(No such file or directory\)"):
        write_model(layers(), tmp_path / "absent" / "m.onnx")
    with pytest.raises(UsageError, match="is a folder"):
        write_model(layers(), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't be written"):
        write_model(layers(), tmp_path / "file" / "m.onnx")


def test_a_weight_without_data(tmp_path: Path) -> None:
    model = layers()
    model.graph.initializers["w1"].const_value = None
    with pytest.raises(ModelError, match="initializer w1 has no data"):
        write_model(model, tmp_path / "m.onnx")
    assert files(tmp_path) == []
