"""A real server, killed again and again under a real load on a real directory.

After each restart what is answered is what was stored, what was flushed is answered,
and what was cleared is not. At the end the directory is sound.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from kvstore.client.sync import Client
from kvstore.errors import KVStoreError
from kvstore.tiers.nvme_fsck import check
from kvstore.types import PutOutcome
from tests.integration.server.blocks import SPEC, content, key, kill
from tests.integration.server.harness import PATIENCE_S, daemon

CHAIN = 8
ASKED = 100
"""Blocks asked for after each restart, of those that could be there."""


class Load:
    """Stores, reads, flushes and clears until the server is gone."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.stored: set[int] = set()
        """Perhaps: the answer may not have come."""
        self.confirmed: set[int] = set()
        self.safe: set[int] = set()
        """Flushed: a crash of the process does not lose them."""
        self.cleared: set[int] = set()
        self.wrong: list[str] = []
        self.clears = self.flushes = self.reads = self.steps = 0
        self._next = 1

    def run(self, endpoint: str) -> None:
        """In a thread; ends with the connection."""
        self.confirmed = set(self.safe)
        try:
            with Client(endpoint) as client:
                layout = client.register_layout(SPEC)
                while True:
                    self._step(client, layout)
        except KVStoreError:
            return

    def _step(self, client: Client, layout: object) -> None:
        self.steps += 1
        what = self.rng.random()
        if what < 0.5 or not self.stored:
            numbers = range(self._next, self._next + CHAIN)
            self._next += CHAIN
            datas = [content(number) for number in numbers]
            # Should the call be cut short, they may be there all the same.
            self.stored.update(numbers)
            outcomes = client.put_many(layout, [key(n) for n in numbers], datas)  # type: ignore[arg-type]
            assert PutOutcome.PRESENT not in outcomes
            done = zip(numbers, outcomes, strict=True)
            self.confirmed.update(n for n, outcome in done if outcome is PutOutcome.STORED)
        elif what < 0.9:
            self.ask(client, layout, self.rng.sample(sorted(self.stored), min(8, len(self.stored))))
        elif what < 0.99:
            before = set(self.confirmed)
            client.flush(self.rng.random() < 0.5)
            self.safe |= before
            self.flushes += 1
        else:
            going = set(self.stored)
            self.safe.clear()
            self.confirmed.clear()
            client.clear()
            self.cleared |= going
            self.stored.clear()
            self.clears += 1

    def ask(self, client: Client, layout: object, numbers: list[int]) -> None:
        self.reads += len(numbers)
        for number, got in zip(
            numbers,
            client.get_many(layout, [key(n) for n in numbers]),  # type: ignore[arg-type]
            strict=True,
        ):
            if got is not None and bytes(got) != content(number):
                self.wrong.append(f"block {number}: other bytes")

    def verify(self, endpoint: str) -> None:
        """Ask for what must be there, may be there, and must not."""
        with Client(endpoint, timeout_s=PATIENCE_S) as client:
            layout = client.register_layout(SPEC)
            some = sorted(self.stored)
            self.ask(client, layout, self.rng.sample(some, min(ASKED, len(some))))
            for numbers, must in ((self.safe, True), (self.cleared, False)):
                some = self.rng.sample(sorted(numbers), min(ASKED, len(numbers)))
                for number in some:
                    if client.lookup(layout, [key(number)]).held != must:
                        self.wrong.append(f"block {number} is there: {not must}")


def kill_again_and_again(directory: Path, rounds: int, most_steps: int, seed: int) -> Load:
    """Each time after some steps of the load, in the middle of another."""
    load = Load(seed)
    sizes = ("--nvme-capacity", "512MiB", "--dram-capacity", "16MiB")
    for _ in range(rounds):
        with daemon(directory, *sizes) as server:
            server.wait_ready()
            endpoint = str(server.socket_path)
            load.verify(endpoint)
            assert load.wrong == []
            thread = threading.Thread(target=load.run, args=(endpoint,))
            thread.start()
            enough = load.steps + load.rng.randint(most_steps // 5, most_steps)
            while load.steps < enough and thread.is_alive():
                time.sleep(0.001)
            time.sleep(load.rng.uniform(0.0, 0.02))
            kill(server)
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        if len(load.stored) > 6000:
            break  # More would not fit, and what was flushed could be gone for that.
    return load


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_twenty_times_it_has_what_was_flushed_and_nothing_wrong(tmp_path: Path) -> None:
    load = kill_again_and_again(tmp_path, 20, 60, seed=1)
    assert load.wrong == []
    assert load.flushes > 20
    assert load.reads > 1000
    report = check(tmp_path / "data")
    assert report.sound, report


@pytest.mark.soak
def test_killed_five_hundred_times(tmp_path: Path) -> None:
    for part in range(20):
        directory = tmp_path / str(part)
        directory.mkdir()
        assert kill_again_and_again(directory, 25, 150, seed=part).wrong == []
        assert check(directory / "data").sound
