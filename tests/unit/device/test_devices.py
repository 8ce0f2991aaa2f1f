"""Each device keeps the contract: exactly the bytes, under any order that the events allow."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import xxhash

from kvstore.device.adversarial import AdversarialDevice, Temper
from kvstore.device.base import Copies, Device, Memory, Piece
from kvstore.device.flight import Flight
from kvstore.device.gpu import GpuDevice, Tuning
from kvstore.device.host import HostDevice
from kvstore.errors import DeviceError, DeviceFull, DeviceLost
from tests.unit.device.fakes import FakeDriver

BLOCKS = 24
SHAPES = {
    "one piece a block": [(0, 96, 96)],
    "layers": [(layer * BLOCKS * 32, 32, 32) for layer in range(4)],
    "odd pieces at odd places": [(5, 61, 17), (BLOCKS * 61 + 9, 40, 33), (BLOCKS * 110, 7, 3)],
}
ROOM = BLOCKS * 160


def pieces_of(name: str) -> list[Piece]:
    return [Piece(*piece) for piece in SHAPES[name]]


@dataclass
class Made:
    """A device, its KV cache, and how slots are made for it."""

    device: Device
    memory: np.ndarray[Any, Any]
    launch: Callable[[Callable[[], None]], None]
    settle: Callable[[], None]
    driver: FakeDriver | None = None

    def blocks(self, name: str) -> Any:
        memory = Memory(self.memory.ctypes.data, len(self.memory), self.memory)
        return self.device.blocks(memory, pieces_of(name), BLOCKS)


def make(kind: str, seed: int, temper: Temper) -> Made:
    if kind == "host":
        memory = np.zeros(ROOM, np.uint8)
        return Made(HostDevice(), memory, lambda run: run(), lambda: None)
    if kind == "adversarial":
        adversary = AdversarialDevice(seed, temper)
        return Made(adversary, np.zeros(ROOM, np.uint8), adversary.compute, adversary.settle)
    driver = FakeDriver(seed, temper)
    tuning = Tuning(kernel_below=0 if kind == "gpu, copies" else 1 << 20, step_bytes=256)
    if kind == "gpu, nothing pinned":
        driver.refuses.add("register")
    device = GpuDevice(driver, tuning, pin_in_background=False)
    return Made(device, driver.give_kv_cache(ROOM), driver.launch, driver.settle, driver)


KINDS = ["host", "adversarial", "gpu, copies", "gpu, kernel", "gpu, nothing pinned"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def slots(count: int, nbytes: int) -> list[memoryview]:
    """As the arena's: parts of one mapping. Some with room before them."""
    mapping = memoryview((ctypes.c_ubyte * (count * (nbytes + 16)))()).cast("B")
    starts = [index * (nbytes + 16) + index % 16 for index in range(count)]
    return [mapping[start : start + nbytes] for start in starts]


def bytes_of(memory: np.ndarray[Any, Any], name: str, block: int) -> bytes:
    pieces = pieces_of(name)
    starts = [(each.offset + block * each.stride, each.nbytes) for each in pieces]
    return b"".join(memory[start : start + nbytes].tobytes() for start, nbytes in starts)


def sums(datas: list[bytes]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(each) for each in datas]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("temper", Temper)
def test_what_lies_on_the_device_is_loaded_from_there(kind: str, name: str, temper: Temper) -> None:
    for seed in range(4):
        made = make(kind, seed, temper)
        blocks = made.blocks(name)
        nbytes = blocks.block_bytes
        size = 11 * nbytes
        other = made.driver.give_kv_cache(size) if made.driver else np.zeros(size, np.uint8)
        other[:] = np.frombuffer(random.Random(seed).randbytes(size), np.uint8)
        made.launch(lambda made=made: made.memory.fill(0xEE))
        stream = made.device.stream()
        stream.wait_event(made.device.computed())
        ids = random.Random(seed).sample(range(BLOCKS), 11)
        addresses = [other.ctypes.data + index * nbytes for index in range(11)]
        with Flight() as flight:
            flight.add(stream.load_within(blocks, ids[:7], addresses[:7]), lambda got: None)
            flight.add(stream.load_within(blocks, ids[7:], addresses[7:]), lambda got: None)
        got = [bytes_of(made.memory, name, block) for block in ids]
        assert b"".join(got) == other.tobytes()
        made.settle()
        assert [bytes_of(made.memory, name, block) for block in ids] == got
        stream.close()
        made.device.close()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("temper", Temper)
