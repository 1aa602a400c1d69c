"""The order of the tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow ones first, so that no worker is left with one when the others have finished."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
