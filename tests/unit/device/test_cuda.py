"""What a machine without a usable GPU says, through CuPy's own error codes.

The libraries are stand-ins: this shows which error becomes which, and that calls are made
for the right device, not that CUDA takes them.
"""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvstore.device import cuda
from kvstore.errors import DeviceError, DeviceFull, DeviceLost, DriverTooOld, NoDevice


class CUDAError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class Libraries:
    """CuPy and cuda-bindings on a machine with one GPU. `fails`: call -> status."""

    def __init__(self) -> None:
        self.version = 13000
        self.batch = 0
        """Where cuMemcpyBatchAsync is."""
        self.fails: dict[str, int] = {}
        self.modes: list[object] = ["global"]
        self.calls: list[str] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cupy, bindings = ModuleType("cupy"), ModuleType("cuda.bindings")
        cupy.cuda = SimpleNamespace(  # type: ignore[attr-defined]
            runtime=Runtime(self),
            driver=SimpleNamespace(CUDADriverError=CUDAError),
            compiler=SimpleNamespace(CompileException=RuntimeError),
            Stream=lambda non_blocking: SimpleNamespace(ptr=5),
            Event=lambda block, disable_timing: SimpleNamespace(ptr=7),
        )
        cupy.RawModule = lambda **_: SimpleNamespace(get_function=lambda name: name)  # type: ignore[attr-defined]
        relaxed = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")
        bindings.driver = SimpleNamespace(  # type: ignore[attr-defined]
            CUstreamCaptureMode=relaxed,
            cuThreadExchangeStreamCaptureMode=self.exchange,
            cuGetProcAddress=lambda *_: (0, self.batch, 0),
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)

    def exchange(self, mode: object) -> tuple[int, object]:
        before, self.modes[:] = self.modes[0], [mode]
        return 0, before


class Runtime:
    CUDARuntimeError = CUDAError
    memcpyDefault = 4

    def __init__(self, libraries: Libraries) -> None:
        self._libraries = libraries

    def driverGetVersion(self) -> int:
        return self._libraries.version

    def getDeviceCount(self) -> int:
        self._pass("getDeviceCount")
        return 1

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self._pass(name)
            return 4096

        return call

    def _pass(self, name: str) -> None:
        self._libraries.calls.append(name)
        if name in self._libraries.fails:
            raise CUDAError(self._libraries.fails[name])


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Libraries:
    libraries = Libraries()
    libraries.install(monkeypatch)
    return libraries


def open_driver(ordinal: int = 0) -> cuda.CudaDriver:
    return cuda.CudaDriver(ordinal, lambda: 3)


def test_without_the_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(NoDevice, match="pip install"):
        open_driver()


def test_without_a_driver_there_is_no_device(libraries: Libraries) -> None:
    libraries.version = 0
    with pytest.raises(NoDevice, match="driver"):
        open_driver()


@pytest.mark.parametrize(("status", "error"), [(35, DriverTooOld), (100, NoDevice), (3, NoDevice)])
def test_a_driver_that_cannot_be_used_is_named(
    libraries: Libraries, status: int, error: type[DeviceError]
) -> None:
    libraries.fails["getDeviceCount"] = status
    with pytest.raises(error):
        open_driver()


def test_a_gpu_that_is_not_visible_is_named(libraries: Libraries) -> None:
    with pytest.raises(NoDevice, match="GPU 1"):
        open_driver(1)


def test_memory_that_is_not_to_be_had_is_full(libraries: Libraries) -> None:
    driver = open_driver()
    libraries.fails |= {"malloc": 2, "hostAlloc": 2, "hostRegister": 801}
    for call in (driver.allocate, driver.allocate_host, lambda n: driver.register(4096, n)):
        with pytest.raises(DeviceFull):
            call(1)
    libraries.fails.clear()
    assert driver.allocate(1) == 4096


def test_a_gpu_that_is_lost_is_not_called_again(libraries: Libraries) -> None:
    """Each further call would fail for the same reason, some after a long wait."""
    driver = open_driver()
    libraries.fails["eventSynchronize"] = 719
    event = driver.record(driver.new_stream())
    with pytest.raises(DeviceLost):
        driver.synchronize(event)
    libraries.fails.clear()
    calls = len(libraries.calls)
    for call in (driver.new_stream, driver.record_engine, lambda: driver.allocate(1)):
        with pytest.raises(DeviceLost):
            call()
    assert len(libraries.calls) == calls


def test_an_error_of_one_call_is_not_the_end(libraries: Libraries) -> None:
    driver = open_driver()
    libraries.fails["malloc"] = 1
    with pytest.raises(DeviceError) as raised:
        driver.allocate(1)
    assert type(raised.value) is DeviceError
    libraries.fails.clear()
    driver.allocate(1)


def test_the_engines_captures_are_left_as_they_are(libraries: Libraries) -> None:
    driver = open_driver()
    libraries.fails["malloc"] = 2
    with pytest.raises(DeviceFull):
        driver.allocate(1)
    assert libraries.modes == ["global"]


@pytest.mark.parametrize("version", [12080, 13000])
def test_a_batch_is_called_as_its_version_wants_it(libraries: Libraries, version: int) -> None:
    """The call as C sees it: arrays of addresses, one set of attributes, in stream order."""
    seen: list[Any] = []

    def batch(*arguments: Any) -> int:
        to, from_, sizes, count, attributes, firsts, sets, *index, stream = arguments
        for target, source, nbytes in zip(to[:count], from_[:count], sizes[:count], strict=True):
            ctypes.memmove(target, source, nbytes)
        seen.append((count, list(attributes[:6]), firsts[0], sets, bool(index), stream))
        return 0

    words, numbers = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_int)
    index = [ctypes.POINTER(ctypes.c_size_t)] if version < 13000 else []
    kinds = [
        words, words, words, ctypes.c_size_t, numbers,
        ctypes.POINTER(ctypes.c_size_t), ctypes.c_size_t, *index, ctypes.c_void_p,
    ]  # fmt: skip
    function = ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(batch)
    address = ctypes.cast(function, ctypes.c_void_p).value
    libraries.version = version
    libraries.batch = address or 0
    driver = open_driver()
    source = np.arange(256, dtype=np.uint8)
    target = np.zeros(256, np.uint8)
    starts = np.array([0, 100, 200], np.uint64)
    sizes = np.array([10, 20, 30], np.uint64)
    to, from_ = starts + target.ctypes.data, starts + source.ctypes.data
    driver.copy(to.astype(np.uint64), from_.astype(np.uint64), sizes, driver.new_stream())
    expected = np.zeros(256, np.uint8)
    for start, nbytes in [(0, 10), (100, 20), (200, 30)]:
        expected[start : start + nbytes] = source[start : start + nbytes]
    assert target.tobytes() == expected.tobytes()
    assert seen == [(3, [1, 0, 0, 0, 0, 1], 0, 1, version < 13000, 5)]
    assert "memcpyAsync" not in libraries.calls


@pytest.mark.parametrize("version", [12040, 13000])
def test_without_a_batch_copies_go_one_by_one(libraries: Libraries, version: int) -> None:
    libraries.version = version
    driver = open_driver()
    ones = np.ones(3, np.uint64)
    driver.copy(ones, ones, ones, driver.new_stream())
    assert libraries.calls.count("memcpyAsync") == 3
