"""What the PTX of a warp-specialised kernel says about its barriers."""

from __future__ import annotations

import re

from tilewright.tuning_db.errors import CompileError

_BASE = re.compile(r"mov\.[bu]32\s+(%r\d+), global_smem;")
_SUM = re.compile(r"add\.[su]32\s+(%r\d+), (%r\d+), (\d+);")
_CONSTANT = re.compile(r"mov\.[bu]32\s+(%r\d+), (\d+);")
_MADE = re.compile(r"mbarrier\.init\S* \[(%r\d+)\]")
_USED = re.compile(r"mbarrier\.(?:try_wait|test_wait|arrive)[^\[;]*\[(%r\d+)\]")
_ENDED = re.compile(r"add\.u32 place, place, (%r\d+);\s*@first mbarrier\.inval")


def stale_barriers(ptx: str) -> tuple[int, ...]:
    """Offsets in shared memory of barriers that are initialised and never used, where operands come to lie, and that
    no `mbarrier.inval` ends before: their bits may appear among the operands'.

    Triton allots shared memory by size, operands before barriers: a barrier before all that are used is in an operand.

    Raises:
        CompileError: there are barriers, and the text is written in another way than Triton 3.6 to 3.9 writes it.
    """
    bases = set(_BASE.findall(ptx))
    offsets = dict.fromkeys(bases, 0)
    added: dict[str, int] = {}
    for register, other, text in _SUM.findall(ptx):
        added[register] = int(text)
        if other in bases:
            offsets[register] = int(text)
    used = [added[register] for register in _USED.findall(ptx) if register in added]
    constants = {register: int(text) for register, text in _CONSTANT.findall(ptx)}
    ended = {constants.get(register, -1) for register in _ENDED.findall(ptx)}
    registers = _MADE.findall(ptx)
    made = {offsets[register] for register in registers if register in offsets}
    if ptx.count("mbarrier.init") != len(registers) or len(registers) > 0 == len(used):
        raise CompileError("it can't be told which of the kernel's barriers are used: this Triton writes other PTX")
    if not made:
        return ()
    return tuple(sorted(offset for offset in made if offset < min(used) and offset not in ended))
