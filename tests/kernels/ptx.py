"""Inline PTX of the kernels, run on numbers: the few instructions that unpack weights, as the PTX ISA defines them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import ml_dtypes
import numpy as np

WORD = 0xFFFFFFFF


def run(text: str, inputs: Sequence[int], outputs: int) -> list[int]:
    """The words that a block of inline assembler leaves in `$0` and on, for words in the operands after those."""
    registers = {f"${index}": 0 for index in range(outputs)}
    registers |= {f"${outputs + index}": word for index, word in enumerate(inputs)}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in re.findall(r"[^{};]+", text):
        name, *operands = line.replace(",", " ").split() or [""]
        if not name or name == ".reg":
            continue
        target, sources = operands[0], [value(operand) for operand in operands[1:]]
        registers[target] = execute(name, sources) & WORD
    return [registers[f"${index}"] for index in range(outputs)]


def execute(name: str, sources: Sequence[int]) -> int:
    """One instruction."""
    if name == "mov.b32":
        return sources[0]
    if name == "and.b32":
        return sources[0] & sources[1]
    if name == "xor.b32":
        return sources[0] ^ sources[1]
    if name == "shr.u32":
        return sources[0] >> sources[1]
    if name == "prmt.b32":
        data = sources[0].to_bytes(4, "little") + sources[1].to_bytes(4, "little")
        return int.from_bytes([data[sources[2] >> 4 * place & 7] for place in range(4)], "little")
    kinds = {"fma.rn.f16x2": np.float16, "fma.rn.bf16x2": ml_dtypes.bfloat16}
    a, b, c = (halves(word, kinds[name]).astype(np.float64) for word in sources)
    return word_of((a * b + c).astype(kinds[name]))  # exact in fp64, so that it is rounded once


def halves(word: int, kind: type) -> np.ndarray:
    """Both halves of a word, the lower one first, as numbers of 16 bits."""
    return np.frombuffer(word.to_bytes(4, "little"), kind)


def word_of(pair: np.ndarray) -> int:
    """The word of two numbers of 16 bits."""
    return int.from_bytes(pair.tobytes(), "little")
