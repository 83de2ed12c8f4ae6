"""Which Tilewright this is, as records, packs and benchmarks name it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

NOT_INSTALLED = "0+unknown"
"""The version of a checkout on the path of imports, which no metadata tell: in the form of PEP 440, and before all that
were released."""


def installed_version() -> str:
    """The version of the installed distribution, as `0.1.0`; `NOT_INSTALLED` where there is none."""
    try:
        return version("tilewright")
    except PackageNotFoundError:
        return NOT_INSTALLED
