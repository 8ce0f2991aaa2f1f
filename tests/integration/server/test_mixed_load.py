"""An hour of everything at once: nothing wrong is answered, and nothing is kept for ever.

Clients come, store, read, look up, prefetch, flush and go, now and then clear, on a server that is
full, so that blocks leave and segments are emptied all the time. Once a minute all are
gone, and what the server still has of memory and descriptors is noted.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import xxhash

from kvstore.client.lease import Layout
from kvstore.client.sync import Client
from kvstore.errors import KVStoreError
from kvstore.tiers.nvme_fsck import check
from kvstore.types import LayoutSpec
from tests.integration.server.harness import Daemon, daemon

SPEC = LayoutSpec("m", "bfloat16", 16, 40_000)
CHAIN = 8
CHAINS = 4000
"""Of 8 blocks each: 1.3 GB, of which the server holds less than half."""
CLIENTS = 3
SIZES = ("--nvme-capacity", "512MiB", "--dram-capacity", "32MiB", "--dram-extent", "4MiB")

ROUND_S = 60.0
PAUSE_S = 0.12
"""Between a client's calls: all together use less than half a core."""
ROUNDS_A_CLEAR = 10
"""It is filled again at once, so that what is measured is always a full server."""
WARM_ROUNDS = 30
"""Until then the memory of a new server grows to its level: with its threads, and with the
first times it is cleared and filled again."""
PATIENCE_S = 300.0
"""On a machine that others use too."""
LEAK_BYTES_AN_HOUR = 1 << 20


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def content(number: int) -> bytes:
    seed = xxhash.xxh3_128_digest(number.to_bytes(8, "big"))
    return seed * (SPEC.block_bytes // len(seed))


class Sample(NamedTuple):
    seconds: float
    anonymous_bytes: int
    """Of the server, shared memory not included."""
    descriptors: int
    threads: int


class Load:
    def __init__(self, endpoint: str, seed: int) -> None:
        self.endpoint = endpoint
        self.rng = random.Random(seed)
        self.calls = self.read = self.hits = self.stored = self.clears = self.failed = 0
        self.wrong: list[str] = []

    def clear(self) -> None:
        with Client(self.endpoint, timeout_s=PATIENCE_S) as client:
            client.clear()
        self.clears += 1

    def fill(self, chains: range) -> None:
        """Store these chains. In a thread."""
        with Client(self.endpoint, timeout_s=PATIENCE_S) as client:
            layout = client.register_layout(SPEC)
            for chain in chains:
                self._put(client, layout, range(chain * CHAIN, (chain + 1) * CHAIN))

    def until(self, end: float) -> None:
        """In a thread."""
        while time.monotonic() < end:
            try:
                with Client(self.endpoint, timeout_s=PATIENCE_S) as client:
                    layout = client.register_layout(SPEC)
                    for _ in range(self.rng.randint(1, 200)):
                        self._step(client, layout)
                        time.sleep(self.rng.expovariate(1 / PAUSE_S))
                        if time.monotonic() >= end:
                            return
            except KVStoreError:
                self.failed += 1

    def _step(self, client: Client, layout: Layout) -> None:
        self.calls += 1
        # Half of the calls are for a quarter of the chains.
        first = int(CHAINS * self.rng.random() ** 2) * CHAIN
        numbers = range(first, first + CHAIN)
        keys = [key(number) for number in numbers]
        what = self.rng.random()
        if what < 0.35:
            self._put(client, layout, numbers)
        elif what < 0.90:
            self.read += len(numbers)
            for number, got in zip(numbers, client.get_many(layout, keys), strict=True):
                if got is not None:
                    self.hits += 1
                    if bytes(got) != content(number):
                        self.wrong.append(f"block {number}: other bytes")
        elif what < 0.95:
            client.lookup(layout, keys)
        elif what < 0.98:
            client.prefetch(layout, keys)
        else:
            client.flush(self.rng.random() < 0.2)

    def _put(self, client: Client, layout: Layout, numbers: range) -> None:
        client.put_many(layout, [key(n) for n in numbers], [content(n) for n in numbers])
        self.stored += len(numbers)


def look(server: Daemon, seconds: float) -> Sample:
    process = Path(f"/proc/{server.process.pid}")
    status = dict(
        line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line
    )
    anonymous = int(status["RssAnon"].split()[0]) << 10
    return Sample(seconds, anonymous, len(os.listdir(process / "fd")), int(status["Threads"]))


def bytes_an_hour(samples: list[Sample]) -> float:
    """The slope of the line that lies nearest to all of them."""
    mean_t = sum(s.seconds for s in samples) / len(samples)
    mean_b = sum(s.anonymous_bytes for s in samples) / len(samples)
    above = sum((s.seconds - mean_t) * (s.anonymous_bytes - mean_b) for s in samples)
    return 3600 * above / sum((s.seconds - mean_t) ** 2 for s in samples)


def mixed_load(directory: Path, rounds: int, log: Path) -> tuple[list[Load], list[Sample]]:
    """Every sample is a line of `log`."""
    samples: list[Sample] = []
    with daemon(directory, *SIZES) as server, log.open("w") as lines:
        server.wait_ready()
        said = threading.Thread(target=_drain, args=(server,), daemon=True)
        said.start()
        began = time.monotonic()
        loads = [Load(str(server.socket_path), seed) for seed in range(CLIENTS)]
        for number in range(rounds):
            if number % ROUNDS_A_CLEAR == 0:
                loads[0].clear()
                shares = [range(n, CHAINS, CLIENTS) for n in range(CLIENTS)]
                together([partial(each.fill, s) for each, s in zip(loads, shares, strict=True)])
            end = time.monotonic() + ROUND_S
            together([partial(each.until, end) for each in loads])
            time.sleep(2)
            samples.append(look(server, time.monotonic() - began))
            counts = {
                name: sum(getattr(each, name) for each in loads)
                for name in ("calls", "stored", "read", "hits", "clears", "failed")
            }
            lines.write(json.dumps(samples[-1]._asdict() | counts) + "\n")
            lines.flush()
            assert server.process.poll() is None
        server.process.terminate()
        assert server.process.wait(60) == 0
        said.join(10)
    return loads, samples


def together(works: list[Callable[[], None]]) -> None:
    """Each in a thread, to its end."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _drain(server: Daemon) -> None:
    """A pipe that nobody reads stops who writes to it."""
    assert server.process.stderr is not None
    for _ in server.process.stderr:
        pass


@pytest.mark.soak
def test_an_hour_of_mixed_load_leaves_nothing_behind(tmp_path: Path) -> None:
    log = Path(os.environ.get("KVSTORE_SOAK_LOG", tmp_path / "mixed_load.jsonl"))
    loads, samples = mixed_load(tmp_path, WARM_ROUNDS + 60, log)
    warm = samples[WARM_ROUNDS:]
    assert [wrong for load in loads for wrong in load.wrong] == []
    assert sum(load.hits for load in loads) > 10_000
    assert {s.descriptors for s in warm} == {warm[0].descriptors}
    assert bytes_an_hour(warm) < LEAK_BYTES_AN_HOUR
    assert check(tmp_path / "data").sound
