"""Structured images, made rather than stored: what the image models are seeded, calibrated and compared on.

White noise is no stand-in for photographs: filters average it away, so that every image looks the same to a deep layer.
What matters for statistics of activations is the spectrum of natural images, amplitude ~ 1 / frequency (D. J. Field,
"Relations between the statistics of natural images and the response properties of cortical cells", 1987), edges, and
that images differ from each other in brightness, colour and contrast. So an image is a background (a gradient or a
cloud of 1/f noise), one to six things on it (discs, boxes, blobs, gratings, checkers), each with colours of its own,
and 1/f noise over all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
"""Of ImageNet's red, green and blue in [0, 1]: the normalisation that torchvision's models ask for."""

BACKGROUNDS = ("gradient", "cloud")
THINGS = ("disc", "box", "blob", "grating", "checker")


def image(random: np.random.Generator, size: int) -> Array:
    """One such image, (1, 3, size, size) fp32, normalised as ImageNet's are: channel means near 0, standard deviations
    near 1."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    picture = background(random, x, y)
    for _ in range(random.integers(1, 7)):
        mask = thing(random, x, y)
        picture += mask * (colour(random) - picture)
    picture += random.uniform(0.02, 0.12) * cloud(random, size)
    exposed = random.uniform(0.7, 1.2) * (picture - 0.5) + random.uniform(0.35, 0.55)
    return ((np.clip(exposed, 0, 1) - MEAN[:, None, None]) / STD[:, None, None])[None].astype(np.float32)


def colour(random: np.random.Generator) -> Array:
    """(3, 1, 1): colours of photographs are mostly greys with a cast."""
    grey = random.uniform(0.05, 0.95) + (MEAN - MEAN.mean())[:, None, None]
    return np.asarray(np.clip(grey + random.normal(0, 0.15, (3, 1, 1)), 0, 1), np.float32)


def background(random: np.random.Generator, x: Array, y: Array) -> Array:
    """(3, size, size) in [0, 1]."""
    first, second = colour(random), colour(random)
    if random.choice(BACKGROUNDS) == "gradient":
        angle = random.uniform(0, 2 * math.pi)
        share = np.clip(0.5 + random.uniform(0.5, 1.5) * (math.cos(angle) * x + math.sin(angle) * y), 0, 1)
    else:
        share = 1 / (1 + np.exp(-1.5 * cloud(random, len(x))))
    return np.asarray(first + share * (second - first), np.float32)


def cloud(random: np.random.Generator, size: int) -> Array:
    """(size, size) noise of zero mean and unit variance whose amplitude falls as 1 / frequency."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = math.inf
    spectrum = np.fft.rfft2(random.standard_normal((size, size))) / frequency
    noise = np.fft.irfft2(spectrum, (size, size))
    return np.asarray(noise / noise.std(), np.float32)


def thing(random: np.random.Generator, x: Array, y: Array) -> Array:
    """How much of its colour each pixel takes, (size, size) in [0, 1]."""
    kind = random.choice(THINGS)
    angle = random.uniform(0, math.pi)
    u = math.cos(angle) * (x - random.uniform(-0.5, 0.5)) + math.sin(angle) * (y - random.uniform(-0.5, 0.5))
    v = math.cos(angle) * (y - random.uniform(-0.5, 0.5)) - math.sin(angle) * (x - random.uniform(-0.5, 0.5))
    width, height = random.uniform(0.08, 0.45, 2)
    if kind == "disc":
        mask = (u / width) ** 2 + (v / height) ** 2 < 1
    elif kind == "box":
        mask = (abs(u) < width) & (abs(v) < height)
    elif kind == "blob":
        mask = np.exp(-((u / width) ** 2) - (v / height) ** 2)
    else:
        frequency = random.uniform(3, 40)
        wave = np.sin(2 * math.pi * frequency * u)
        wave = 0.5 + 0.5 * wave if kind == "grating" else wave * np.sin(2 * math.pi * frequency * v) > 0
        mask = wave * (abs(u) < 2 * width) * (abs(v) < 2 * height)
    return np.asarray(random.uniform(0.4, 1) * mask, np.float32)
