"""Calibration data from files, folders and a generator, and everything that can be wrong with it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tilewright.tuner.model.calibration import data as loading
from tilewright.tuner.model.calibration.data import RANDOM_WARNING, Samples, load_data
from tilewright.tuning_db.errors import ModelError, UsageError

Arrays = dict[str, np.ndarray]

RNG = np.random.default_rng(0)
KINDS = {
    "float": ir.DataType.FLOAT,
    "half": ir.DataType.FLOAT16,
    "brain": ir.DataType.BFLOAT16,
    "int": ir.DataType.INT64,
    "short": ir.DataType.INT32,
    "bool": ir.DataType.BOOL,
    "text": ir.DataType.STRING,
}


def model(**inputs: tuple[str, tuple[int | str, ...]]) -> ir.Model:
    """A model of some inputs that does nothing."""
    values = [
        ir.Value(name=name, type=ir.TensorType(KINDS[kind]), shape=ir.Shape(shape))
        for name, (kind, shape) in inputs.items()
    ]
    return ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": 21}, name="nothing"), ir_version=10)


PICTURES = model(x=("float", (1, 3, 4)))
BATCHES = model(x=("float", (2, 3, 4)))
PAIR = model(ids=("int", (1, 5)), mask=("float", (1, 5)))


def archive(folder: Path, save: Callable[..., None] = np.savez, **given: np.ndarray) -> str:
    path = folder / "data.npz"
    save(path, **given)
    return str(path)


def numbers(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("given", "shape", "feeds"),
    [
        (BATCHES, (5, 2, 3, 4), [np.s_[0], np.s_[1], np.s_[2], np.s_[3], np.s_[4]]),  # an axis more: a feed each
        (BATCHES, (6, 3, 4), [np.s_[0:2], np.s_[2:4], np.s_[4:6]]),  # as many: samples, two in a feed
        (PICTURES, (2, 1, 3, 4), [np.s_[0], np.s_[1]]),
        (PICTURES, (2, 3, 4), [np.s_[0:1], np.s_[1:2]]),
        (model(x=("float", (2,))), (2, 2), [np.s_[0], np.s_[1]]),
        (model(x=("float", ())), (2,), [np.s_[0], np.s_[1]]),
    ],
)
def test_an_archive(
    save: Callable[..., None], given: ir.Model, shape: tuple[int, ...], feeds: list[slice], tmp_path: Path
) -> None:
    data = numbers(*shape)
    samples = load_data(archive(tmp_path, save, x=data), given, count=100)
    assert len(samples) == len(feeds)
    for feed, part in zip(samples.feeds, feeds, strict=True):
        assert list(feed) == ["x"]
        np.testing.assert_array_equal(feed["x"], data[part])
    assert samples.origin == f"file {tmp_path / 'data.npz'}"
    assert samples.warning is None


def test_an_archive_in_fortran_order_and_of_the_other_byte_order(tmp_path: Path) -> None:
    data = numbers(5, 2, 3, 4)
    for other in (np.asfortranarray(data), data.astype(">f4")):
        samples = load_data(archive(tmp_path, x=other), BATCHES, count=100)
        np.testing.assert_array_equal(samples.feeds[3]["x"], data[3])
        assert samples.feeds[3]["x"].dtype == np.dtype("=f4")
        assert samples.feeds[3]["x"].flags.c_contiguous


def test_samples_that_fill_no_batch_are_told(tmp_path: Path) -> None:
    samples = load_data(archive(tmp_path, x=numbers(7, 3, 4)), BATCHES, count=100)
    assert len(samples) == 3
    assert samples.warning == "of the 7 samples of 'x' the last 1 fill no batch of 2"


def test_several_inputs_and_an_input_with_a_default(tmp_path: Path) -> None:
    pair = model(ids=("int", (1, 5)), mask=("float", (1, 5)), scale=("float", (1,)))
    tensor = ir.tensor(np.ones(1, np.float32), name="scale")
    pair.graph.inputs[2].const_value = tensor
    pair.graph.register_initializer(pair.graph.inputs[2])
    ids, mask = RNG.integers(0, 9, (4, 5)), numbers(4, 1, 5)
    samples = load_data(archive(tmp_path, mask=mask, ids=ids), pair, count=100)
    assert list(samples.feeds[2]) == ["ids", "mask"]
    np.testing.assert_array_equal(samples.feeds[2]["ids"], ids[2:3])
    np.testing.assert_array_equal(samples.feeds[2]["mask"], mask[2])


def test_a_folder_in_the_order_of_its_names(tmp_path: Path) -> None:
    data = {"b.npy": numbers(1, 3, 4), "a.npy": numbers(3, 4), "c.npz": numbers(1, 3, 4)}
    for name, array in data.items():
        if name.endswith(".npz"):
            np.savez(tmp_path / name, x=array)
        else:
            np.save(tmp_path / name, array)
    (tmp_path / "readme.txt").write_text("not data")
    (tmp_path / ".hidden.npy").write_text("not data")
    samples = load_data(str(tmp_path), PICTURES, count=100)
    assert len(samples) == 3
    for feed, name in zip(samples.feeds, sorted(data), strict=True):
        np.testing.assert_array_equal(feed["x"], data[name].reshape(1, 3, 4))
    assert samples.origin == f"folder {tmp_path}"


def test_a_folder_is_not_held_in_memory(tmp_path: Path) -> None:
    wide = model(x=("float", (1, 1 << 18)))
    for number in range(16):
        np.save(tmp_path / f"{number}.npy", np.full((1, 1 << 18), number, np.float32))
    tracemalloc.start()
    samples = load_data(str(tmp_path), wide, count=100)
    assert sum(float(feed["x"][0, 0]) for feed in samples.feeds) == sum(range(16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # a few of the 16 arrays of 1 MiB


def test_more_than_wanted_are_taken_at_equal_distances(tmp_path: Path) -> None:
    data = np.arange(100, dtype=np.float32).reshape(100, 1, 1, 1) * np.ones((1, 1, 3, 4), np.float32)
    samples = load_data(archive(tmp_path, x=data), PICTURES, count=4)
    assert [feed["x"].flat[0] for feed in samples.feeds] == [12, 37, 62, 87]


def test_split_leaves_nothing_in_common(tmp_path: Path) -> None:
    data = np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1) * np.ones((1, 1, 3, 4), np.float32)
    samples = load_data(archive(tmp_path, x=data), PICTURES, count=100)

    def seen(part: Samples) -> list[float]:
        return [float(feed["x"].flat[0]) for feed in part.feeds]

    calibration, evaluation = samples.split(2)
    assert (seen(calibration), seen(evaluation)) == ([0, 1, 3, 4, 5, 6, 8, 9], [2, 7])
    assert len({samples.digest, calibration.digest, evaluation.digest}) == 3
    assert calibration.origin.endswith("data.npz (calibration)")
    calibration, evaluation = samples.split(50)
    assert len(calibration) == len(evaluation) == 5
    assert not set(seen(calibration)) & set(seen(evaluation))
    with pytest.raises(UsageError, match="evaluation=0 must be at least 1"):
        samples.split(0)
    with pytest.raises(ModelError, match=r"has 1 calibration sample: at least 2 are needed"):
        load_data("random", PICTURES, count=1).split(1)


def test_a_digest_is_of_what_is_in_the_data(tmp_path: Path) -> None:
    data = numbers(4, 1, 3, 4)
    first = load_data(archive(tmp_path, x=data), PICTURES, count=100).digest
    assert load_data(archive(tmp_path, np.savez_compressed, x=data), PICTURES, count=100).digest == first
    assert load_data(archive(tmp_path, x=data), PICTURES, count=3).digest != first
    data[3, 0, 2, 3] += 1
    assert load_data(archive(tmp_path, x=data), PICTURES, count=100).digest != first


def test_data_of_other_types(tmp_path: Path) -> None:
    """See `feeds.conform`."""
    (feed,) = load_data(archive(tmp_path, x=np.full((1, 1, 3, 4), 255, np.uint8)), PICTURES, count=9).feeds
    assert feed["x"].dtype == np.float32
    assert (feed["x"] == 255).all()
    with pytest.raises(ModelError, match=r"data\.npz, sample 1: 'x' has 12 NaN or infinite"):
        load_data(archive(tmp_path, x=np.stack([np.ones((1, 3, 4)), np.full((1, 3, 4), np.nan)])), PICTURES, count=9)
    (tmp_path / "data.npz").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"data\.npz is no file of arrays, or damaged"):
        load_data(str(tmp_path / "data.npz"), PICTURES, count=9)


@pytest.mark.parametrize(
    ("given", "data", "words"),
    [
        (BATCHES, {"x": (2, 2, 3, 5)}, r"'x' has shape \(2, 2, 3, 5\) and must have \(S, 2, 3, 4\) or \(S·2, 3, 4\)"),
        (BATCHES, {"x": (4, 4, 3)}, r"'x' has shape \(4, 4, 3\) and must have"),
        (BATCHES, {"x": (3,)}, r"'x' has shape \(3,\) and must have"),
        (BATCHES, {"x": ()}, r"'x' has shape \(\) and must have"),
        (model(x=("float", ())), {"x": (2, 2)}, r"'x' has shape \(2, 2\) and must have \(S\), with"),
        (BATCHES, {"x": (0, 2, 3, 4)}, r"no calibration samples: 'x' has shape \(0, 2, 3, 4\), a feed \(2, 3, 4\)"),
        (BATCHES, {"x": (1, 3, 4)}, r"no calibration samples: 'x' has shape \(1, 3, 4\), a feed \(2, 3, 4\)"),
        (PAIR, {"ids": (2, 5)}, "has no array 'mask': the model's inputs are 'ids', 'mask', arrays 'ids'"),
        (PAIR, {}, "has no array 'ids': .* arrays none"),
        (PAIR, {"ids": (2, 5), "mask": (2, 5), "z": (2, 5)}, "has an array 'z': the model's inputs are 'ids', 'mask'"),
        (PAIR, {"ids": (2, 5), "mask": (3, 5)}, "has 2 of 'ids', 3 of 'mask': every input needs as many"),
    ],
)
def test_archives_that_do_not_fit(
    given: ir.Model, data: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    filled = {name: np.zeros(shape, np.int64 if name == "ids" else np.float32) for name, shape in data.items()}
    with pytest.raises(ModelError, match=words):
        load_data(archive(tmp_path, **filled), given, count=9)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    def refused(given: ir.Model, words: str) -> None:
        with pytest.raises(ModelError, match=words):
            load_data(str(tmp_path), given, count=9)

    refused(PICTURES, r"has no \.npy or \.npz files, but 0 other files")
    (tmp_path / "cat.JPG").touch()
    refused(PICTURES, r"1 pictures, such as cat\.JPG: prepare each as in training")
    np.save(tmp_path / "a.npy", numbers(3, 4))
    refused(PAIR, r"a\.npy is one array, and the model has the inputs 'ids', 'mask': give \.npz files")
    refused(BATCHES, r"a\.npy: 'x' has shape \(3, 4\) and must have \(2, 3, 4\)$")
    np.savez(tmp_path / "b.npz", y=numbers(3, 4))
    refused(PICTURES, r"b\.npz has no array 'x'")
    np.savez(tmp_path / "b.npz", x=numbers(2, 3, 4))
    refused(PICTURES, r"b\.npz: 'x' has shape \(2, 3, 4\) and must have \(1, 3, 4\) or, without its batch, \(3, 4\)")
    np.savez(tmp_path / "b.npz", x=np.full((3, 4), np.nan))
    refused(PICTURES, r"b\.npz: 'x' has 12 NaN or infinite")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for name, words in (("none.npz", "isn't there"), ("nowhere", "isn't there"), ("a.txt", "is neither")):
        (tmp_path / "a.txt").touch()
        with pytest.raises(ModelError, match=f"{name} {words}: give an .npz file, a folder of them, or random"):
            load_data(str(tmp_path / name), PICTURES, count=9)


def test_models_that_cannot_be_fed() -> None:
    with pytest.raises(ModelError, match=r"input 'x' has shape \[n,3\]: give its dimensions with --shape"):
        load_data("random", model(x=("float", ("n", 3))), count=9)
    with pytest.raises(ModelError, match="input 'x' is string"):
        load_data("random", model(x=("text", (1,))), count=9)
    with pytest.raises(ModelError, match="model 'nothing' has no inputs"):
        load_data("random", model(), count=9)
    with pytest.raises(UsageError, match="0 calibration samples are too few"):
        load_data("random", PICTURES, count=0)


def test_random_data_is_loud_and_depends_on_its_seed_alone() -> None:
    given = model(x=("float", (2, 500)), half=("half", (3,)), mask=("bool", (4,)), length=("int", (1,)))
    samples = load_data("random", given, count=5, seed=7)
    assert samples.warning == RANDOM_WARNING
    assert samples.origin == "random"
    assert len(samples) == 5
    feed = samples.feeds[3]
    assert {name: (array.shape, array.dtype.name) for name, array in feed.items()} == {
        "x": ((2, 500), "float32"),
        "half": ((3,), "float16"),
        "mask": ((4,), "bool"),
        "length": ((1,), "int64"),
    }
    assert abs(feed["x"].mean()) < 0.15
    assert 0.9 < feed["x"].std() < 1.1
    assert feed["mask"].all()
    assert feed["length"] == 1
    np.testing.assert_array_equal(samples.feeds[1:][2]["x"], feed["x"])
    assert (samples.feeds[2]["x"] != feed["x"]).all()
    again = load_data("random", given, count=5, seed=7)
    assert again.digest == samples.digest
    assert load_data("random", given, count=5, seed=8).digest != samples.digest


def test_inputs_that_no_memory_holds_get_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_memory", lambda: 95)
    with pytest.raises(
        ModelError, match=r"one feed of the model's inputs has 48 bytes, of 95 bytes of memory: it must be less"
    ):
        load_data("random", PICTURES, count=1)
    monkeypatch.setattr(loading, "_memory", lambda: 96)
    assert len(load_data("random", PICTURES, count=1)) == 1

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(loading.RandomFeeds, "feed", full)
    with pytest.raises(ModelError, match="has 48 bytes, of 96 bytes of memory"):
        load_data("random", PICTURES, count=1)
