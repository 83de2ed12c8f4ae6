"""Tests run kernels in Triton's interpreter, unless `TRITON_INTERPRET=0` is set for those that compile or use a GPU."""

from __future__ import annotations

import os
import sys

import pytest

# Triton decides when it is imported, so this stands before every import of a test file.
if "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ:
    pytest.exit("triton was imported before tests/conftest.py could set TRITON_INTERPRET=1: set it yourself", 4)
os.environ.setdefault("TRITON_INTERPRET", "1")
