"""Barriers whose place operands take."""

from __future__ import annotations

import pytest

from tilewright.kernels.barriers import stale_barriers
from tilewright.tuning_db.errors import CompileError

PTX = """
    mov.b32 %r1, global_smem;
    add.s32 %r2, %r1, 4096;
    @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1;
    add.s32 %r3, %r1, 8;
    @%p1 mbarrier.init.shared::cta.b64 [%r3], 128;
    {ends}
    add.s32 %r9, %r8, 4096;
    mbarrier.try_wait.parity.shared.b64 complete, [%r9], %r7;
"""


def end(register, offset):
    return (
        f"mov.b32 {register}, {offset};\n{{ .reg .pred first;\n mov.u32 place, global_smem;\n add.u32 place, place, "
        f"{register};\n @first mbarrier.inval.shared::cta.b64 [place];\n mov.b32 %r12, %r13;\n}}"
    )


@pytest.mark.parametrize(
    ("ends", "stale"),
    [("", (0, 8)), (end("%r20", 0), (8,)), (end("%r20", 8) + end("%r21", 0), ()), (end("%r20", 16), (0, 8))],
)
def test_unused_barriers_among_the_operands_are_stale_until_they_end(ends, stale):
    assert stale_barriers(PTX.replace("{ends}", ends)) == stale


def test_barriers_behind_the_operands_are_in_nobodys_way():
    text = PTX.replace("[%r1]", "[%r2]").replace("%r1, 8;", "%r1, 4104;")
    assert stale_barriers(text.replace("{ends}", "")) == ()


@pytest.mark.parametrize("operation", ["try_wait.parity.shared::cta.b64 complete,", "arrive.expect_tx.shared.b64 _,"])
def test_a_barrier_that_is_used_is_found_by_every_use(operation):
    text = PTX.replace("try_wait.parity.shared.b64 complete,", operation)
    assert stale_barriers(text.replace("{ends}", "")) == (0, 8)


@pytest.mark.parametrize(
    "text",
    [
        PTX.replace("mbarrier.try_wait.parity", "mbarrier.wait"),
        PTX + "mbarrier.init.shared::cta.b64 [global_smem+8], 1;",
    ],
)
def test_what_can_not_be_told_is_an_error(text):
    with pytest.raises(CompileError, match="it can't be told which of the kernel's barriers are used"):
        stale_barriers(text.replace("{ends}", ""))


def test_a_kernel_without_barriers_has_none_that_are_stale():
    assert stale_barriers("mov.b32 %r1, global_smem;\nret;") == ()
