"""Memory of a real GPU that processes share.

It is made with cuMemCreate and exported as a file descriptor, rather than with the older
cudaIpcGetMemHandle: freeing memory while others have that kind open is undefined, while this
kind lasts until the last who maps it lets go. It travels over a Unix socket as the server's other
memory does. Only cuda-bindings has these calls.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvstore.device.cuda import CudaDriver
from kvstore.errors import DeviceError, DriverTooOld


def open_cuda_vram(ordinal: int) -> CudaVram:
    """For a process that does nothing else on this GPU. Raises `DeviceError`."""
    return CudaVram(CudaDriver(ordinal, lambda: 0, compiles=False))


class CudaVram:
    def __init__(self, driver: CudaDriver) -> None:
        """Raises `DriverTooOld` where the GPU or its driver shares no memory this way."""
        self._driver = driver
        self._stream: Any = None
        self._pinned: list[memoryview] = []
        self._cuda = cuda = driver.bindings
        with driver.calls():
            attribute = cuda.CUdevice_attribute
            self._device = self._did(cuda.cuDeviceGet(driver.ordinal))
            for needed in (
                attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
                attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            ):
                if not self._did(cuda.cuDeviceGetAttribute(needed, self._device)):
                    raise DriverTooOld("this GPU's memory cannot be shared by descriptors")
            uuid = bytes(self._did(cuda.cuDeviceGetUuid(self._device)).bytes)
            self.name = f"GPU-{uuid.hex()}"
            self._kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            self._properties = cuda.CUmemAllocationProp()
            self._properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
            self._properties.requestedHandleTypes = self._kind
            self._properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            self._properties.location.id = driver.ordinal
            least = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            self.granularity = int(
                self._did(cuda.cuMemGetAllocationGranularity(self._properties, least))
            )

    def free_bytes(self) -> int:
        with self._driver.calls():
            return int(self._did(self._cuda.cuMemGetInfo(), 2)[0])

    def make(self, nbytes: int) -> _Made:
        with self._driver.calls():
            handle = self._did(self._cuda.cuMemCreate(nbytes, self._properties, 0))
            try:
                descriptor = self._did(
                    self._cuda.cuMemExportToShareableHandle(handle, self._kind, 0)
                )
                try:
                    return _Made(self, self._map(handle, nbytes, writable=True), descriptor)
                except DeviceError:
                    os.close(int(descriptor))
                    raise
            finally:
                # The mapping and the descriptor keep the memory.
                self._cuda.cuMemRelease(handle)

    def open(self, descriptor: int, nbytes: int) -> _Mapped:
        with self._driver.calls():
            handle = self._did(self._cuda.cuMemImportFromShareableHandle(descriptor, self._kind))
            try:
                return self._map(handle, nbytes, writable=False)
            finally:
                self._cuda.cuMemRelease(handle)

    def start(self, address: int, data: memoryview) -> None:
        """Copy from host memory, in the order of calls."""
        array = np.frombuffer(data, np.uint8)
        source = int(array.__array_interface__["data"][0])
        if self._stream is None:
            self._stream = self._driver.new_stream()
        self._pinned.append(data)
        with self._driver.calls():
            self._did(
                self._cuda.cuMemcpyHtoDAsync(address, source, data.nbytes, self._stream.ptr), 0
            )

    def finish(self) -> None:
        try:
            if self._stream is not None:
                self._driver.synchronize(self._driver.record(self._stream))
        finally:
            self._pinned.clear()

    def close(self) -> None:
        self._stream = None

    def unmap(self, address: int, nbytes: int) -> None:
        # A GPU that is lost maps nothing any more.
        with contextlib.suppress(DeviceError), self._driver.calls():
            self._cuda.cuMemUnmap(address, nbytes)
            self._cuda.cuMemAddressFree(address, nbytes)

    def _map(self, handle: Any, nbytes: int, *, writable: bool) -> _Mapped:
        cuda = self._cuda
        address = self._did(cuda.cuMemAddressReserve(nbytes, 0, 0, 0))
        with self._freeing(address, nbytes):
            self._did(cuda.cuMemMap(address, nbytes, 0, handle, 0), 0)
            try:
                self._allow(address, nbytes, writable=writable)
            except DeviceError:
                cuda.cuMemUnmap(address, nbytes)
                raise
        return _Mapped(self, int(address), nbytes)

    @contextlib.contextmanager
    def _freeing(self, address: Any, nbytes: int) -> Iterator[None]:
        try:
            yield
        except DeviceError:
            self._cuda.cuMemAddressFree(address, nbytes)
            raise

    def _allow(self, address: Any, nbytes: int, *, writable: bool) -> None:
        flags = self._cuda.CUmemAccess_flags
        access = self._cuda.CUmemAccessDesc()
        access.location.type = self._properties.location.type
        access.location.id = self._properties.location.id
        if not writable:
            # A driver that knows no reading alone says so; then it is for order's sake only.
            access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READ
            if not int(self._cuda.cuMemSetAccess(address, nbytes, [access], 1)[0]):
                return
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._did(self._cuda.cuMemSetAccess(address, nbytes, [access], 1), 0)

    def _did(self, answer: tuple[Any, ...], values: int = 1) -> Any:
        """What a call of cuda-bindings answered beside its status."""
        status = int(answer[0])
        if status:
            raise self._driver.translated(status, f"{answer[0]}")
        return answer[1] if values == 1 else answer[1:]


class _Mapped:
    def __init__(self, vram: CudaVram, address: int, nbytes: int) -> None:
        self.address = address
        self._vram = vram
        self._nbytes = nbytes

    def close(self) -> None:
        nbytes, self._nbytes = self._nbytes, 0
        if nbytes:
            self._vram.unmap(self.address, nbytes)


class _Made:
    def __init__(self, vram: CudaVram, mapped: _Mapped, descriptor: Any) -> None:
        self.descriptor = int(descriptor)
        self._vram = vram
        self._mapped: _Mapped | None = mapped

    def write(self, offset: int, data: memoryview) -> None:
        assert self._mapped is not None
        self._vram.start(self._mapped.address + offset, data)

    def free(self) -> None:
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            mapped.close()
            os.close(self.descriptor)
