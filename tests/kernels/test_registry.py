from __future__ import annotations

from typing import Any

import pytest

from tilewright.kernels.registry import KERNELS, find_kernel
from tilewright.tuning_db.errors import UnknownKernelError, UsageError

pytestmark = pytest.mark.smoke


def test_every_kernel_is_found_by_its_name() -> None:
    assert [find_kernel(kernel.name) for kernel in KERNELS] == list(KERNELS)
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)


def test_a_kernel_goes_by_the_name_of_its_problems() -> None:
    for kernel in KERNELS:
        assert kernel.problem.op == kernel.name


def test_an_unknown_kernel_names_the_nearest() -> None:
    known = rf"\(ops: {', '.join(kernel.name for kernel in KERNELS)}\)"
    with pytest.raises(UnknownKernelError, match=rf"unknown op 'gem'; did you mean gemm\? {known}"):
        find_kernel("gem")
    with pytest.raises(UnknownKernelError, match=r"unknown op 'zzz' \(ops"):
        find_kernel("zzz")


@pytest.mark.parametrize("name", [3, None, b"gemm"])
def test_what_is_no_text_is_no_kernels_name(name: Any) -> None:
    with pytest.raises(UsageError, match=r"^name=.* must be the name of an op: gemm, conv2d, attention, rmsnorm$"):
        find_kernel(name)
