"""The calls of a GPU's driver, through CuPy and, where it lacks one, cuda-bindings.

Both are imported when the first GPU is opened: what runs without one needs neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Callable, Container, Iterator
from typing import Any

import numpy as np

from kvstore.device import checksum_kernel, coding_kernels, kernels
from kvstore.device.gpu import GpuDevice, Tuning
from kvstore.device.gpu_driver import Addresses
from kvstore.errors import DeviceError, DeviceFull, DeviceLost, DriverTooOld, NoDevice

logger = logging.getLogger("kvstore.device")

HOW_TO_GET = "pip install 'tiered-kvstore[gpu]'"

# CUDA's error codes (cudaError_t and CUresult agree on them).
_FULL = frozenset({2})  # out of memory
_TOO_OLD = frozenset({35, 803, 804})  # the driver, for the runtime or beside its kernel module
_NONE = frozenset({3, 100, 101})  # not initialised, no device, no such device
# What pinning says where it may not: the memory, the operating system, the permissions.
_REFUSED_PIN = frozenset({1, 2, 304, 712, 800, 801})
_LOST = frozenset({46, 214, 220, 226, 700, 702, 708, 709, 714, 715, 716, 717, 718, 719, 721, 999})

_BATCHED_SINCE = 12080
_BATCHED_WITHOUT_INDEX_SINCE = 13000
_NOT_READY = 600
_PORTABLE = 1  # Pinned for every context.

_here = threading.local()
"""`ordinal`: of the GPU that a thread speaks to. Some speak to several in turn."""


def open_gpu(
    ordinal: int, engine_stream: Callable[[], int], tuning: Tuning | None = None
) -> GpuDevice:
    """The GPU of that number among those visible to this process.

    `engine_stream`: the handle of the CUDA stream that the calling thread launches into.
    Raises `NoDevice` or `DriverTooOld`.
    """
    from kvstore.device.cuda_vram import CudaVram

    driver = CudaDriver(ordinal, engine_stream)
    try:
        vram = CudaVram(driver)
    except DeviceError as error:
        logger.info("Memory that the store has on this GPU cannot be opened (%s).", error)
        return GpuDevice(driver, tuning)
    return GpuDevice(driver, tuning, vram=vram)


class CudaDriver:
    """`gpu_driver.Driver` on a real GPU. Shares the process's primary context with the engine."""

    def __init__(
        self, ordinal: int, engine_stream: Callable[[], int], *, compiles: bool = True
    ) -> None:
        """`compiles`: whether it is to run kernels."""
        try:
            import cupy
            from cuda.bindings import driver
        except ImportError as error:
            raise NoDevice(
                f"CuPy or cuda-bindings cannot be loaded ({error}): {HOW_TO_GET}"
            ) from error
        self._cupy = cupy
        self._runtime = cupy.cuda.runtime
        self.bindings = driver
        self.ordinal = ordinal
        self._engine_stream = engine_stream
        self._lost: DeviceLost | None = None
        self._errors = (self._runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError)
        self._relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        try:
            self.driver_version = int(self._runtime.driverGetVersion())
            if not self.driver_version:
                raise NoDevice("there is no NVIDIA driver")
            count = self._runtime.getDeviceCount()
        except self._errors as error:
            raise self.translated(int(error.status), str(error)) from error
        if ordinal >= count:
            raise NoDevice(f"there is no GPU {ordinal}: this process sees {count}")
        with self.calls():
            self._batch = self._find_batch()
        self._kernels: dict[str, Any] = {}
        self.has_kernel = compiles and self._compile(kernels.SOURCE, kernels.COPY_KERNEL)
        self._can_code: bool | None = None
        self._can_checksum: bool | None = None

    # -- streams and events -------------------------------------------------------

    def new_stream(self) -> Any:
        with self.calls():
            return self._cupy.cuda.Stream(non_blocking=True)

    def record(self, stream: Any) -> Any:
        return self._record(stream.ptr)

    def record_engine(self) -> Any:
        return self._record(self._engine_stream())

    def _record(self, handle: int) -> Any:
        with self.calls():
            # Who waits for it sleeps; and it needs no time.
            event = self._cupy.cuda.Event(block=True, disable_timing=True)
            self._runtime.eventRecord(event.ptr, handle)
            return event

    def wait(self, stream: Any, event: Any) -> None:
        with self.calls():
            self._runtime.streamWaitEvent(stream.ptr, event.ptr)

    def synchronize(self, event: Any) -> None:
        with self.calls():
            self._runtime.eventSynchronize(event.ptr)

    def drain(self, stream: Any) -> None:
        with self.calls():
            self._runtime.streamSynchronize(stream.ptr)

    def is_over(self, stream: Any) -> bool:
        with self.calls():
            # CuPy hands this status on as it is.
            status = int(self._runtime.streamQuery(stream.ptr))
        if status not in (0, _NOT_READY):
            raise self.translated(status, f"cudaStreamQuery failed ({status})")
        return not status

    # -- copies -------------------------------------------------------------------

    def copy(self, to: Addresses, from_: Addresses, sizes: Addresses, stream: Any) -> None:
        with self.calls():
            if self._batch is not None and len(sizes) > 1:
                self._batch(to, from_, sizes, stream.ptr)
                return
            kind = self._runtime.memcpyDefault
            for one in zip(to.tolist(), from_.tolist(), sizes.tolist(), strict=True):
                self._runtime.memcpyAsync(*one, kind, stream.ptr)

    def run_kernel(self, table: int, count: int, stream: Any) -> None:
        with self.calls(), stream:
            grid = min(count, kernels.MOST_BLOCKS)
            arguments = (np.uint64(table), np.uint32(count))
            self._kernels[kernels.COPY_KERNEL]((grid,), (kernels.THREADS,), arguments)

    def can_code(self) -> bool:
        if self._can_code is None:
            names = (coding_kernels.ENCODE_KERNEL, coding_kernels.DECODE_KERNEL)
            self._can_code = self._compile(coding_kernels.SOURCE, *names)
        return self._can_code

    def run_coding(self, kernel: str, kind: int, table: int, count: int, stream: Any) -> None:
        with self.calls(), stream:
            arguments = (np.uint64(table), np.uint32(count), np.uint32(kind))
            grid = coding_kernels.grid_of(count)
            self._kernels[kernel](grid, (coding_kernels.THREADS,), arguments)

    def can_checksum(self) -> bool:
        if self._can_checksum is None:
            names = (checksum_kernel.SUMS_KERNEL, checksum_kernel.CHAIN_KERNEL)
            self._can_checksum = self._compile(checksum_kernel.SOURCE, *names)
        return self._can_checksum

    def run_checksum(self, from_: int, nbytes: int, sums: int, to: int, stream: Any) -> None:
        first, second = (
            self._kernels[name]
            for name in (checksum_kernel.SUMS_KERNEL, checksum_kernel.CHAIN_KERNEL)
        )
        data, count, rows, result = (np.uint64(each) for each in (from_, nbytes, sums, to))
        grid = (checksum_kernel.grid_of(nbytes),)
        with self.calls(), stream:
            first(grid, (checksum_kernel.THREADS,), (data, count, rows))
            second((1,), (checksum_kernel.LANES,), (rows, count, result))

    # -- memory -------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        with self.calls():
            return int(self._runtime.malloc(nbytes))

    def free(self, address: int) -> None:
        with self.calls():
            self._runtime.free(address)

    def allocate_host(self, nbytes: int) -> int:
        with self.calls():
            return int(self._runtime.hostAlloc(nbytes, _PORTABLE))

    def free_host(self, address: int) -> None:
        with self.calls():
            self._runtime.freeHost(address)

    def register(self, address: int, nbytes: int) -> None:
        with self.calls(refused=_REFUSED_PIN):
            self._runtime.hostRegister(address, nbytes, _PORTABLE)

    def unregister(self, address: int) -> None:
        with self.calls():
            self._runtime.hostUnregister(address)

    # -- what all calls have in common --------------------------------------------

    def enter(self) -> None:
        with self.calls():
            pass

    @contextlib.contextmanager
    def calls(self, refused: Container[int] = _FULL) -> Iterator[None]:
        """On this GPU; what fails becomes one of the project's errors."""
        if self._lost is not None:
            raise DeviceLost(str(self._lost))
        try:
            before = self._begin()
            try:
                yield
            finally:
                if before is not None:
                    self.bindings.cuThreadExchangeStreamCaptureMode(before)
        except self._errors as error:
            raise self.translated(int(error.status), str(error), refused) from error

    def _begin(self) -> Any:
        """Have this thread speak to this GPU, and not end the capture of a graph that the
        engine may be at in another: calls that allocate or ask would. The mode before, None
        where it could not be changed."""
        if getattr(_here, "ordinal", None) != self.ordinal:
            self._runtime.setDevice(self.ordinal)
            _here.ordinal = self.ordinal
        _, before = self.bindings.cuThreadExchangeStreamCaptureMode(self._relaxed)
        return before

    def translated(self, status: int, text: str, refused: Container[int] = _FULL) -> DeviceError:
        """What a status of CUDA's is here. `refused`: those that say that there is no more."""
        if status in refused:
            return DeviceFull(text)
        if status in _TOO_OLD:
            return DriverTooOld(text)
        if status in _NONE:
            return NoDevice(text)
        if status in _LOST:
            self._lost = DeviceLost(text)
            logger.error("GPU %d is lost to this process: %s", self.ordinal, text)
            return self._lost
        return DeviceError(text)

    def _compile(self, source: str, *names: str) -> bool:
        """False where the compiler that CuPy looks for is not there."""
        with self.calls():
            try:
                module = self._cupy.RawModule(code=source, options=("-std=c++17",))
                self._kernels |= {name: module.get_function(name) for name in names}
            except (self._cupy.cuda.compiler.CompileException, RuntimeError, OSError) as error:
                logger.warning("The GPU has to do without %s (%s).", names[0], error)
                return False
        return True

    def _find_batch(self) -> Callable[[Addresses, Addresses, Addresses, int], None] | None:
        """cuMemcpyBatchAsync, called with arrays as they are: through its wrapper, which
        takes lists, a piece costs more than its copy."""
        version = self.driver_version
        if version < _BATCHED_SINCE:
            return None
        with_index = version < _BATCHED_WITHOUT_INDEX_SINCE
        asked = _BATCHED_SINCE if with_index else _BATCHED_WITHOUT_INDEX_SINCE
        status, address, _ = self.bindings.cuGetProcAddress(b"cuMemcpyBatchAsync", asked, 0)
        if int(status) or not int(address):
            return None
        pointers = [ctypes.c_void_p] * 3
        failed_at = [ctypes.c_void_p] if with_index else []
        kinds = [
            *pointers, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t,
            *failed_at, ctypes.c_void_p,
        ]  # fmt: skip
        function = ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(int(address))
        attributes = _CopyAttributes(_IN_STREAM_ORDER, 0, 0, 0, 0, _BESIDE_COMPUTING)
        first = ctypes.c_size_t(0)
        index = ctypes.c_size_t(0)

        def batch(to: Addresses, from_: Addresses, sizes: Addresses, stream: int) -> None:
            arguments: list[Any] = [
                array.__array_interface__["data"][0] for array in (to, from_, sizes)
            ]
            arguments += [len(sizes), ctypes.byref(attributes), ctypes.byref(first), 1]
            arguments += [ctypes.byref(index)] if with_index else []
            status = function(*arguments, stream)
            if status:
                raise self.translated(status, f"cuMemcpyBatchAsync failed ({status})")

        return batch


class _CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = [
        ("source_order", ctypes.c_int),
        ("source_kind", ctypes.c_int),
        ("source_id", ctypes.c_int),
        ("destination_kind", ctypes.c_int),
        ("destination_id", ctypes.c_int),
        ("flags", ctypes.c_uint),
    ]


_IN_STREAM_ORDER = 1  # Any other order is unsafe from a GPU to the host.
_BESIDE_COMPUTING = 1
