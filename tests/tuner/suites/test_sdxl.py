from __future__ import annotations

import pytest

from tests.tuner.suites.totals import weights
from tilewright.tuner.suites import SUITES
from tilewright.tuner.suites.sdxl import unet, vae

pytestmark = pytest.mark.smoke


def test_the_unet_adds_up() -> None:
    # 2567 M parameters (Lee et al. 2023, arXiv:2312.04005, table 1; "2.6 B" in SDXL's own), of which some embed time
    # and size, and project that into each of the 17 residual blocks.
    embeddings = 1280 * (320 + 2 * 1280 + 2816) + 1280 * (5 * 320 + 5 * 640 + 7 * 1280)
    assert weights(unet(2)) + embeddings == pytest.approx(2567e6, rel=0.002)


def test_the_vae_adds_up() -> None:
    # 83.65 M parameters, as those of the autoencoder of Stable Diffusion, from which it differs in training only.
    layers = [
        workload
        for half in (vae(encoder=True), vae(encoder=False))
        for workload in half
        if not workload.name.endswith(("scores", "values"))  # products of two activations
    ]
    assert weights(layers) == pytest.approx(83.65e6, rel=0.002)


def test_what_is_listed() -> None:
    workloads = SUITES["sdxl"]
    whole = {workload.problem for workload in (*unet(2), *vae(encoder=False))}
    listed = {workload.problem for workload in workloads}
    # Every convolution and every attention of what runs for each image.
    assert {problem for problem in whole if problem.op != "gemm"} <= listed
    assert {w.problem for w in vae(encoder=True) if w.op == "conv2d"} <= listed
    assert len(listed) == len(workloads)
    attention = [w.problem.to_dict() for w in workloads if w.op == "attention"]
    assert [(p["B"], p["H"], p["Sq"], p["Skv"], p["D"]) for p in attention] == [
        (2, 10, 4096, 4096, 64),
        (2, 10, 4096, 77, 64),
        (2, 20, 1024, 1024, 64),
        (2, 20, 1024, 77, 64),
    ]
    # Table 1 of the paper: 0, 2 and 10 blocks at 2, 2 and 2 places on the way down, one in the middle, 3 on the way up.
    assert [w.count for w in workloads if w.op == "attention"] == [2 * 2 + 2 * 3, 2 * 2 + 2 * 3, 10 * 6, 10 * 6]
    gated = [w.problem.to_dict() for w in workloads if w.op == "gemm" and w.problem.to_dict()["gated"]]
    assert [(p["M"], p["K"], p["N"], p["activation"]) for p in gated] == [
        (8192, 640, 5120, "gelu_erf"),
        (2048, 1280, 10240, "gelu_erf"),
    ]
    # The encoder pads its strided convolutions on two sides.
    padded = [w.problem.to_dict() for w in workloads if "vae encoder" in w.name and " downsample" in w.name]
    assert [(p["pad_top"], p["pad_left"], p["pad_bottom"], p["pad_right"]) for p in padded] == 3 * [(0, 0, 1, 1)]
