"""Tests that need a GPU; without one each is skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.device.cuda import CudaDriver
from kvstore.errors import DeviceError


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            # What CuPy and torch warn of is theirs.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def torch() -> Any:
    return pytest.importorskip("torch", reason="there is no torch")


@pytest.fixture(scope="session")
def driver() -> Iterator[CudaDriver]:
    try:
        yield CudaDriver(0, _engine_stream)
    except DeviceError as error:
        pytest.skip(str(error))


def _engine_stream() -> int:
    import torch

    return int(torch.cuda.current_stream().cuda_stream)
