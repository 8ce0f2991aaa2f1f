"""The measurements, each beside plain pinned copies in the same round."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvstore.device.base import Blocks, Coding, Copies, Device, Stream
from kvstore.device.flight import Flight
from kvstore.device.gpu_driver import Driver
from kvstore.types import CODECS
from kvstore_benchmarks.figures import finite, gbps, median, ratio, timed
from kvstore_benchmarks.gpu.drive import from_drive
from kvstore_benchmarks.gpu.rig import EXTENT_BYTES, Rig, no_checksums
from kvstore_benchmarks.progress import Progress

KERNEL, BATCH = 1 << 40, 0
"""`Tuning.kernel_below` that has all pieces gathered, or none."""

CHUNK_BYTES = 32 << 20
"""What the connector starts at a time."""


_BLOCKS = tuple(1 << shift for shift in (14, 16, 18, 20, 21, 22, 24, 26))
_PIECES = tuple(1 << shift for shift in range(12, 20))


class Options(NamedTuple):
    """Sizes in bytes. `pieces`: of a block in pieces. `moved`: for the check of what
    arrives, in all. `directory`: on the drive to be read from; None: where temporary files
    lie."""

    nbytes: int = 1 << 30
    rounds: int = 7
    blocks: tuple[int, ...] = _BLOCKS
    piece_bytes: tuple[int, ...] = _PIECES
    pieces: int = 64
    moved: int = 16 << 30
    extent_bytes: int = EXTENT_BYTES
    computing_s: float = 1.0
    directory: Path | None = None

    @property
    def largest(self) -> int:
        """Bytes of a block that can be measured."""
        return min(self.nbytes // 2, self.extent_bytes)


QUICK = Options(nbytes=128 << 20, rounds=2, moved=1 << 30, computing_s=0.2)

Compute = Callable[[], None]
"""Some milliseconds of the GPU's computing, launched into the engine's stream and waited for."""


def measure(
    driver: Driver, options: Options, compute: Compute | None, step: Progress
) -> dict[str, Any]:
    """All figures. GB/s are 10^9 bytes a second; ratios are those within a round."""
    with closing(Rig(driver, options.nbytes, options.extent_bytes)) as rig:
        step("whole blocks")
        figures: dict[str, Any] = {"blocks": _whole(rig, options)}
        step("blocks in pieces")
        figures["pieces"] = _in_pieces(rig, options)
        step("within the GPU")
        figures["within"] = _within(rig, options)
        step("coding")
        figures["coded"] = _coded(rig, options)
        step("checksums")
        figures["checked"] = _checked(rig, options)
        step("from a drive")
        whole = min(2 << 20, options.largest)
        figures["drive"] = from_drive(rig, options.directory, whole, options.rounds)
        step("beside computing")
        figures["computing"] = None if compute is None else _beside(rig, options, compute)
        step("what arrives")
        figures["moved"] = _what_arrives(rig, options)
    return figures


def _whole(rig: Rig, options: Options) -> dict[str, Any]:
    return {
        str(nbytes): _against_plain(rig, options, nbytes, 1, BATCH, checked=False)
        for nbytes in options.blocks
        if nbytes <= options.largest
    }


def _in_pieces(rig: Rig, options: Options) -> dict[str, Any]:
    return {
        str(nbytes): {
            name: _against_plain(rig, options, nbytes, options.pieces, below, checked=False)
            for name, below in (("kernel", KERNEL), ("batch", BATCH))
        }
        for nbytes in options.piece_bytes
        if nbytes * options.pieces <= options.largest
    }


def _within(rig: Rig, options: Options) -> dict[str, Any]:
    """Blocks from the GPU's own memory, as the store's there are loaded, and into it, as those
    that are handed over land, beside one copy of as many bytes within it."""
    whole = min(2 << 20, options.largest)
    piece = min(16 << 10, options.largest // options.pieces)
    shapes = {"whole": (whole, 1, BATCH), "pieces": (piece, options.pieces, KERNEL)}
    return {
        name if loads else f"{name}, handed over": _against_a_copy_within(
            rig, options, *shape, loads=loads
        )
        for loads in (True, False)
        for name, shape in shapes.items()
    }


def _against_a_copy_within(
    rig: Rig, options: Options, piece: int, pieces: int, kernel_below: int, *, loads: bool
) -> dict[str, Any]:
    taken: list[tuple[float, float]] = []
    source = rig.driver.allocate(rig.nbytes)
    raw = rig.driver.new_stream()
    with closing(rig.device(kernel_below)) as device, closing(device.stream()) as stream:
        blocks, count = rig.blocks(device, piece, pieces)
        nbytes = count * blocks.block_bytes
        addresses = [source + index * blocks.block_bytes for index in range(count)]
        copy = stream.load_within if loads else stream.save_within
        step = max(1, CHUNK_BYTES // blocks.block_bytes)
        ends = [np.array([each], np.uint64) for each in (rig.on_gpu, source, nbytes)]
        for number in range(options.rounds + 1):
            with timed() as plain:
                rig.driver.copy(ends[0], ends[1], ends[2], raw)
                rig.driver.synchronize(rig.driver.record(raw))
            with timed() as ours, Flight() as flight:
                for first in range(0, count, step):
                    some = range(first, min(first + step, count))
                    copies = copy(blocks, some, addresses[some.start : some.stop])
                    flight.add(copies, lambda _: None)
            if number:  # The first touches everything for the first time.
                taken.append((ours.seconds, plain.seconds))
    rig.driver.free(source)
    return {
        "gbps": finite(gbps(nbytes, median([ours for ours, _ in taken])), 2),
        "ratio": finite(median([ratio(plain, ours) for ours, plain in taken]), 3),
    }


def _coded(rig: Rig, options: Options) -> dict[str, Any]:
    """Blocks that are coded on their way out and brought back on their way in. The bytes are
    those of the KV cache; fewer cross the link."""
    whole = min(2 << 20, options.largest)
    piece = min(16 << 10, options.largest // options.pieces)
    return {
        f"{codec}, {name}": _against_plain(
            rig, options, *shape, KERNEL, checked=False, coding=Coding(codec, "bfloat16")
        )
        for codec in CODECS
        for name, shape in (("whole", (whole, 1)), ("pieces", (piece, options.pieces)))
    }


def _checked(rig: Rig, options: Options) -> dict[str, Any]:
    """With checksums, as the connector copies."""
    nbytes = min(2 << 20, options.largest)
    return _against_plain(rig, options, nbytes, 1, BATCH, checked=True)


def _against_plain(
    rig: Rig,
    options: Options,
    piece: int,
    pieces: int,
    kernel_below: int,
    *,
    checked: bool,
    coding: Coding | None = None,
) -> dict[str, Any]:
    """GB/s and the ratio to a plain copy, each way."""
    taken: dict[str, list[tuple[float, float]]] = {"to_gpu": [], "to_host": []}
    with closing(rig.device(kernel_below)) as device:
        if not checked:
            device.checksums = no_checksums
        blocks, count = rig.blocks(device, piece, pieces, coding)
        slots = rig.slots(count, blocks.block_bytes)
        pinned = rig.pin(device, slots)
        stream = device.stream()
        ids = list(range(count))
        for number in range(options.rounds + 1):
            for name, start in (("to_gpu", stream.load), ("to_host", stream.save)):
                with timed() as plain:
                    rig.copy_plainly(to_gpu=name == "to_gpu")
                with timed() as ours:
                    in_chunks(start, blocks, ids, slots)
                if number:  # The first touches everything for the first time.
                    taken[name].append((ours.seconds, plain.seconds))
        stream.close()
        del slots
    nbytes = count * piece * pieces
    return {"pinned": pinned} | {
        name: {
            "gbps": finite(gbps(nbytes, median([ours for ours, _ in pairs])), 2),
            "plain_gbps": finite(gbps(rig.nbytes, median([plain for _, plain in pairs])), 2),
            "ratio": finite(
                median([ratio(plain / rig.nbytes, ours / nbytes) for ours, plain in pairs]), 3
            ),
        }
        for name, pairs in taken.items()
    }


def in_chunks(
    start: Callable[[Blocks, Sequence[int], Sequence[memoryview]], Copies],
    blocks: Blocks,
    ids: Sequence[int],
    slots: Sequence[memoryview],
) -> list[int]:
    """As the connector does it: a few chunks under way at a time."""
    sums: list[int] = []
    size = max(1, CHUNK_BYTES // blocks.block_bytes)
    with Flight() as flight:
        for first in range(0, len(ids), size):
            part = slice(first, first + size)
            flight.add(start(blocks, ids[part], slots[part]), sums.extend)
    return sums


def _beside(rig: Rig, options: Options, compute: Compute) -> dict[str, Any]:
    """How much longer computing takes while another thread copies without a pause."""
    figures: dict[str, Any] = {}
    for name, piece, pieces, below in (
        ("whole blocks", min(2 << 20, options.largest), 1, BATCH),
        ("small pieces", min(16 << 10, options.largest // options.pieces), options.pieces, KERNEL),
    ):
        with closing(rig.device(below)) as device:
            blocks, count = rig.blocks(device, piece, pieces)
            slots = rig.slots(count, blocks.block_bytes)
            rig.pin(device, slots)
            alone, beside, moved = [], [], 0
            for number in range(options.rounds + 1):
                quiet = _computing(compute, options.computing_s)
                with _Copying(device, blocks, slots) as copying:
                    busy = _computing(compute, options.computing_s)
                moved += copying.moved
                if number:
                    alone.append(quiet)
                    beside.append(busy)
            del slots
        slower = [ratio(each, quiet) for each, quiet in zip(beside, alone, strict=True)]
        figures[name] = {"slowdown": finite(median(slower) - 1, 4), "moved": moved}
    return figures


def _computing(compute: Compute, seconds: float) -> float:
    """Seconds a call."""
    compute()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        compute()
        calls += 1
    return (time.perf_counter() - start) / calls


class _Copying:
    """Loads and saves in a thread, in turn, until left."""

    def __init__(self, device: Device, blocks: Blocks, slots: list[memoryview]) -> None:
        self.moved = 0
        self._end = False
        arguments = (device.stream(), blocks, slots)
        self._thread = threading.Thread(target=self._run, args=arguments)

    def __enter__(self) -> _Copying:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end = True
        self._thread.join()

    def _run(self, stream: Stream, blocks: Blocks, slots: list[memoryview]) -> None:
        with closing(stream):
            while not self._end:
                for start in (stream.load, stream.save):
                    in_chunks(start, blocks, range(len(slots)), slots)
                    self.moved += len(slots) * blocks.block_bytes


def _what_arrives(rig: Rig, options: Options) -> dict[str, Any]:
    """Random bytes saved, loaded elsewhere, and looked at: blocks that are not the same."""
    random = np.random.default_rng()
    wrong, moved = 0, 0
    whole = min(2 << 20, options.largest)
    small = min(16 << 10, options.largest // options.pieces)
    shapes = [(whole, 1, BATCH), (whole // 32, 1, BATCH), (small, options.pieces, KERNEL)]
    shapes += [(48, options.pieces, KERNEL), (37, options.pieces, KERNEL)]
    plain = np.frombuffer(rig.plain, np.uint8)
    while moved < options.moved:
        for piece, pieces, below in shapes:
            plain[:] = np.frombuffer(random.bytes(rig.nbytes), np.uint8)
            before = plain.copy()
            rig.copy_plainly(to_gpu=True)
            with closing(rig.device(below)) as device, closing(device.stream()) as all_:
                blocks, count = rig.blocks(device, piece, pieces)
                count = min(count, rig.nbytes // 2 // blocks.block_bytes, 1 << 14)
                slots = rig.slots(count, blocks.block_bytes)
                ids = random.permutation(rig.nbytes // blocks.block_bytes)[:count].tolist()
                saved = in_chunks(all_.save, blocks, ids, slots)
                plain[:] = 0
                rig.copy_plainly(to_gpu=True)
                elsewhere = random.permutation(ids).tolist()
                loaded = in_chunks(all_.load, blocks, elsewhere, slots)
                rig.copy_plainly(to_gpu=False)
                del slots
            wrong += sum(one != other for one, other in zip(saved, loaded, strict=True))
            shape = (pieces, rig.nbytes // (piece * pieces), piece)
            was, now = (each[: np.prod(shape)].reshape(shape) for each in (before, plain))
            same = now[:, elsewhere] == was[:, ids]
            wrong += count - int(same.all(axis=(0, 2)).sum())
            moved += 2 * count * blocks.block_bytes
            if moved >= options.moved:
                break
    return {"nbytes": moved, "wrong_blocks": wrong}
