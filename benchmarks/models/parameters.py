"""What a parameter of a model is to its layer, which is what seeding goes by."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """How a parameter gets its numbers."""

    CONSTANT = "constant"  # it has them: a shape, an epsilon, a table of cosines
    WEIGHT = "weight"  # of a Conv, Gemm or MatMul: He's normal distribution; its layer's output is brought to `std`
    NORMED = "normed weight"  # the same, but a BatchNormalization follows and brings the output to its own
    BIAS = "bias"  # normal, of `std` around `mean`
    GAIN = "gain"  # normal, of `std` around `mean`, and at least 0.1 of it
    MEAN = "mean"  # of a BatchNormalization's input, from the data
    VARIANCE = "variance"
    EMBEDDING = "embedding"  # normal, of `std`


@dataclass(frozen=True, slots=True)
class Parameter:
    """An initializer's part in its model.

    `std` and `mean` are of the numbers, but of a weight's they are of its layer's output; `axis` is that of a weight's
    outputs. `channels`: the output is brought there channel by channel, as a BatchNormalization would, each to a
    standard deviation that is off by `spread` of it, and not as a whole. `tuned`: a convolution's weights answer to
    what its input has. `outliers`: the share of a gain's channels that are much larger than the rest.
    """

    kind: Kind
    std: float = 1.0
    mean: float = 0.0
    axis: int = 0
    channels: bool = False
    tuned: bool = False
    spread: float = 0.0
    outliers: float = 0.0
