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

from kvstore.device import codec
from kvstore.device.adversarial import AdversarialDevice, Temper
from kvstore.device.base import Coding, Copies, Device, Memory, Piece
from kvstore.device.flight import Flight
from kvstore.device.gpu import GpuDevice, Tuning
from kvstore.device.host import HostDevice
from kvstore.errors import DeviceError, DeviceFull, DeviceLost, DeviceStuck
from tests.unit.device.fakes import FakeDriver
from tests.unit.device.round_trips import coded

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


def elsewhere(made: Made, nbytes: int, count: int) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Other memory of the device, and where so many blocks lie in it."""
    size = count * nbytes
    other = made.driver.give_kv_cache(size) if made.driver else np.zeros(size, np.uint8)
    return other, [other.ctypes.data + index * nbytes for index in range(count)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("temper", Temper)
def test_what_lies_on_the_device_is_loaded_from_there(kind: str, name: str, temper: Temper) -> None:
    for seed in range(4):
        made = make(kind, seed, temper)
        blocks = made.blocks(name)
        other, addresses = elsewhere(made, blocks.block_bytes, 11)
        other[:] = np.frombuffer(random.Random(seed).randbytes(other.size), np.uint8)
        made.launch(lambda made=made: made.memory.fill(0xEE))
        stream = made.device.stream()
        stream.wait_event(made.device.computed())
        ids = random.Random(seed).sample(range(BLOCKS), 11)
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
def test_what_was_computed_is_saved_to_where_others_load_it(
    kind: str, name: str, temper: Temper
) -> None:
    for seed in range(4):
        made = make(kind, seed, temper)
        blocks = made.blocks(name)
        other, addresses = elsewhere(made, blocks.block_bytes, 11)
        content = np.frombuffer(random.Random(seed).randbytes(ROOM), np.uint8)
        made.launch(lambda made=made, content=content: np.copyto(made.memory, content))
        stream = made.device.stream()
        stream.wait_event(made.device.computed())
        ids = random.Random(seed).sample(range(BLOCKS), 11)
        with Flight() as flight:
            flight.add(stream.save_within(blocks, ids[:7], addresses[:7]), lambda got: None)
            flight.add(stream.save_within(blocks, ids[7:], addresses[7:]), lambda got: None)
        saved = other.tobytes()
        assert saved == b"".join(bytes_of(content, name, block) for block in ids)
        made.launch(lambda made=made: made.memory.fill(0xEE))
        made.settle()
        assert other.tobytes() == saved
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


CODINGS = [Coding("fp8", "bfloat16"), Coding("int4", "float16"), Coding("int4", "float32")]
IN_GROUPS = [Piece(7 * 4, 5 * 128, 128), Piece(BLOCKS * 640 + 32, 400, 384)]
"""Of 32 elements; not where the GPU would have them."""
APART = [Piece(0, 64, 40), Piece(BLOCKS * 64, 88, 88)]
"""A group lies in two of these."""
CODED_ROOM = BLOCKS * 1100


def coded_on(kind: str, seed: int, temper: Temper) -> Made:
    made = make(kind, seed, temper)
    if made.driver is not None:
        made.memory = made.driver.give_kv_cache(CODED_ROOM)
        made.driver.has_coding = "processor" not in kind
    else:
        made.memory = np.zeros(CODED_ROOM, np.uint8)
    return made


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("pieces", [IN_GROUPS, APART])
@pytest.mark.parametrize("kind", [*KINDS, "gpu, by the processor"])
def test_coded_blocks_are_the_same_bytes_on_each_device(
    kind: str, pieces: list[Piece], coding: Coding
) -> None:
    """The reference's, in slots and in the KV cache."""
    for seed, temper in enumerate(Temper):
        made = coded_on(kind, seed, temper)
        memory = Memory(made.memory.ctypes.data, CODED_ROOM, made.memory)
        blocks: Any = made.device.blocks(memory, pieces, BLOCKS, coding)
        raw = [random.Random(seed + block).randbytes(sum(p.nbytes for p in pieces))
               for block in range(BLOCKS)]  # fmt: skip
        expected = [coded(each, coding) for each in raw]
        made.launch(lambda made=made, raw=raw: put(made.memory, pieces, raw))
        stream = made.device.stream()
        stream.wait_event(made.device.computed())
        saved = slots(BLOCKS, blocks.block_bytes)
        assert stream.save(blocks, range(BLOCKS), saved).finish() == sums(expected)
        assert [bytes(slot) for slot in saved] == expected
        made.launch(lambda made=made: made.memory.fill(0xEE))
        stream.wait_event(made.device.computed())
        stream.load(blocks, range(BLOCKS), saved).finish()
        back = np.full(CODED_ROOM, 0xEE, np.uint8)
        put(back, pieces, [decoded(each, coding, len(raw[0])) for each in expected])
        assert made.memory.tobytes() == back.tobytes()
        stream.close()
        made.device.close()
        assert made.driver is None or not made.driver.wrong


