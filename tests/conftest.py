"""What holds for every test."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from hypothesis import settings

# The same examples on every run: a failure that comes and goes is no proof.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, None, None]:
    """Where tests run side by side: those of one file share what it sets up, and those
    with real engines are one group, begun first, because engines want cores of their own.

    A wrapper, because xdist reads the groups before any other hook."""
    items.sort(key=lambda item: not _runs_engines(item))
    for item in items:
        group = "engines" if _runs_engines(item) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    yield


def _runs_engines(item: pytest.Item) -> bool:
    return "e2e" in item.path.parts or item.get_closest_marker("e2e") is not None
