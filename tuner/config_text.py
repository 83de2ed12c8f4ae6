"""Configurations as people read them."""

from __future__ import annotations

from typing import Any

ABBREVIATIONS = {
    "BLOCK_M": "M",
    "BLOCK_N": "N",
    "BLOCK_K": "K",
    "GROUP_M": "group",
    "GROUP_H": "turns",
    "SPLIT_K": "split",
    "SPLIT_KV": "split",
    "PERSISTENT": "persistent",
    "WARP_SPECIALIZE": "specialised",
    "PACK": "packed",
    "OVERLAP": "overlapped",
    "FOLD": "folded",
    "ROWS": "rows",
    "num_warps": "warps",
    "num_stages": "stages",
}
ABSENT_AS_1 = ("SPLIT_K", "SPLIT_KV", "GROUP_M", "GROUP_H", "ROWS")
"""Choices that a 1 leaves out."""


def short_config(config: dict[str, Any] | None) -> str:
    """A configuration in a table's cell: `128×64×32 group 8 warps 4 stages 3`."""
    if config is None:
        return "-"
    tile = [str(config[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in config]
    rest = [
        ABBREVIATIONS.get(name, name) + ("" if value is True else f" {value}")
        for name, value in config.items()
        if not name.startswith("BLOCK_") and value is not False and not (value == 1 and name in ABSENT_AS_1)
    ]
    return " ".join(["×".join(tile), *rest])
