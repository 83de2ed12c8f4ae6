from __future__ import annotations

from tilewright import kernels


def test_it_lists_its_public_names() -> None:
    listed = dir(kernels)
    assert [name for name in listed if not name.startswith("__")] == sorted(kernels.__all__)
    assert {"__doc__", "__file__", "__all__"} <= set(listed)
