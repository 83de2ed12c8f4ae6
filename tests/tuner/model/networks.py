"""The network of docs/models.md as files: small, and with every kind of layer that is fused but attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from examples.model import images, network


def written(folder: Path, batch: int | str = 2) -> tuple[Path, Path]:
    """The network and inputs for it."""
    model, data = folder / "network.onnx", folder / "images.npz"
    onnx.save(network(batch), model)
    np.savez(data, image=images(24))
    return model, data
