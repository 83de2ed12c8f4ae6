"""GPU boards Tilewright knows without having one at hand, each figure with its source.

Units are those of `Device`: MHz, 1e9 bytes/s, TFLOP/s (TOP/s for int8), bytes. Rates are dense and accumulate in fp32
(int32 for int8); GeForce boards do fp16 and fp8 so at half the rate they advertise. A figure that NVIDIA does not
print is called derived in its row's `source`, which gives the arithmetic.

Hopper and B200 clock lower under tensor-core load than `boost_mhz`; their rows hold the published tensor rates, which
already count that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from tilewright.kernels.device import Device

_KIB = 1024
_MIB = 1024 * _KIB


@dataclass(frozen=True, slots=True)
class ArchLimits:
    """What every board of an arch has in common; the fields of `Device` of the same names."""

    shared_per_block: int
    shared_per_sm: int
    registers_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int


# CUDA Programming Guide, appendix "Compute Capabilities", table of technical specifications; the same numbers stand in
# CCCL's `cuda::arch_traits`. For sm_120 the Blackwell Tuning Guide says 128 KB and 32 blocks per SM instead; the driver
# of an RTX 5090 reports 100 KiB, as here.
ARCH_LIMITS: dict[int, ArchLimits] = {
    75: ArchLimits(64 * _KIB, 64 * _KIB, 65536, warps_per_sm=32, blocks_per_sm=16),
    80: ArchLimits(163 * _KIB, 164 * _KIB, 65536, warps_per_sm=64, blocks_per_sm=32),
    86: ArchLimits(99 * _KIB, 100 * _KIB, 65536, warps_per_sm=48, blocks_per_sm=16),
    89: ArchLimits(99 * _KIB, 100 * _KIB, 65536, warps_per_sm=48, blocks_per_sm=24),
    90: ArchLimits(227 * _KIB, 228 * _KIB, 65536, warps_per_sm=64, blocks_per_sm=32),
    100: ArchLimits(227 * _KIB, 228 * _KIB, 65536, warps_per_sm=64, blocks_per_sm=32),
    120: ArchLimits(99 * _KIB, 100 * _KIB, 65536, warps_per_sm=48, blocks_per_sm=24),
}

REFERENCE_BOARDS: dict[int, str] = {
    75: "t4",
    80: "a100",
    86: "rtx3090",
    89: "rtx4090",
    90: "h100",
    100: "b200",
    120: "rtx5090",
}
"""The board that an arch alone (`sm_86`) means."""

_NO_TENSOR_CORES = "Triton has no tensor-core path on sm_75: tl.dot becomes FMA and kernels run on CUDA cores"

_TURING = "NVIDIA Turing GPU Architecture whitepaper"
_A100 = "NVIDIA A100 Tensor Core GPU Architecture whitepaper, table 'Comparison of NVIDIA data center GPUs'"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper v2"
_ADA = "NVIDIA Ada GPU Architecture whitepaper v2"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, table 3"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper v1.1"


def _board(
    board: str,
    name: str,
    arch: int,
    *,
    sms: int,
    boost_mhz: int,
    bandwidth_gbs: float,
    memory_gib: float,  # the datasheet's nominal size, which counts 2^30 bytes whatever its unit says
    l2_bytes: int,
    fp32_tflops: float,
    tensor: Mapping[str, float],
    source: str,
    note: str = "",
    aliases: tuple[str, ...] = (),
) -> Device:
    return Device(
        board=board,
        name=name,
        arch=arch,
        sms=sms,
        boost_mhz=boost_mhz,
        bandwidth_gbs=bandwidth_gbs,
        memory_gib=memory_gib,
        l2_bytes=l2_bytes,
        fp32_tflops=fp32_tflops,
        tensor_tflops=dict(tensor),
        source=source,
        note=note,
        aliases=aliases,
        **asdict(ARCH_LIMITS[arch]),
    )


_A100_RATES = {"fp16": 312, "bf16": 312, "tf32": 156, "int8": 624}
_H100_RATES = {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "int8": 1978.9, "fp8": 1978.9}

# `name` is what the driver prints, for a live GPU is matched by it.
CATALOGUE: tuple[Device, ...] = (
    # sm_75, Turing
    _board(
        "t4",
        "Tesla T4",
        75,
        sms=40,
        boost_mhz=1590,
        bandwidth_gbs=320,
        memory_gib=16,
        l2_bytes=4 * _MIB,
        fp32_tflops=8.1,
        tensor={},
        source=f"{_TURING}, appendix on Tesla T4; NVIDIA T4 datasheet",
        note=_NO_TENSOR_CORES,
    ),
    _board(
        "rtx2080ti",
        "NVIDIA GeForce RTX 2080 Ti",
        75,
        sms=68,
        boost_mhz=1545,
        bandwidth_gbs=616,
        memory_gib=11,
        l2_bytes=5632 * _KIB,
        fp32_tflops=13.4,
        tensor={},
        source=f"{_TURING}, table comparing GeForce GTX 1080 Ti and RTX 2080 Ti, reference clocks",
        note=_NO_TENSOR_CORES,
        aliases=("2080ti",),
    ),
    # sm_80, Ampere in the data centre
    _board(
        "a100",
        "NVIDIA A100-SXM4-80GB",
        80,
        sms=108,
        boost_mhz=1410,
        bandwidth_gbs=2039,
        memory_gib=80,
        l2_bytes=40 * _MIB,
        fp32_tflops=19.5,
        tensor=_A100_RATES,
        source=f"{_A100}; memory: NVIDIA A100 80GB datasheet",
        aliases=("a100-80gb", "a100-sxm", "a100-sxm4", "a100-sxm-80gb"),
    ),
    _board(
        "a100-40gb",
        "NVIDIA A100-SXM4-40GB",
        80,
        sms=108,
        boost_mhz=1410,
        bandwidth_gbs=1555,
        memory_gib=40,
        l2_bytes=40 * _MIB,
        fp32_tflops=19.5,
        tensor=_A100_RATES,
        source=_A100,
        aliases=("a100-sxm-40gb",),
    ),
    _board(
        "a100-pcie",
        "NVIDIA A100 80GB PCIe",
        80,
        sms=108,
        boost_mhz=1410,
        bandwidth_gbs=1935,
        memory_gib=80,
        l2_bytes=40 * _MIB,
        fp32_tflops=19.5,
        tensor=_A100_RATES,
        source=f"NVIDIA A100 80GB datasheet, column A100 80GB PCIe; L2: {_A100}",
        aliases=("a100-pcie-80gb",),
    ),
    _board(
        "a30",
        "NVIDIA A30",
        80,
        sms=56,
        boost_mhz=1440,
        bandwidth_gbs=933,
        memory_gib=24,
        l2_bytes=24 * _MIB,
        fp32_tflops=10.3,
        tensor={"fp16": 165, "bf16": 165, "tf32": 82, "int8": 330},
        source="NVIDIA A30 datasheet; clocks: A30 product brief PB-10418; L2 from third-party listings, not in either",
    ),
    # sm_86, Ampere elsewhere. GA10x does 1024 dense FP16 FLOP per clock and SM; with fp32 accumulation GeForce boards
    # do half of that, the professional and data-centre ones all of it.
    _board(
        "rtx3090",
        "NVIDIA GeForce RTX 3090",
        86,
        sms=82,
        boost_mhz=1695,
        bandwidth_gbs=936,
        memory_gib=24,
        l2_bytes=6144 * _KIB,
        fp32_tflops=35.6,
        tensor={"fp16": 71.2, "bf16": 71.2, "tf32": 35.6, "int8": 284},
        source=f"{_GA102}, appendix A, GeForce RTX 3090; FP16, rounded there to 71, derived: 82 SMs x 1695 MHz x 512",
        aliases=("3090",),
    ),
    _board(
        "rtx3080",
        "NVIDIA GeForce RTX 3080",
        86,
        sms=68,
        boost_mhz=1710,
        bandwidth_gbs=760,
        memory_gib=10,
        l2_bytes=5120 * _KIB,
        fp32_tflops=29.8,
        tensor={"fp16": 59.5, "bf16": 59.5, "tf32": 29.8, "int8": 238},
        source=f"{_GA102}, table comparing GeForce RTX 3080 (10 GB) with RTX 2080 Super",
        aliases=("3080", "rtx3080-10gb"),
    ),
    _board(
        "rtx3070",
        "NVIDIA GeForce RTX 3070",
        86,
        sms=46,
        boost_mhz=1725,
        bandwidth_gbs=448,
        memory_gib=8,
        l2_bytes=4096 * _KIB,
        fp32_tflops=20.3,
        tensor={"fp16": 40.6, "bf16": 40.6, "tf32": 20.3, "int8": 162.6},
        source=f"{_GA102}, appendix A, GeForce RTX 3070",
        aliases=("3070",),
    ),
    _board(
        "rtx3060",
        "NVIDIA GeForce RTX 3060",
        86,
        sms=28,
        boost_mhz=1777,
        bandwidth_gbs=360,
        memory_gib=12,
        l2_bytes=2304 * _KIB,
        fp32_tflops=12.7,
        tensor={"fp16": 25.5, "bf16": 25.5, "tf32": 12.7, "int8": 101.9},
        source=(
            "NVIDIA product page of the GeForce RTX 3060 (12 GB); L2 as the driver reports it; rates derived from "
            "28 SMs x 1777 MHz x 256 (FP32, TF32), 512 (FP16), 2048 (INT8)"
        ),
        aliases=("3060", "rtx3060-12gb"),
    ),
    _board(
        "a10",
        "NVIDIA A10",
        86,
        sms=72,
        boost_mhz=1695,
        bandwidth_gbs=600,
        memory_gib=24,
        l2_bytes=6144 * _KIB,
        fp32_tflops=31.2,
        tensor={"fp16": 125, "bf16": 125, "tf32": 62.5, "int8": 250},
        source=f"NVIDIA A10 datasheet; clocks: A10 product brief; L2 of GA102: {_GA102}",
    ),
    _board(
        "a40",
        "NVIDIA A40",
        86,
        sms=84,
        boost_mhz=1740,
        bandwidth_gbs=696,
        memory_gib=48,
        l2_bytes=6144 * _KIB,
        fp32_tflops=37.4,
        tensor={"fp16": 149.7, "bf16": 149.7, "tf32": 74.8, "int8": 299.3},
        source=f"{_GA102}, table 3, NVIDIA A40; NVIDIA A40 datasheet",
    ),
    _board(
        "a6000",
        "NVIDIA RTX A6000",
        86,
        sms=84,
        boost_mhz=1800,
        bandwidth_gbs=768,
        memory_gib=48,
        l2_bytes=6144 * _KIB,
        fp32_tflops=38.7,
        tensor={"fp16": 154.8, "bf16": 154.8, "tf32": 77.4, "int8": 309.7},
        source=f"{_GA102}, table 3, NVIDIA RTX A6000",
    ),
    _board(
        "a4000",
        "NVIDIA RTX A4000",
        86,
        sms=48,
        boost_mhz=1560,
        bandwidth_gbs=448,
        memory_gib=16,
        l2_bytes=4096 * _KIB,
        fp32_tflops=19.2,
        tensor={"fp16": 76.7, "bf16": 76.7, "tf32": 38.3, "int8": 153.4},
        source=(
            "NVIDIA RTX A4000 datasheet (19.2 TFLOPS FP32; 153.4 TFLOPS tensor with sparsity, so 76.7 dense); boost "
            "clock derived from 19.2 TFLOPS / (48 SMs x 256), TF32 and INT8 from FP16 x 1/2 and x 2; L2 of GA104: "
            f"{_GA102}"
        ),
    ),
    # sm_89, Ada
    _board(
        "rtx4090",
        "NVIDIA GeForce RTX 4090",
        89,
        sms=128,
        boost_mhz=2520,
        bandwidth_gbs=1008,
        memory_gib=24,
        l2_bytes=73728 * _KIB,
        fp32_tflops=82.6,
        tensor={"fp16": 165.2, "bf16": 165.2, "tf32": 82.6, "int8": 660.6, "fp8": 330.3},
        source=f"{_ADA}, appendix A, GeForce RTX 4090",
        aliases=("4090",),
    ),
    _board(
        "l4",
        "NVIDIA L4",
        89,
        sms=58,
        boost_mhz=2040,
        bandwidth_gbs=300,
        memory_gib=24,
        l2_bytes=49152 * _KIB,
        fp32_tflops=30.3,
        tensor={"fp16": 121, "bf16": 121, "tf32": 60, "int8": 242.5, "fp8": 242.5},
        source=f"NVIDIA L4 datasheet, its rates with sparsity halved; SMs, clock and L2: {_ADA}, appendix on L4",
    ),
    _board(
        "l40s",
        "NVIDIA L40S",
        89,
        sms=142,
        boost_mhz=2520,
        bandwidth_gbs=864,
        memory_gib=48,
        l2_bytes=98304 * _KIB,
        fp32_tflops=91.6,
        tensor={"fp16": 362.05, "bf16": 362.05, "tf32": 183, "int8": 733, "fp8": 733},
        source=(
            f"NVIDIA L40S datasheet; L2 of AD102: {_ADA}; boost clock derived from 91.6 TFLOPS FP32 / (142 SMs x 256)"
        ),
    ),
    # sm_90, Hopper. Table 3 of the whitepaper gives two boost clocks, one of them for tensor-core work:
    # 1980 and 1830 MHz (SXM5), 1755 and 1620 MHz (PCIe).
    _board(
        "h100",
        "NVIDIA H100 80GB HBM3",
        90,
        sms=132,
        boost_mhz=1980,
        bandwidth_gbs=3350,
        memory_gib=80,
        l2_bytes=50 * _MIB,
        fp32_tflops=66.9,
        tensor=_H100_RATES,
        source=f"{_H100}, H100 SXM5, tensor rates at 1830 MHz; bandwidth: NVIDIA H100 datasheet",
        aliases=("h100-sxm", "h100-sxm5", "h100-80gb"),
    ),
    _board(
        "h100-pcie",
        "NVIDIA H100 PCIe",
        90,
        sms=114,
        boost_mhz=1755,
        bandwidth_gbs=2000,
        memory_gib=80,
        l2_bytes=50 * _MIB,
        fp32_tflops=51.2,
        tensor={"fp16": 756.5, "bf16": 756.5, "tf32": 378.2, "int8": 1513, "fp8": 1513},
        source=f"{_H100}, H100 PCIe, tensor rates at 1620 MHz",
    ),
    _board(
        "h200",
        "NVIDIA H200",
        90,
        sms=132,
        boost_mhz=1980,
        bandwidth_gbs=4800,
        memory_gib=141,
        l2_bytes=60 * _MIB,
        fp32_tflops=66.9,
        tensor=_H100_RATES,
        source=(
            f"NVIDIA H200 datasheet, column SXM; digits it rounds off: {_H100}, H100 SXM5, the same GPU; SMs, clock "
            "and L2 as the driver reports them"
        ),
        aliases=("h200-sxm", "h200-sxm5", "h200-141gb"),
    ),
    # sm_100, Blackwell in the data centre
    _board(
        "b200",
        "NVIDIA B200",
        100,
        sms=148,
        boost_mhz=1965,
        bandwidth_gbs=7700,
        memory_gib=180,
        l2_bytes=132_644_864,
        fp32_tflops=75,
        tensor={"fp16": 2250, "bf16": 2250, "tf32": 1125, "int8": 4500, "fp8": 4500},
        source=(
            "NVIDIA Blackwell datasheet, individual GPU of HGX B200, its rates with sparsity halved; TF32, rounded "
            "there to 1.1 PFLOPS, derived as half of FP16; SMs, clock and L2 as the driver reports them"
        ),
        aliases=("b200-sxm", "hgx-b200"),
    ),
    # sm_120, Blackwell elsewhere
    _board(
        "rtx5090",
        "NVIDIA GeForce RTX 5090",
        120,
        sms=170,
        boost_mhz=2407,
        bandwidth_gbs=1792,
        memory_gib=32,
        l2_bytes=98304 * _KIB,
        fp32_tflops=104.8,
        tensor={"fp16": 209.5, "bf16": 209.5, "tf32": 104.8, "int8": 838, "fp8": 419},
        source=f"{_RTX_BLACKWELL}, appendix A, GeForce RTX 5090",
        aliases=("5090",),
    ),
    _board(
        "rtxpro6000",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        120,
        sms=188,
        boost_mhz=2617,
        bandwidth_gbs=1792,
        memory_gib=96,
        l2_bytes=128 * _MIB,
        fp32_tflops=125,
        tensor={"fp16": 503.8, "bf16": 503.8, "tf32": 251.9, "int8": 1007.6, "fp8": 1007.6},
        source=(
            "NVIDIA RTX PRO 6000 Blackwell Workstation Edition datasheet; clock as the driver reports it; tensor rates "
            "derived from 188 SMs x 2617 MHz x 512 (TF32), 1024 (FP16), 2048 (FP8, INT8), in line with the datasheet's "
            "4000 sparse FP4 TOPS"
        ),
        aliases=("pro6000", "rtxpro6000-blackwell", "pro6000-blackwell"),
    ),
)


def supported_archs() -> str:
    """The archs of the catalogue, for a message."""
    return f"supported: {', '.join(f'sm_{arch}' for arch in REFERENCE_BOARDS)}"


def normalise(name: str) -> str:
    """A device name without what people write differently: case, separators, `NVIDIA GeForce` in front."""
    text = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(?:nvidia|geforce|tesla|quadro)+", "", text)
