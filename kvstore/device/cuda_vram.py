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

from kvstore.device.cuda import CudaDriver
from kvstore.device.cufile import CuFileStraight, bytes_taken
from kvstore.device.gpu_staging import address_of
from kvstore.device.vram import Straight
from kvstore.device.waits import wait_for, waited_for
from kvstore.errors import DeviceError, DeviceStuck, DriverTooOld


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
            self.name = self._name_of(self._device)
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
                mapped = self._map(handle, nbytes, writable=True)
                try:
                    self._clear(mapped.address, nbytes)
                    descriptor = self._did(
                        self._cuda.cuMemExportToShareableHandle(handle, self._kind, 0)
                    )
                except DeviceError:
                    mapped.close()
                    raise
                return _Made(self, mapped, descriptor)
            finally:
                # The mapping and the descriptor keep the memory.
                self._cuda.cuMemRelease(handle)

    def open(self, descriptor: int, nbytes: int) -> _Mapped:
        return self._open(descriptor, nbytes, writable=False)

    def open_to_write(self, descriptor: int, nbytes: int, gpu: str) -> _Mapped:
        if gpu != self.name:
            self._check_reach(gpu)
        return self._open(descriptor, nbytes, writable=True)

    def _open(self, descriptor: int, nbytes: int, *, writable: bool) -> _Mapped:
        with self._driver.calls():
            handle = self._did(self._cuda.cuMemImportFromShareableHandle(descriptor, self._kind))
            try:
                return self._map(handle, nbytes, writable=writable)
            finally:
                self._cuda.cuMemRelease(handle)

    def _check_reach(self, gpu: str) -> None:
        """Raises `DeviceError` where it is known that this GPU does not reach the other. Of one
        that is hidden from this process (CUDA_VISIBLE_DEVICES) mapping its memory tells."""
        cuda = self._cuda
        with self._driver.calls():
            for ordinal in range(self._did(cuda.cuDeviceGetCount())):
                other = self._did(cuda.cuDeviceGet(ordinal))
                reaches = self._name_of(other) != gpu or self._did(
                    cuda.cuDeviceCanAccessPeer(self._device, other)
                )
                if not reaches:
                    raise DeviceError(f"this GPU has no access to {gpu}'s memory")

    def _name_of(self, device: Any) -> str:
        return f"GPU-{bytes(self._did(self._cuda.cuDeviceGetUuid(device)).bytes).hex()}"

    def straight(self, slots: int, slot_bytes: int) -> Straight:
        return CuFileStraight(self._driver, slots, slot_bytes)

    def straight_bytes(self, slots: int, slot_bytes: int) -> int:
        return bytes_taken(slots, slot_bytes)

    def start(self, address: int, data: memoryview) -> None:
        """Copy from host memory, in the order of calls."""
        source = address_of(data)
        self._have_stream()
        self._pinned.append(data)
        with self._driver.calls():
            self._did(
                self._cuda.cuMemcpyHtoDAsync(address, source, data.nbytes, self._stream.ptr), 0
            )

    def copy_now(self, address: int, data: memoryview) -> None:
        """Copy from host memory, in a stream of this copy's own."""
        driver = self._driver
        stream = driver.new_stream()
        with driver.calls(), waited_for(driver, stream):
            self._did(
                self._cuda.cuMemcpyHtoDAsync(address, address_of(data), data.nbytes, stream.ptr), 0
            )

    def _clear(self, address: int, nbytes: int) -> None:
        """The driver may give out what was another's, with what that left there."""
        self._have_stream()
        self._did(self._cuda.cuMemsetD8Async(address, 0, nbytes, self._stream.ptr), 0)
        self.finish()

    def _have_stream(self) -> None:
        if self._stream is None:
            self._stream = self._driver.new_stream()

    def finish(self) -> None:
        if self._stream is None:
            return
        try:
            wait_for(self._driver, self._stream)
        except DeviceStuck:
            raise
        except DeviceError:
            self._pinned.clear()
            raise
        self._pinned.clear()

    def close(self) -> None:
        self._stream = None

    def unmap(self, address: int, nbytes: int) -> None:
        with contextlib.ExitStack() as stack:
            # A GPU that is lost is asked too: the memory is as much as ever.
            with contextlib.suppress(DeviceError):
                stack.enter_context(self._driver.calls())
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

    @property
    def address(self) -> int:
        assert self._mapped is not None
        return self._mapped.address

    def write(self, offset: int, data: memoryview) -> None:
        self._vram.start(self.address + offset, data)

    def write_now(self, offset: int, data: memoryview) -> None:
        self._vram.copy_now(self.address + offset, data)

    def free(self) -> None:
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            mapped.close()
            os.close(self.descriptor)