def test_what_was_computed_is_saved_and_loaded_again(kind: str, name: str, temper: Temper) -> None:
    """The engine's writing is launched, not done, when the save is started; and the engine's
    last use of the blocks is when the load is."""
    for seed in range(4):
        made = make(kind, seed, temper)
        random_ = random.Random(seed)
        blocks = made.blocks(name)
        content = np.frombuffer(random_.randbytes(ROOM), np.uint8)
        made.launch(lambda made=made, content=content: np.copyto(made.memory, content))
        out = made.device.stream()
        out.wait_event(made.device.computed())
        ids = random_.sample(range(BLOCKS), 11)
        saved = slots(11, blocks.block_bytes)
        expected = [bytes_of(content, name, block) for block in ids]
        with Flight() as flight:
            flight.add(out.save(blocks, ids[:7], saved[:7]), lambda got: None)
            flight.add(out.save(blocks, ids[7:], saved[7:]), lambda got: None)
        assert [bytes(slot) for slot in saved] == expected
        made.launch(lambda made=made: made.memory.fill(0xEE))
        into = made.device.stream()
        into.wait_event(made.device.computed())
        new_ids = random_.sample(range(BLOCKS), 11)
        copies = into.load(blocks, new_ids, saved)
        assert copies.finish() == sums(expected)
        assert [bytes_of(made.memory, name, block) for block in new_ids] == expected
        made.settle()
        touched = np.full(ROOM, 0xEE, np.uint8)
        for block, data in zip(new_ids, expected, strict=True):
            at = 0
            for piece in pieces_of(name):
                start = piece.offset + block * piece.stride
                touched[start : start + piece.nbytes] = np.frombuffer(
                    data[at : at + piece.nbytes], np.uint8
                )
                at += piece.nbytes
        assert made.memory.tobytes() == touched.tobytes()
        out.close()
        into.close()
        made.device.close()
        if made.driver is not None:
            assert not made.driver.wrong
            assert not made.driver.on_host
            assert not made.driver.registered
            assert len(made.driver.on_gpu) == 1


@pytest.mark.parametrize("finished", ["unfinished", "no event"])
def test_the_adversary_shows_a_wait_that_is_missing(finished: str) -> None:
    """Otherwise it would prove nothing."""
    adversary = AdversarialDevice()
    memory = np.zeros(ROOM, np.uint8)
    blocks = adversary.blocks(Memory(memory.ctypes.data, ROOM, memory), pieces_of("layers"), BLOCKS)
    adversary.compute(lambda: memory.fill(1))
    stream = adversary.stream()
    if finished == "unfinished":
        stream.wait_event(adversary.computed())
    (slot,) = slots(1, blocks.block_bytes)
    copies: Any = stream.save(blocks, [3], [slot])
    got = copies.unfinished() if finished == "unfinished" else copies.finish()
    assert got != sums([b"\x01" * blocks.block_bytes])


def test_small_pieces_cross_the_link_as_whole_blocks() -> None:
    made = make("gpu, kernel", 0, Temper.ANY)
    blocks = made.blocks("layers")
    stream = made.device.stream()
    stream.load(blocks, range(BLOCKS), slots(BLOCKS, blocks.block_bytes)).finish()
    assert made.driver is not None
    assert made.driver.copies == [blocks.block_bytes] * BLOCKS


def test_large_pieces_need_no_memory_of_the_gpu() -> None:
    made = make("gpu, copies", 0, Temper.ANY)
    blocks = made.blocks("layers")
    stream = made.device.stream()
    stream.load(blocks, range(BLOCKS), slots(BLOCKS, blocks.block_bytes)).finish()
    assert made.driver is not None
    assert made.driver.copies == [32] * 4 * BLOCKS
    assert len(made.driver.on_gpu) == 1
    assert not made.driver.on_host


def test_staging_is_bounded_however_much_is_started() -> None:
    made = make("gpu, nothing pinned", 0, Temper.LATE)
    blocks = made.blocks("layers")
    stream = made.device.stream()
    several: list[Copies] = [
        stream.save(blocks, range(BLOCKS), slots(BLOCKS, blocks.block_bytes)) for _ in range(3)
    ]
    assert made.driver is not None
    assert len(made.driver.on_gpu) - 1 <= 2
    for copies in several:
        copies.finish()
    assert len(made.driver.on_gpu) - 1 == 2
    assert len(made.driver.on_host) == 4  # Bytes and a table, twice.


