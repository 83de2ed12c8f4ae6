# mypy: ignore-errors
"""The main loop over weights of int8 or packed int4, under activations of fp16 or bf16."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.ops.gemm.mainloop import load_tile, multiply, tile_pointers, zeros


@triton.jit
def low_nibbles(q, zero, kind: tl.constexpr):
    """(q & 15) - zero of packed int4, exact, as `kind`.

    With n in its low bits 1024 in fp16, or 128 in bf16, is 1024 + n: bitwise operations and one subtraction for two
    weights at once, where a conversion of each would take one of 16 results a cycle and SM (CUDA C++ Programming Guide,
    "Arithmetic Instructions").
    """
    if kind == tl.float16:
        w = ((q.to(tl.uint16) | 0x6400) & 0x640F).to(tl.float16, bitcast=True) - (zero + 1024.0).to(tl.float16)
    else:
        w = ((q.to(tl.uint16) | 0x4300) & 0x430F).to(tl.bfloat16, bitcast=True) - (zero + 128.0).to(tl.bfloat16)
    return w


@triton.jit
def high_nibbles(q, zero, kind: tl.constexpr):
    """(q >> 4) - zero of packed int4, exact, as `kind`."""
    if kind == tl.float16:
        # Left where they are, the nibbles make 1024 + 16·n: a factor in the same instruction does for the shift. bf16
        # has no room for them there.
        w = ((q.to(tl.uint16) | 0x6400) & 0x64F0).to(tl.float16, bitcast=True) * 0.0625 - (zero + 64.0).to(tl.float16)
    else:
        w = ((q.to(tl.uint16) >> 4) | 0x4300).to(tl.bfloat16, bitcast=True) - (zero + 128.0).to(tl.bfloat16)
    return w


# Two weights at a time, in the halves of a register: `$4` is four bytes of packed weights, `$5` and `$6` what is added
# to four weights, -(1024 + zero) in fp16 or -(128 + zero) in bf16. `prmt` puts each byte under that of 1024.0 (0x64) or
# 128.0 (0x43), and what `and` leaves of it is the weight in the lowest bits of the mantissa: 13 instructions for eight
# weights, where the compiler, which sees single bytes, takes 27 to 38.
_PAIRS = """{
.reg .b32 h, t, one;
shr.u32 h, $4, 4;
mov.b32 one, ONE;
prmt.b32 t, $4, BASE, 0x4140;
and.b32 t, t, MASK;
fma.rn.KINDx2 $0, t, one, $5;
prmt.b32 t, $4, BASE, 0x4342;
and.b32 t, t, MASK;
fma.rn.KINDx2 $1, t, one, $6;
prmt.b32 t, h, BASE, 0x4140;
and.b32 t, t, MASK;
fma.rn.KINDx2 $2, t, one, $5;
prmt.b32 t, h, BASE, 0x4342;
and.b32 t, t, MASK;
fma.rn.KINDx2 $3, t, one, $6;
}"""


def _pairs(kind: str, one: str, base: str, mask: str) -> tl.constexpr:
    text = _PAIRS
    for word, value in (("KIND", kind), ("ONE", one), ("BASE", base), ("MASK", mask)):
        text = text.replace(word, value)
    return tl.constexpr(text)


FP16_PAIRS: tl.constexpr = _pairs("f16", "0x3C003C00", "0x64646464", "0x640F640F")
BF16_PAIRS: tl.constexpr = _pairs("bf16", "0x3F803F80", "0x43434343", "0x430F430F")

# Four weights of int8: `$2` is their bytes, `$3` and `$4` what is added to two each, -(1152 + zero). In fp16 a byte,
# its sign turned, under that of 1024.0 is 1024 + 128 + the weight: 5 instructions for four.
FP16_BYTES: tl.constexpr = tl.constexpr("""{
.reg .b32 u, t, one;
xor.b32 u, $2, 0x80808080;
mov.b32 one, 0x3C003C00;
prmt.b32 t, u, 0x64646464, 0x4140;
fma.rn.f16x2 $0, t, one, $3;
prmt.b32 t, u, 0x64646464, 0x4342;
fma.rn.f16x2 $1, t, one, $4;
}""")

# bf16 has room for seven bits under 128.0 (0x43): the eighth, the weight's sign, falls on the last bit of the exponent.
# Without that bit it is 128.0 and the seven bits; without those 128.0, or of a negative weight 256.0. The weight is the
# difference of the two: 8 instructions for four, and 2 for zero points.
BF16_BYTES: tl.constexpr = tl.constexpr("""{
.reg .b32 l, h, a, b, minus;
mov.b32 minus, 0xBF80BF80;
prmt.b32 l, $2, 0x43434343, 0x4140;
prmt.b32 h, $2, 0x43434343, 0x4342;
and.b32 a, l, 0xFF7FFF7F;
and.b32 b, l, 0xFF80FF80;
fma.rn.bf16x2 $0, b, minus, a;
and.b32 a, h, 0xFF7FFF7F;
and.b32 b, h, 0xFF80FF80;
fma.rn.bf16x2 $1, b, minus, a;
}""")


@triton.jit
def nibble_pairs(q, zero, kind: tl.constexpr):
    """(q & 15) - zero and (q >> 4) - zero of packed int4, exact, as `kind`: the same values as `low_nibbles` and
    `high_nibbles`, by inline PTX (sm_80 on)."""
    if kind == tl.float16:
        offset = (-1024.0 - zero).to(tl.float16)
        low, high = tl.inline_asm_elementwise(
            FP16_PAIRS, "=r,=r,=r,=r,r,r,r", [q, tl.broadcast_to(offset, q.shape)], (tl.float16, tl.float16), True, 4
        )
    else:
        offset = (-128.0 - zero).to(tl.bfloat16)
        low, high = tl.inline_asm_elementwise(
            BF16_PAIRS, "=r,=r,=r,=r,r,r,r", [q, tl.broadcast_to(offset, q.shape)], (tl.bfloat16, tl.bfloat16), True, 4
        )
    return low, high


@triton.jit
def byte_pairs(q, zero, kind: tl.constexpr):
    """q - zero of int8, exact, as `kind`, by inline PTX (sm_80 on)."""
    if kind == tl.float16:
        offset = tl.broadcast_to((-1152.0 - zero).to(tl.float16), q.shape)
        w = tl.inline_asm_elementwise(FP16_BYTES, "=r,=r,r,r,r", [q, offset], tl.float16, True, 4)
    else:
        w = tl.inline_asm_elementwise(BF16_BYTES, "=r,=r,r", [q], tl.bfloat16, True, 4) - zero.to(tl.bfloat16)
    return w


@triton.jit
def whole_bytes(q, zero, kind: tl.constexpr):
    """q - zero of int8, exact, as `kind`: from -255 to 255, which bf16 holds."""
    if kind == tl.float16:
        unsigned = q.to(tl.uint8, bitcast=True) ^ 0x80
        w = (unsigned.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (zero + 1152.0).to(tl.float16)
    else:
        w = q.to(tl.bfloat16) - zero.to(tl.bfloat16)
    return w


@triton.jit
def row_of(base, row, N, offsets_n, mask_n):
    """A row of an array (rows, N), in fp32."""
    return tl.load(base + row.to(tl.int64) * N + offsets_n, mask=mask_n, other=0.0).to(tl.float32)


@triton.jit
def group_of_block(
    scale_base,
    zero_base,
    block,
    K,
    N,
    offsets_n,
    mask_n,
    INT4: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scales and zero points, in fp32, of the group that a K block is in; beyond K, of the last."""
    row = block * 0
    if GROUP_SIZE > 0:
        row = tl.minimum(block * BLOCK_K // GROUP_SIZE, tl.cdiv(K, GROUP_SIZE) - 1)
    if zero_base is None:
        zero = tl.full((COLUMNS,), 8.0 if INT4 else 0.0, tl.float32)
    else:
        zero = row_of(zero_base, row, N, offsets_n, mask_n)
    # Without groups the scale is not read.
    scale = row_of(scale_base, row, N, offsets_n, mask_n) if GROUP_SIZE > 0 else zero
    return scale, zero


@triton.jit
def add_products(x, a, high, q, scale, zero, INT4: tl.constexpr, SCALED: tl.constexpr, PAIRS: tl.constexpr):
    """x + scale · (A·(q - zero)) of one K block; `high` is the part of A under the high nibbles of int4."""
    kind: tl.constexpr = a.dtype
    TRANSPOSED: tl.constexpr = a.shape[0] < 16
    # Groups are summed apart and scaled in fp32, where scaled weights would be rounded to 11 bits (bf16: 8) each. A
    # block has BLOCK_M·BLOCK_N sums to scale or BLOCK_K·BLOCK_N weights: for few rows this is the cheaper way too.
    total = tl.zeros(x.shape, dtype=tl.float32) if SCALED else x
    if PAIRS and not INT4:
        total = multiply(a, byte_pairs(q, zero[None, :], kind), total, None, 0)
    elif PAIRS:
        low_weights, high_weights = nibble_pairs(q, zero[None, :], kind)
        total = multiply(a, low_weights, total, None, 0)
        total = multiply(high, high_weights, total, None, 0)
    elif INT4:
        total = multiply(a, low_nibbles(q, zero[None, :], kind), total, None, 0)
        total = multiply(high, high_nibbles(q, zero[None, :], kind), total, None, 0)
    else:
        total = multiply(a, whole_bytes(q, zero[None, :], kind), total, None, 0)
    if SCALED:
        total = x + total * (scale[:, None] if TRANSPOSED else scale[None, :])
    return total


@triton.jit
def weight_sums(
    a_base,
    b_base,
    scale_base,  # (K / GROUP_SIZE, N), or None for GROUP_SIZE = 0
    zero_base,  # (K / GROUP_SIZE, N), for GROUP_SIZE = 0 (1, N), or None
    a_ld,
    b_ld,
    offsets_m,
    offsets_n,
    end_m,
    end_n,
    K,
    N,
    first,
    last,
    INT4: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # rows of B that share a scale, a multiple of BLOCK_K; 0: all of them
    A_COLUMN_MAJOR: tl.constexpr,
    B_COLUMN_MAJOR: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    HALVES: tl.constexpr,
    PAIRS: tl.constexpr,  # weights are unpacked by inline PTX
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A·(scale · (q - zero)) of K blocks `first` to `last`, for GROUP_SIZE = 0 without the scale; with HALVES also that
    of the columns `end_n` further on."""
    # Byte r of a run of 16 holds weights r and 16 + r of a run of 32: the low nibbles of a packed tile are rows
    # `offsets_k` of B, the high ones those 16 further on. Both meet contiguous pieces of A, and no weight changes
    # threads on its way from the byte to the dot.
    PER_BYTE: tl.constexpr = 2 if INT4 else 1
    held = tl.arange(0, BLOCK_K // PER_BYTE)
    offsets_k = first * BLOCK_K + (held // 16 * (16 * PER_BYTE) + held % 16)
    rows_b = first * (BLOCK_K // PER_BYTE) + held
    end_b = tl.cdiv(K, 32) * 16 if INT4 else K
    a_pointers = tile_pointers(a_base, offsets_m, offsets_k, a_ld, A_COLUMN_MAJOR)
    b_pointers = tile_pointers(b_base, rows_b, offsets_n, b_ld, B_COLUMN_MAJOR)
    a_step = BLOCK_K * a_ld if A_COLUMN_MAJOR else BLOCK_K
    a_high = 16 * a_ld if A_COLUMN_MAJOR else 16
    b_step = BLOCK_K // PER_BYTE if B_COLUMN_MAJOR else BLOCK_K // PER_BYTE * b_ld
    up = end_n * b_ld if B_COLUMN_MAJOR else end_n.to(tl.int64)
    mask_m = offsets_m[:, None] < end_m
    mask_n = offsets_n < end_n
    x = zeros(BLOCK_M, COLUMNS, False)
    second = x
    scale, zero = group_of_block(
        scale_base, zero_base, first, K, N, offsets_n, mask_n, INT4, GROUP_SIZE, COLUMNS, BLOCK_K
    )
    second_scale, second_zero = scale, zero
    if HALVES:
        second_scale, second_zero = group_of_block(
            scale_base, zero_base, first, K, N, offsets_n + end_n, mask_n, INT4, GROUP_SIZE, COLUMNS, BLOCK_K
        )
    for block in range(first, last):
        a = load_tile(a_pointers, mask_m, offsets_k[None, :] < K, EVEN_M, EVEN_K)
        high = a
        if INT4:
            high = load_tile(a_pointers + a_high, mask_m, offsets_k[None, :] + 16 < K, EVEN_M, EVEN_K)
        q = load_tile(b_pointers, rows_b[:, None] < end_b, mask_n[None, :], EVEN_K, EVEN_N)
        # Asked for an iteration ahead: Triton's copy pipeline takes only what the dots read.
        next_scale, next_zero = group_of_block(
            scale_base, zero_base, block + 1, K, N, offsets_n, mask_n, INT4, GROUP_SIZE, COLUMNS, BLOCK_K
        )
        x = add_products(x, a, high, q, scale, zero, INT4, GROUP_SIZE > 0, PAIRS)
        if GROUP_SIZE > 0:
            scale, zero = next_scale, next_zero
        if HALVES:
            q = load_tile(b_pointers + up, rows_b[:, None] < end_b, mask_n[None, :], EVEN_K, EVEN_N)
            next_scale, next_zero = group_of_block(
                scale_base, zero_base, block + 1, K, N, offsets_n + end_n, mask_n, INT4, GROUP_SIZE, COLUMNS, BLOCK_K
            )
            second = add_products(second, a, high, q, second_scale, second_zero, INT4, GROUP_SIZE > 0, PAIRS)
            if GROUP_SIZE > 0:
                second_scale, second_zero = next_scale, next_zero
        a_pointers += a_step
        b_pointers += b_step
        offsets_k += BLOCK_K
        rows_b += BLOCK_K // PER_BYTE
    return x, second
