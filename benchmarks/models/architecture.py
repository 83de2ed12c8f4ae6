"""The list of architectures, and how each is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from benchmarks.models import light
from benchmarks.models.images import image
from benchmarks.models.layers import DECOMPOSED, OPERATORS
from benchmarks.models.operators import Array
from benchmarks.models.parameters import Parameter
from benchmarks.models.seeding import SAMPLES, put_parameters, seed_parameters
from benchmarks.models.tokens import decoder_feed, encoder_feed
from benchmarks.models.transformers import DecoderSize, EncoderSize, VisionSize, decoder, encoder, vision
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.errors import UsageError

SEEDING = 2**31
"""Added to the seed of the inputs that seeding takes statistics over, so that they are none of `samples`'s."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model by name, without its numbers."""

    name: str
    family: str  # "light", or the transformer that it is one of the two dialects of
    opset: int
    logits: str  # the value to look at: what a final Softmax takes, or the output of a model that ends without one


@dataclass(frozen=True, slots=True)
class Transformer:
    """What a family of transformers is made by."""

    graph: Callable[[Any, int], tuple[ir.Model, dict[str, Parameter]]]
    feed: Callable[[np.random.Generator, Any], dict[str, Array]]
    full: Any
    small: Any

    def size(self, small: bool) -> Any:
        """The numbers of the full or the small one."""
        return self.small if small else self.full


def vision_feed(random: np.random.Generator, size: VisionSize) -> dict[str, Array]:
    """One image."""
    return {"pixel_values": image(random, size.image)}


TRANSFORMERS = {
    "bert": Transformer(encoder, encoder_feed, EncoderSize(), EncoderSize(2, 64, 4, 256, 32, 512, 40)),
    # The small one's query heads share key heads by two.
    "gpt": Transformer(decoder, decoder_feed, DecoderSize(), DecoderSize(2, 64, 4, 2, 128, 16, 16, 512)),
    "vit": Transformer(vision, vision_feed, VisionSize(), VisionSize(2, 64, 4, 256, 64, 16, 40)),
}

ARCHITECTURES: tuple[Architecture, ...] = (
    *(Architecture(name, "light", light.OPSET, logits) for name, logits in light.LOGITS.items()),
    *(
        Architecture(f"{family}_opset{opset}", family, opset, "logits")
        for family in TRANSFORMERS
        for opset in (DECOMPOSED, OPERATORS)
    ),
)


def architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        UsageError: there is none.
    """
    for known in ARCHITECTURES:
        if known.name == name:
            return known
    raise UsageError(f"no architecture {name!r}: there are {', '.join(known.name for known in ARCHITECTURES)}")


def blank(
    known: Architecture, *, small: bool = False, opset: int | None = None
) -> tuple[ir.Model, dict[str, Parameter]]:
    """The graph without its numbers, and what each parameter is. `opset`: of the other dialect."""
    if known.family == "light":
        return light.read(known.name, small=small)
    transformer = TRANSFORMERS[known.family]
    return transformer.graph(transformer.size(small), opset or known.opset)


def build_ir(name: str, *, seed: int = 0, small: bool = False) -> ir.Model:
    """An architecture with numbers that follow from `seed`; see `benchmarks.models.seeding` for which.

    `small`: with an eighth of the channels (half in ShuffleNet), or two layers of width 64: for tests. The two dialects
    of a transformer have the same numbers, which are found in the decomposed one.

    Raises:
        UsageError: there is no architecture of that name.
    """
    known = architecture(name)
    feeds = samples(name, SAMPLES, seed + SEEDING, small=small)
    model, parameters = blank(known, small=small, opset=DECOMPOSED)
    arrays = seed_parameters(model, parameters, feeds, seed)
    if known.opset == OPERATORS:
        model, _ = blank(known, small=small)
        put_parameters(model, arrays)
    return model


def build(name: str, *, seed: int = 0, small: bool = False) -> onnx.ModelProto:
    """`build_ir` as a protocol buffer: fp32, batch 1, static shapes, weights inside.

    Raises:
        UsageError: there is no architecture of that name.
    """
    return ir.to_proto(build_ir(name, seed=seed, small=small))


def write(name: str, folder: Path, *, seed: int = 0, small: bool = False) -> Path:
    """`build` as the file `<folder>/<name>.onnx`, whose path is returned.

    Raises:
        UsageError: there is no architecture of that name, or the folder can't be written.
    """
    path = folder / f"{name}.onnx"
    data = build(name, seed=seed, small=small).SerializeToString()
    with whole_file(path) as stream:
        stream.write(data)
    return path


def samples(name: str, count: int, seed: int = 0, *, small: bool = False) -> list[dict[str, Array]]:
    """Inputs for an architecture, `small` as it was built: feeds by input name. Feed i follows from `seed` and i alone,
    and those of different seeds have nothing in common, nor with what `build` takes its statistics over.

    Raises:
        UsageError: there is no architecture of that name.
    """
    known = architecture(name)
    randoms = [np.random.default_rng([seed, index]) for index in range(count)]
    if known.family == "light":
        data = light.data_input(name)
        return [{data: image(random, light.SIZE)} for random in randoms]
    transformer = TRANSFORMERS[known.family]
    return [transformer.feed(random, transformer.size(small)) for random in randoms]