def put(memory: np.ndarray[Any, Any], pieces: list[Piece], blocks: list[bytes]) -> None:
    for number, block in enumerate(blocks):
        at = 0
        for piece in pieces:
            start = piece.offset + number * piece.stride
            part = block[at : at + piece.nbytes]
            memory[start : start + piece.nbytes] = np.frombuffer(part, np.uint8)
            at += piece.nbytes


def decoded(stored: bytes, coding: Coding, nbytes: int) -> bytes:
    into = bytearray(nbytes)
    codec.decode(*coding, memoryview(stored), memoryview(into))
    return bytes(into)


@pytest.mark.parametrize("kind", ["host", "adversarial", "gpu, kernel", "gpu, copies"])
def test_coded_blocks_lie_coded_in_the_gpus_own_memory(kind: str) -> None:
    coding = CODINGS[0]
    made = coded_on(kind, 0, Temper.ANY)
    memory = Memory(made.memory.ctypes.data, CODED_ROOM, made.memory)
    blocks: Any = made.device.blocks(memory, IN_GROUPS, BLOCKS, coding)
    other, addresses = elsewhere(made, blocks.block_bytes, 2)
    raw = [random.Random(number).randbytes(512) for number in range(2)]
    put(made.memory, IN_GROUPS, raw)
    stream = made.device.stream()
    stream.save_within(blocks, [0, 1], addresses).finish()
    assert other.tobytes() == b"".join(coded(each, coding) for each in raw)
    assert blocks.within
    made.memory[:] = 0xEE
    stream.load_within(blocks, [0, 1], addresses).finish()
    back = np.full(CODED_ROOM, 0xEE, np.uint8)
    put(back, IN_GROUPS, [decoded(coded(each, coding), coding, 512) for each in raw])
    assert made.memory.tobytes() == back.tobytes()


def test_coded_blocks_in_the_gpus_own_memory_are_left_alone_without_a_kernel() -> None:
    """What reads them falls back to the host's memory."""
    made = coded_on("gpu, by the processor", 0, Temper.ANY)
    memory = Memory(made.memory.ctypes.data, CODED_ROOM, made.memory)
    blocks = made.device.blocks(memory, IN_GROUPS, BLOCKS, CODINGS[0])
    assert not blocks.within
    with pytest.raises(DeviceError, match="no kernel"):
        made.device.stream().load_within(blocks, [0], [made.memory.ctypes.data])


def test_a_gpu_without_memory_to_spare_leaves_coding_to_the_processor() -> None:
    made = coded_on("gpu, kernel", 0, Temper.ANY)
    memory = Memory(made.memory.ctypes.data, CODED_ROOM, made.memory)
    blocks: Any = made.device.blocks(memory, IN_GROUPS, BLOCKS, CODINGS[0])
    assert made.driver is not None
    made.driver.refuses.add("allocate")
    raw = random.Random(0).randbytes(512)
    put(made.memory, IN_GROUPS, [raw])
    (slot,) = slots(1, blocks.block_bytes)
    for _ in range(2):
        made.device.stream().save(blocks, [0], [slot]).finish()
        assert bytes(slot) == coded(raw, CODINGS[0])
    assert "run_coding" not in made.driver.calls


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


@pytest.mark.parametrize("kind", ["gpu, copies", "gpu, kernel"])
@pytest.mark.parametrize("stuck", [{0}, {1}, {0, 1}])
def test_what_cannot_be_waited_for_is_said_to_be_and_its_stream_copies_no_more(
    kind: str, stuck: set[int]
) -> None:
    """Of a stream's two each is waited for, whatever has become of the other."""
    made = make(kind, 1, Temper.LATE)
    blocks = made.blocks("layers")
    driver = made.driver
    assert driver is not None
    stream: Any = made.device.stream()
    mine = slots(BLOCKS, blocks.block_bytes)
    stream.save(blocks, range(BLOCKS), mine).finish()
    stream.wait_event(made.device.computed())
    both, drained, real = (stream.link, stream.gathering), [], driver.drain

    def drain(one: Any) -> None:
        drained.append(both.index(one))
        if drained[-1] in stuck:
            raise DeviceError("no answer")
        real(one)

    driver.drain = drain  # type: ignore[method-assign]
    driver.refuses.add("!record")
    with pytest.raises(DeviceStuck):
        stream.save(blocks, range(BLOCKS), mine)
    assert drained == [0, 1]
    driver.refuses.clear()
    for again in (stream.save, stream.load):
        with pytest.raises(DeviceStuck):
            again(blocks, range(BLOCKS), mine)
    stream.close()
    assert isinstance(made.device, GpuDevice)
    assert stream in made.device.open_streams, "nothing that it uses is given back"


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
    finished.clear()
    with pytest.raises(DeviceStuck), Flight() as flight:
        flight.add(Failing("first", DeviceFull("no")), lambda got: None)
        flight.add(Failing("second", DeviceStuck("no")), lambda got: None)
        flight.add(Failing("third", DeviceError("no")), lambda got: None)
        raise ValueError("mine")
    assert finished == ["first", "second", "third"]
