"""CuPy, cuda-bindings and as much of torch as stand for an engine, over `fakes.FakeDriver`: so
all of `device.cuda` runs, on a GPU that is as hostile as CUDA lets it be."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.device.gpu import Addresses
from kvstore.errors import DeviceFull
from tests.unit.device.fakes import FakeDriver, FakeEvent, FakeStream

RELAXED = "relaxed"
_POINTER = ctypes.c_void_p
_BATCH = ctypes.CFUNCTYPE(
    ctypes.c_int, _POINTER, _POINTER, _POINTER, ctypes.c_size_t, _POINTER, _POINTER,
    ctypes.c_size_t, _POINTER,
)  # fmt: skip


class CUDAError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class Machine:
    """One GPU. `batched`: whether its driver knows batches of copies."""

    def __init__(self, driver: FakeDriver, *, batched: bool = True) -> None:
        self.driver = driver
        self.batched = batched
        self.batches = 0
        self.launches = 0
        self._streams: dict[int, FakeStream] = {0: driver._engine}
        self._events: dict[int, FakeEvent] = {}
        self._in_stream = 0
        self._function = _BATCH(self._batch)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cupy, bindings = ModuleType("cupy"), ModuleType("cuda.bindings")
        cupy.cuda = SimpleNamespace(  # type: ignore[attr-defined]
            runtime=Runtime(self),
            driver=SimpleNamespace(CUDADriverError=CUDAError),
            compiler=SimpleNamespace(CompileException=RuntimeError),
            Stream=lambda non_blocking: Stream(self),
            Event=lambda block, disable_timing: SimpleNamespace(ptr=self._new_event()),
        )
        cupy.RawKernel = lambda *_, **__: Kernel(self)  # type: ignore[attr-defined]
        bindings.driver = SimpleNamespace(  # type: ignore[attr-defined]
            CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=RELAXED),
            cuThreadExchangeStreamCaptureMode=lambda mode: (0, "global"),
            cuGetProcAddress=lambda *_: (0, self._batch_address(), 0),
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)

    def stream(self, handle: int) -> FakeStream:
        return self._streams[handle]

    def add_stream(self) -> int:
        handle = 1 + len(self._streams)
        self._streams[handle] = self.driver.new_stream()
        return handle

    def record(self, event: int, stream: int) -> None:
        self._events[event] = self.driver.record(self.stream(stream))

    def event(self, number: int) -> FakeEvent:
        return self._events[number]

    def launch(self, table: int, count: int) -> None:
        self.launches += 1
        self.driver.run_kernel(table, count, self.stream(self._in_stream))

    def inside(self, handle: int) -> int:
        before, self._in_stream = self._in_stream, handle
        return before

    def _new_event(self) -> int:
        number = 1 + len(self._events)
        # One that was never recorded is past.
        self._events[number] = FakeEvent()
        self._events[number].past = True
        return number

    def _batch_address(self) -> int:
        return ctypes.cast(self._function, _POINTER).value or 0 if self.batched else 0

    def _batch(self, to: int, from_: int, sizes: int, count: int, *rest: int) -> int:
        self.batches += 1
        ends = (_array(each, count) for each in (to, from_, sizes))
        self.driver.copy(*_three(ends), self.stream(rest[-1] or 0))
        return 0


def _array(address: int, count: int) -> Addresses:
    memory = memoryview((ctypes.c_ubyte * (8 * count)).from_address(address)).cast("B")
    return np.frombuffer(memory, np.uint64).copy()


def _three(arrays: Iterable[Addresses]) -> tuple[Addresses, Addresses, Addresses]:
    to, from_, sizes = arrays
    return to, from_, sizes


class Stream:
    def __init__(self, machine: Machine) -> None:
        self.ptr = machine.add_stream()
        self._machine = machine
        self._before = 0

    def __enter__(self) -> None:
        self._before = self._machine.inside(self.ptr)

    def __exit__(self, *exc_info: object) -> None:
        self._machine.inside(self._before)


class Kernel:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def compile(self) -> None:
        pass

    def __call__(self, grid: tuple[int], threads: tuple[int], arguments: tuple[Any, Any]) -> None:
        table, count = arguments
        assert (table.dtype, count.dtype) == (np.uint64, np.uint32)
        self._machine.launch(int(table), int(count))


class Runtime:
    """Names and order of arguments are CuPy's."""

    CUDARuntimeError = CUDAError
    memcpyDefault = 4

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._driver = machine.driver

    def driverGetVersion(self) -> int:
        return 13000

    def runtimeGetVersion(self) -> int:
        return 13000

    def getDeviceCount(self) -> int:
        return 1

    def getDeviceProperties(self, device: int) -> dict[str, Any]:
        return {"name": b"stand-in", "totalGlobalMem": 1 << 30}

    def setDevice(self, device: int) -> None:
        assert device == 0

    def eventRecord(self, event: int, stream: int) -> None:
        self._machine.record(event, stream)

    def streamWaitEvent(self, stream: int, event: int) -> None:
        self._driver.wait(self._machine.stream(stream), self._machine.event(event))

    def eventSynchronize(self, event: int) -> None:
        self._driver.synchronize(self._machine.event(event))

    def memcpyAsync(self, to: int, from_: int, nbytes: int, kind: int, stream: int) -> None:
        ends = (np.array([each], np.uint64) for each in (to, from_, nbytes))
        self._driver.copy(*_three(ends), self._machine.stream(stream))

    def malloc(self, nbytes: int) -> int:
        return self._driver.allocate(nbytes)

    def free(self, address: int) -> None:
        self._driver.free(address)

    def hostAlloc(self, nbytes: int, flags: int) -> int:
        return self._driver.allocate_host(nbytes)

    def freeHost(self, address: int) -> None:
        self._driver.free_host(address)

    def hostRegister(self, address: int, nbytes: int, flags: int) -> None:
        try:
            self._driver.register(address, nbytes)
        except DeviceFull as error:
            raise CUDAError(2) from error

    def hostUnregister(self, address: int) -> None:
        self._driver.unregister(address)


class Torch:
    """torch, but tensors "on a GPU" are in its stand-in's memory, and what is launched is
    done."""

    def __init__(self, driver: FakeDriver) -> None:
        self._driver = driver
        stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
        self.cuda = SimpleNamespace(
            is_available=lambda: True, current_stream=lambda *_: stream, synchronize=lambda: None
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randint(self, *arguments: Any, device: str, **options: Any) -> torch.Tensor:
        return self._there(torch.randint(*arguments, **options))

    def randn(self, *shape: int, device: str, **options: Any) -> torch.Tensor:
        """What there is to compute with is small."""
        return torch.randn(*(min(each, 8) for each in shape), **options)

    def zeros(self, *arguments: Any, device: str, **options: Any) -> torch.Tensor:
        return self._there(torch.zeros(*arguments, **options))

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        memory = self._driver.give_kv_cache(tensor.nbytes)
        there = torch.from_numpy(memory).view(tensor.dtype)
        there.copy_(tensor)
        return there
