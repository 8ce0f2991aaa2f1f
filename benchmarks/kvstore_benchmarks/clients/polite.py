"""A polite client at work: look a prompt up, get what is held, put the rest."""

from __future__ import annotations

import resource
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from kvstore.client.lease import Layout
from kvstore.client.sync import Client
from kvstore.errors import KVStoreError
from kvstore.types import LayoutSpec, PutOutcome
from kvstore_benchmarks.clients.work import (
    SHAPES,
    STAMP_BYTES,
    Prompt,
    Work,
    common_bytes,
    stamp,
    stamped,
)

PUT_WAIT_MS = 100


@dataclass(slots=True)
class Tally:
    """What one client did and saw. Latencies in microseconds, of whole calls: a get or a
    put moves all blocks of a prompt that are, or are not, held."""

    steps: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    lookup_us: list[float] = field(default_factory=list)
    get_us: list[float] = field(default_factory=list)
    put_us: list[float] = field(default_factory=list)
    denied: int = 0
    """Blocks for which the server had no space."""
    missed: int = 0
    """Blocks that were gone between the lookup and the get."""
    wrong: int = 0
    """Blocks with other bytes than were put."""
    errors: dict[str, int] = field(default_factory=dict)
    cpu_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Polite:
    """One client's work. `fill` and `run` may be called again and again."""

    def __init__(self, client: Client, seed: int, number: int) -> None:
        self._client = client
        self._work = Work(seed, number)
        self._layouts = [register(client, shape.nbytes) for shape in SHAPES]
        self._sources = [
            _blocks(common_bytes(seed, shape.nbytes), shape.shared + shape.own) for shape in SHAPES
        ]
        self._targets = [_blocks(bytes(shape.nbytes), shape.shared + shape.own) for shape in SHAPES]

    def fill(self) -> None:
        """Put every document. Raises `KVStoreError`."""
        tally = Tally()
        for index, documents in enumerate(self._work.documents):
            for keys in documents:
                self._put(tally, Prompt(index, keys), 0)

    def run(self, start_ns: int, seconds: float) -> Tally:
        """Work from `start_ns` (CLOCK_MONOTONIC) on; steps begun in time are finished
        and counted."""
        tally, errors = Tally(), Counter[str]()
        end_ns = start_ns + int(seconds * 1e9)
        time.sleep(max(start_ns - time.monotonic_ns(), 0) / 1e9)
        cpu_s = _cpu_s()
        while time.monotonic_ns() < end_ns:
            try:
                self._step(tally)
            except KVStoreError as error:
                errors[type(error).__name__] += 1
        tally.cpu_s = _cpu_s() - cpu_s
        tally.errors = dict(errors)
        return tally

    def _step(self, tally: Tally) -> None:
        prompt = self._work.prompt()
        started = time.perf_counter_ns()
        held = self._client.lookup(self._layouts[prompt.shape], prompt.keys).held
        tally.lookup_us.append(_since(started))
        if held:
            self._get(tally, prompt, held)
        self._put(tally, prompt, held)
        tally.steps += 1

    def _get(self, tally: Tally, prompt: Prompt, held: int) -> None:
        keys, targets = prompt.keys[:held], self._targets[prompt.shape][:held]
        for target in targets:
            target[:STAMP_BYTES] = target[-STAMP_BYTES:] = bytes(STAMP_BYTES)
        started = time.perf_counter_ns()
        got = self._client.get_many(self._layouts[prompt.shape], keys, into=targets)
        tally.get_us.append(_since(started))
        for key, block in zip(keys, got, strict=True):
            if block is None:
                tally.missed += 1
            elif stamped(memoryview(block), key):
                tally.bytes_out += len(block)
            else:
                tally.wrong += 1

    def _put(self, tally: Tally, prompt: Prompt, held: int) -> None:
        keys = prompt.keys[held:]
        sources = self._sources[prompt.shape][: len(keys)]
        for key, source in zip(keys, sources, strict=True):
            stamp(source, key)
        parent = prompt.keys[held - 1] if held else b""
        started = time.perf_counter_ns()
        outcomes = self._client.put_many(
            self._layouts[prompt.shape], keys, sources, parent=parent, wait_ms=PUT_WAIT_MS
        )
        tally.put_us.append(_since(started))
        tally.denied += outcomes.count(PutOutcome.DENIED)
        tally.bytes_in += outcomes.count(PutOutcome.STORED) * SHAPES[prompt.shape].nbytes


def register(client: Client, nbytes: int) -> Layout:
    return client.register_layout(
        LayoutSpec(model="kvstore-crowd", dtype="uint8", block_tokens=32, block_bytes=nbytes)
    )


def _blocks(content: bytes, count: int) -> list[memoryview]:
    return [memoryview(bytearray(content)) for _ in range(count)]


def _since(started_ns: int) -> float:
    return (time.perf_counter_ns() - started_ns) / 1e3


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