def test_a_gpu_without_memory_to_spare_copies_piece_by_piece() -> None:
    made = make("gpu, kernel", 0, Temper.ANY)
    blocks = made.blocks("layers")
    assert made.driver is not None
    made.driver.refuses.add("allocate")
    made.memory[:] = 7
    (slot,) = slots(1, blocks.block_bytes)
    for _ in range(2):
        made.device.stream().save(blocks, [3], [slot]).finish()
    assert bytes(slot) == b"\x07" * blocks.block_bytes
    assert made.driver.calls.count("allocate") == 2  # The KV cache, and one try.


def test_without_staging_a_copy_fails_and_the_next_can_work() -> None:
    made = make("gpu, nothing pinned", 0, Temper.ANY)
    blocks = made.blocks("layers")
    assert made.driver is not None
    stream = made.device.stream()
    made.driver.refuses.add("allocate_host")
    with pytest.raises(DeviceFull):
        stream.save(blocks, [3], slots(1, blocks.block_bytes))
    made.driver.refuses.remove("allocate_host")
    stream.save(blocks, [3], slots(1, blocks.block_bytes)).finish()
    stream.close()
    assert not made.driver.on_host


@pytest.mark.parametrize("kind", KINDS[2:])
@pytest.mark.parametrize("call", ["copy", "run_kernel", "wait", "record"])
@pytest.mark.parametrize("save", [True, False])
def test_after_an_error_nothing_is_under_way(kind: str, call: str, save: bool) -> None:
    """Whichever call of a copy fails first: what had been started is waited for before the
    error is raised, for then slots and blocks are handed on."""
    failed = 0
    for nth in range(12):
        made = make(kind, nth, Temper.LATE)
        blocks = made.blocks("layers")
        driver = made.driver
        assert driver is not None
        stream = made.device.stream()
        mine = slots(BLOCKS, blocks.block_bytes)
        count = 0
        real = getattr(driver, call)

        def failing(*arguments: Any, real: Any = real, nth: int = nth) -> Any:
            nonlocal count
            count += 1
            if count == nth + 1:
                raise DeviceError("refused")
            return real(*arguments)

        setattr(driver, call, failing)
        copy = stream.save if save else stream.load
        try:
            copy(blocks, range(BLOCKS), mine).finish()
            continue
        except DeviceError:
            failed += 1
        for slot in mine:
            slot[:] = b"\x11" * blocks.block_bytes
        made.memory[:] = 0x22
        driver.settle()
        assert {bytes(slot) for slot in mine} == {b"\x11" * blocks.block_bytes}
        assert set(made.memory.tolist()) == {0x22}
        stream.close()
    kernel = kind != "gpu, copies"
    assert failed or (call in ("run_kernel", "wait") and not kernel)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_a_gpu_that_disappears_is_an_error_at_whichever_call(kind: str) -> None:
    lost = 0
    for calls in range(40):
        made = make(kind, 0, Temper.ANY)
        blocks = made.blocks("layers")
        assert made.driver is not None
        stream = made.device.stream()
        made.driver.fails_after = calls
        try:
            stream.wait_event(made.device.computed())
            stream.load(blocks, range(BLOCKS), slots(BLOCKS, blocks.block_bytes)).finish()
        except DeviceLost:
            lost += 1
            event = made.device.computed()  # On the engine's thread: it must not fail.
            with pytest.raises(DeviceLost):
                stream.wait_event(event)
        made.device.close()
    assert lost


def test_leaving_a_flight_by_an_error_finishes_what_was_started() -> None:
    adversary = AdversarialDevice()
    memory = np.zeros(ROOM, np.uint8)
    blocks = adversary.blocks(Memory(memory.ctypes.data, ROOM, memory), pieces_of("layers"), BLOCKS)
    stream = adversary.stream()
    mine = slots(4, blocks.block_bytes)
    with pytest.raises(ValueError, match="mine"), Flight() as flight:
        for index in range(4):
            flight.add(stream.load(blocks, [index], mine[index : index + 1]), lambda got: None)
        raise ValueError("mine")
    memory[:] = 0x33
    adversary.settle()
    assert set(memory.tolist()) == {0x33}


def test_an_error_on_landing_finishes_the_others() -> None:
    finished = []

    class Failing:
        def __init__(self, name: str, error: Exception | None) -> None:
            self.name, self.error = name, error

        def finish(self) -> list[int]:
            finished.append(self.name)
            if self.error:
                raise self.error
            return []

    with pytest.raises(DeviceFull), Flight() as flight:
        flight.add(Failing("first", DeviceFull("no")), lambda got: None)
        flight.add(Failing("second", DeviceError("no")), lambda got: None)
    assert finished == ["first", "second"]
