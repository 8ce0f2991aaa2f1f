"""CuPy, cuda-bindings and as much of torch as stand for an engine, over `fakes.FakeDriver`: so
all of `device.cuda` runs, on a GPU that is as hostile as CUDA lets it be."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import sys
import threading
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.device import cuda
from kvstore.device.checksum_kernel import CHAIN_KERNEL, SUMS_KERNEL
from kvstore.device.gpu_driver import Addresses
from kvstore.device.kernels import COPY_KERNEL
from kvstore.errors import DeviceFull
from tests.unit.device.fakes import FakeDriver, FakeEvent, FakeStream

CHECKSUM_KERNELS = (SUMS_KERNEL, CHAIN_KERNEL)
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
        self.launches: list[str] = []
        self.speaks = threading.local()
        """`here`: whether the thread does, to the GPU."""
        self.cufile = CuFile(driver, self.speaks)
        self._streams: dict[int, FakeStream] = {0: driver._engine}
        self._events: dict[int, FakeEvent] = {}
        # Threads make them side by side, and no two may be the same.
        self._handles = itertools.count(1)
        self._inside = threading.local()
        self._function = _BATCH(self._batch)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # No thread has spoken to this GPU yet.
        monkeypatch.setattr(cuda, "_here", threading.local())
        cupy, bindings = ModuleType("cupy"), ModuleType("cuda.bindings")
        cupy.cuda = SimpleNamespace(  # type: ignore[attr-defined]
            runtime=Runtime(self),
            driver=SimpleNamespace(CUDADriverError=CUDAError),
            compiler=SimpleNamespace(CompileException=RuntimeError),
            Stream=lambda non_blocking: Stream(self),
            Event=lambda block, disable_timing: SimpleNamespace(ptr=self._new_event()),
        )
        cupy.RawModule = lambda **_: SimpleNamespace(  # type: ignore[attr-defined]
            get_function=lambda name: Kernel(self, name)
        )
        bindings.driver = SimpleNamespace(  # type: ignore[attr-defined]
            CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=RELAXED),
            cuThreadExchangeStreamCaptureMode=lambda mode: (0, "global"),
            cuGetProcAddress=lambda *_: (0, self._batch_address(), 0),
        )
        bindings.cufile = self.cufile  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)

    def stream(self, handle: int) -> FakeStream:
        return self._streams[handle]

    def add_stream(self) -> int:
        handle = next(self._handles)
        self._streams[handle] = self.driver.new_stream()
        return handle

    def record(self, event: int, stream: int) -> None:
        self._events[event] = self.driver.record(self.stream(stream))

    def event(self, number: int) -> FakeEvent:
        return self._events[number]

    def launch(self, name: str, table: int, count: int, kind: int | None) -> None:
        self.launches.append(name)
        stream = self.stream(self._in_stream)
        if kind is None:
            assert name == COPY_KERNEL
            self.driver.run_kernel(table, count, stream)
        else:
            self.driver.run_coding(name, kind, table, count, stream)

    def take_checksum(self, name: str, from_: int, nbytes: int, to: int) -> None:
        self.launches.append(name)
        stream = self.stream(self._in_stream)
        if name == SUMS_KERNEL:
            self.driver.take_sums(from_, nbytes, to, stream)
        else:
            self.driver.chain_sums(from_, nbytes, to, stream)

    def inside(self, handle: int) -> int:
        """What this thread launches goes into the stream. The one before."""
        before = self._in_stream
        self._inside.stream = handle
        return before

    @property
    def _in_stream(self) -> int:
        return getattr(self._inside, "stream", 0)

    def _new_event(self) -> int:
        number = next(self._handles)
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
    def __init__(self, machine: Machine, name: str) -> None:
        self._machine = machine
        self._name = name

    def __call__(
        self, grid: tuple[int, ...], threads: tuple[int], arguments: tuple[Any, ...]
    ) -> None:
        if self._name in CHECKSUM_KERNELS:
            assert {each.dtype for each in arguments} == {np.dtype(np.uint64)}
            self._machine.take_checksum(self._name, *(int(each) for each in arguments))
            return
        table, count, *kind = arguments
        assert table.dtype == np.uint64
        assert {each.dtype for each in (count, *kind)} == {np.dtype(np.uint32)}
        told = int(kind[0]) if kind else None
        self._machine.launch(self._name, int(table), int(count), told)


class CuFileError(Exception):
    pass


class CuFile:
    """`refuses`: a call that says that this file or GPU is not for it. `left`: what was opened
    or registered and is still. `reads`: what becomes of a read: "" for all of it, "short" for a
    page at a time, "nothing", "error", "untold". `spoils`: whether it arrives damaged."""

    cuFileError = CuFileError
    BoolConfigParameter = SimpleNamespace(PROPERTIES_ALLOW_COMPAT_MODE=1)
    FileHandleType = SimpleNamespace(OPAQUE_FD=1)

    def __init__(self, driver: FakeDriver, speaks: threading.local) -> None:
        self.refuses = ""
        self.reads = ""
        self.spoils = False
        self.left: list[object] = []
        self.ways_round = True
        self.registered = 0
        self._driver = driver
        self._speaks = speaks
        self._described = SimpleNamespace(handle=SimpleNamespace(), ptr=77)
        self._files: dict[int, os.stat_result] = {}

    def set_parameter_bool(self, parameter: int, value: bool) -> None:
        assert not self.left, "what is set after the driver is opened counts for nothing"
        assert parameter == 1
        self.ways_round = value

    def driver_open(self) -> None:
        self._enter("driver_open", "driver")

    def driver_close(self) -> None:
        self.left.remove("driver")
        assert not self.left, "what is registered goes before the driver"

    def Descr(self) -> Any:
        return self._described

    def handle_register(self, described: int) -> int:
        assert described == self._described.ptr
        descriptor: int = self._described.handle.fd
        assert os.O_DIRECT & fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if descriptor in self.left:
            raise CuFileError("handle_register: already registered")
        self._enter("handle_register", descriptor)
        self.registered += 1
        self._files[descriptor] = os.fstat(descriptor)
        return descriptor

    def handle_deregister(self, handle: int) -> None:
        self._check(handle)
        self.left.remove(handle)

    def buf_register(self, address: int, nbytes: int, flags: int) -> None:
        assert self._driver._inside(address, nbytes, self._driver.on_gpu)
        self._enter("buf_register", address)

    def buf_deregister(self, address: int) -> None:
        assert self._driver._inside(address, 1, self._driver.on_gpu)
        self.left.remove(address)

    def read(self, handle: int, address: int, nbytes: int, offset: int, to: int) -> int | None:
        assert {handle, address} <= set(self.left)
        assert not self.ways_round
        assert getattr(self._speaks, "here", False), "cuFile needs a context of the GPU"
        assert not (offset | nbytes | to) % mmap.PAGESIZE
        self._check(handle)
        if self.reads == "error":
            raise ValueError("5 is not a valid OpError")
        if self.reads == "nothing":
            return 0
        pages = mmap.mmap(-1, mmap.PAGESIZE if self.reads == "short" else nbytes)
        got = os.preadv(handle, [pages], offset)
        assert self._driver._inside(address + to, got, self._driver.on_gpu)
        if self.spoils:
            pages[got // 2] ^= 1
        ctypes.memmove(address + to, bytes(pages), got)
        return None if self.reads == "untold" else got

    def _check(self, handle: int) -> None:
        """It is still the file's that was registered."""
        now, then = os.fstat(handle), self._files[handle]
        assert (now.st_ino, now.st_dev) == (then.st_ino, then.st_dev)

    def _enter(self, call: str, what: object) -> None:
        if self.refuses == call:
            raise CuFileError(f"{call}: not supported")
        self.left.append(what)


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
        self._machine.speaks.here = True

    def eventRecord(self, event: int, stream: int) -> None:
        self._machine.record(event, stream)

    def streamWaitEvent(self, stream: int, event: int) -> None:
        self._driver.wait(self._machine.stream(stream), self._machine.event(event))

    def eventSynchronize(self, event: int) -> None:
        self._driver.synchronize(self._machine.event(event))

    def streamSynchronize(self, stream: int) -> None:
        self._driver.drain(self._machine.stream(stream))

    def streamQuery(self, stream: int) -> int:
        return 0 if self._driver.is_over(self._machine.stream(stream)) else 600

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
