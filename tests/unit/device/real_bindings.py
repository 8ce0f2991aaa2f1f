"""What is done with cuda-bindings, done with the real package over stand-ins of NVIDIA's
libraries: so a misspelt name, a wrong order or a wrong type is not first met on a GPU. CuPy, which
brings its own runtime, is the stand-in of `cupy_standin`.

    python -m tests.unit.device.real_bindings LIBCUDA LIBCUFILE WHAT...
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

# Found by what they are called, by whoever asks the system for them from now on.
_cuda, _cufile = (ctypes.CDLL(path, ctypes.RTLD_GLOBAL) for path in sys.argv[1:3])

from cuda.bindings import cufile, driver  # noqa: E402

from kvstore.device.cuda import CudaDriver  # noqa: E402
from kvstore.device.cuda_vram import CudaVram  # noqa: E402
from kvstore.device.cufile import CuFileStraight  # noqa: E402
from kvstore.errors import DeviceError, DeviceFull  # noqa: E402
from kvstore.tiers.nvme_disk import DirectoryFile  # noqa: E402
from tests.unit.device.cupy_standin import Machine  # noqa: E402
from tests.unit.device.fakes import FakeDriver  # noqa: E402
from tests.unit.device.test_cufile import Place, written  # noqa: E402

GRAIN = 2 << 20
SLOTS, SLOT_BYTES = 2, 32 << 10


def opened(machine: Machine) -> CudaDriver:
    sys.modules["cuda.bindings"].driver = driver  # type: ignore[attr-defined]
    sys.modules["cuda.bindings"].cufile = cufile  # type: ignore[attr-defined]
    return CudaDriver(0, lambda: 0)


def memory_is_shared_by_descriptors(machine: Machine) -> None:
    vram = CudaVram(opened(machine))
    assert vram.name == "GPU-000102030405060708090a0b0c0d0e0f"
    assert vram.granularity == GRAIN
    assert vram.free_bytes() == 512 << 20
    made = vram.make(2 * GRAIN)
    made.write(0, memoryview(b"one"))
    vram.finish()
    made.write_now(GRAIN, memoryview(b"two"))
    read = vram.open(made.descriptor, 2 * GRAIN)
    assert read.address != made.address
    assert ctypes.string_at(read.address, 4) == b"one\0"
    assert ctypes.string_at(read.address + GRAIN, 4) == b"two\0"
    for gpu in (0, 16):
        name = f"GPU-{bytes(range(gpu, gpu + 16)).hex()}"
        written = vram.open_to_write(made.descriptor, 2 * GRAIN, name)
        ctypes.memmove(written.address, bytes([gpu]), 1)
        written.close()
        assert ctypes.string_at(made.address, 1) == bytes([gpu])
    with pytest.raises(DeviceFull):
        vram.make(2 << 30)
    read.close()
    made.free()
    vram.close()


def batches_are_copied(machine: Machine) -> None:
    """By both of the driver's functions for it: one tells where it failed, the later does not."""
    for version in (12080, 13000):
        cuda = opened(machine)
        cuda.driver_version = version
        batch = cuda._find_batch()
        assert batch is not None
        from_, to = np.arange(96, dtype=np.uint8), np.zeros(96, np.uint8)
        steps = np.array([0, 64], np.uint64)
        ends = [steps + np.uint64(each.ctypes.data) for each in (to, from_)]
        batch(ends[0], ends[1], np.array([32, 16], np.uint64), cuda.new_stream().ptr)
        assert to[:32].tolist() == from_[:32].tolist()
        assert to[64:80].tolist() == from_[64:80].tolist()
        assert not to[32:64].any()
        assert not to[80:].any()
        with pytest.raises(DeviceError, match="cuMemcpyBatchAsync"):
            batch(ends[0], ends[1], steps, 0)


def drives_are_read_straight(machine: Machine) -> None:
    cuda = opened(machine)
    content = np.random.default_rng(1).bytes(1 << 18)
    with tempfile.TemporaryDirectory() as directory:
        file = written(Path(directory), "segment", content)
        straight = CuFileStraight(cuda, SLOTS, SLOT_BYTES)
        place = Place(machine, SLOTS * SLOT_BYTES)
        for slot, nbytes in ((0, 1), (1, 5000), (0, SLOT_BYTES)):
            data = content[8192 : 8192 + nbytes]
            checksum = straight.fill(slot, file, 8192, nbytes)
            assert checksum == xxhash.xxh3_64_intdigest(data)
            straight.deliver(slot, place, slot * SLOT_BYTES, nbytes)
            at = place.address + slot * SLOT_BYTES
            assert ctypes.string_at(at, nbytes) == data
        _errors_are_the_devices(straight, file)
        file.close()
        straight.close()
    assert not machine.driver.wrong


def _errors_are_the_devices(straight: CuFileStraight, file: DirectoryFile) -> None:
    """The system's and cuFile's own; and where a file ends, nothing is said to be there."""
    for error in (5, 22, 5022, 5030):
        _cufile.stand_in_fails(error)
        with pytest.raises(DeviceError):
            straight.fill(0, file, 0, 4096)
    _cufile.stand_in_fails(0)
    with pytest.raises(DeviceError):
        straight.fill(0, file, 1 << 20, 4096)


def main(what: Callable[[Machine], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(FakeDriver())
        machine.install(patch)
        what(machine)
    assert not _cuda.stand_in_left()
    assert not _cufile.stand_in_left()


if __name__ == "__main__":
    for name in sys.argv[3:]:
        main(globals()[name])
        sys.stdout.write(f"{name}\n")
