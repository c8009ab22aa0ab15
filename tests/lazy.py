"""Modules that are imported when a test first uses them.

Every worker imports every test file. These modules take seconds, and most tests need none of them.
"""
from typing import Any

import pytest


class LazyModule:
    """A module by its name. A test that uses it is skipped if it is not installed."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):       # pytest reads some of these of every name in a file
            raise AttributeError(attribute)
        return getattr(pytest.importorskip(self.name), attribute)
