"""Tests that need a GPU; without one each is skipped with the reason.

They need no vLLM: where it is not installed, empty stand-ins let the connector's own modules
be loaded.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest

from kvstore.device.cuda import CudaDriver
from kvstore.device.cuda_vram import CudaVram
from kvstore.errors import DeviceError


class _StandIn(ModuleType):
    """A module, or package, that has every name: a class of no content."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "vllm":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "vllm.logger":
            module.init_logger = logging.getLogger  # type: ignore[attr-defined]


def stand_in_for_vllm() -> None:
    """In place of a vLLM that there may be, too."""
    sys.meta_path.insert(0, _StandIns())


if importlib.util.find_spec("vllm") is None:
    stand_in_for_vllm()


def pytest_configure(config: pytest.Config) -> None:
    # Also where the project's own settings are not read.
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped elsewhere")


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


@pytest.fixture
def vram(driver: CudaDriver) -> CudaVram:
    try:
        return CudaVram(driver)
    except DeviceError as error:
        pytest.skip(str(error))


def _engine_stream() -> int:
    import torch

    return int(torch.cuda.current_stream().cuda_stream)
