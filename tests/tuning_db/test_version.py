from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from tilewright.tuning_db import version
from tilewright.tuning_db.version import NOT_INSTALLED, installed_version


def test_it_is_the_distribution_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "version", {"tilewright": "0.7.1"}.__getitem__)
    assert installed_version() == "0.7.1"


def test_a_checkout_that_is_not_installed_has_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", absent)
    assert installed_version() == NOT_INSTALLED == "0+unknown"
