from __future__ import annotations

import numpy as np
import pytest

from benchmarks.models import samples
from benchmarks.models.architecture import TRANSFORMERS
from benchmarks.models.images import cloud, image


def test_samples_repeat_and_seeds_have_nothing_in_common() -> None:
    for name in ("resnet50", *(f"{family}_opset17" for family in TRANSFORMERS)):
        first, again, other = samples(name, 3, 1), samples(name, 2, 1), samples(name, 3, 2)
        for one, two in zip(first, again, strict=False):
            assert all(np.array_equal(one[key], two[key]) for key in one)
        key = next(iter(first[0]))
        drawn = {feed[key].tobytes() for feed in (*first, *other)}
        assert len(drawn) == 6


def test_images_are_normalised_and_have_the_spectrum_of_photographs() -> None:
    stack = np.concatenate([image(np.random.default_rng([0, index]), 224) for index in range(24)])
    assert stack.shape == (24, 3, 224, 224)
    assert stack.dtype == np.float32
    assert abs(stack.mean((0, 2, 3))).max() < 0.4
    assert stack.std((0, 2, 3)).min() > 0.6
    assert stack.std((0, 2, 3)).max() < 1.4
    assert stack.mean((1, 2, 3)).std() > 0.2  # they differ in brightness
    amplitude = np.abs(np.fft.fft2(stack)).mean((0, 1))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(224), np.fft.fftfreq(224)))
    near = (frequency > 0.02) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[near]), np.log(amplitude[near]), 1)[0]
    assert -1.6 < slope < -0.7


def test_noise_of_the_clouds_falls_as_one_over_frequency() -> None:
    noise = np.stack([cloud(np.random.default_rng(index), 128) for index in range(40)])
    amplitude = np.sqrt((np.abs(np.fft.fft2(noise)) ** 2).mean(0))
    assert amplitude[0, 4] / amplitude[0, 32] == pytest.approx(8, rel=0.3)
    assert noise.std((1, 2)) == pytest.approx(np.ones(40), abs=1e-3)


def test_tokens_are_as_frequent_as_words() -> None:
    feeds = samples("gpt_opset17", 200, 1, small=True)
    ids = np.concatenate([feed["input_ids"].ravel() for feed in feeds])
    size = TRANSFORMERS["gpt"].small
    assert ids.min() >= 1
    assert ids.max() < size.vocabulary
    counts = np.bincount(ids, minlength=size.vocabulary)[1:]
    weights = 1 / (np.arange(size.vocabulary - 1) + 2.7)
    expected = weights / weights.sum() * len(ids)
    assert counts[0] == pytest.approx(expected[0], rel=0.25)
    assert counts[:10].sum() == pytest.approx(expected[:10].sum(), rel=0.1)
    assert counts[100:].sum() == pytest.approx(expected[100:].sum(), rel=0.1)
