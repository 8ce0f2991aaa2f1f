"""Virtual time, and the drive in it: what is due when, and what a batch takes beside others."""

from __future__ import annotations

import pytest

from kvstore.drive import Pace
from kvstore.sim.batches import Batches
from kvstore.sim.events import BEGIN_NS, Events
from kvstore.types import Tier

READ, WRITE = Pace(1e6, 1.0), Pace(0.0, 2.0)


class Rig:
    def __init__(self) -> None:
        self.events = Events()
        self.drive = Batches(self.events, {Tier.DRAM: READ, Tier.NVME: WRITE})
        self.ended_ms: dict[str, float] = {}

    def begin(self, name: str, into: Tier, blocks: int, nbytes: int) -> None:
        def ended() -> None:
            self.ended_ms[name] = self.now_ms

        self.drive.begin(into, blocks, nbytes, ended)

    @property
    def now_ms(self) -> float:
        return (self.events.now_ns - BEGIN_NS) / 1e6


def test_batches_share_what_the_drive_moves() -> None:
    rig = Rig()
    rig.begin("small", Tier.DRAM, 1, 1_000_000)
    rig.begin("large", Tier.DRAM, 1, 3_000_000)
    rig.events.run()
    assert rig.ended_ms == pytest.approx({"small": 3, "large": 5})


def test_a_block_more_is_a_latency_more_and_the_drive_is_others_meanwhile() -> None:
    rig = Rig()
    rig.begin("four reads", Tier.DRAM, 4, 1_000_000)
    rig.begin("a write", Tier.NVME, 1, 1_000_000)
    rig.events.run()
    assert rig.ended_ms == pytest.approx({"a write": 2, "four reads": 5})


def test_a_drive_that_hangs_goes_on_where_it_was() -> None:
    rig = Rig()
    rig.begin("a write", Tier.NVME, 1, 1_000_000)
    rig.events.at(BEGIN_NS + 500_000, lambda: rig.drive.set_speed(0.0))
    rig.events.at(BEGIN_NS + 30_000_000, lambda: rig.drive.set_speed(0.5))
    rig.events.run()
    assert rig.ended_ms == pytest.approx({"a write": 33})


def test_a_drive_is_busy_while_it_has_something_to_do() -> None:
    rig = Rig()
    rig.begin("a write", Tier.NVME, 1, 1_000_000)
    rig.events.run(BEGIN_NS + 1_000_000)
    assert rig.drive.busy_ns == 1_000_000
    rig.events.run(BEGIN_NS + 10_000_000)
    rig.begin("another", Tier.NVME, 1, 1_000_000)
    rig.events.run(BEGIN_NS + 20_000_000)
    assert rig.drive.busy_ns == pytest.approx(4_000_000, abs=4)


def test_what_nobody_waits_for_keeps_nobody() -> None:
    events, done = Events(), []
    events.at(BEGIN_NS + 5, lambda: done.append("awaited"))
    events.at(BEGIN_NS + 3, lambda: done.append("before"), awaited=False)
    events.at(BEGIN_NS + 9, lambda: done.append("after"), awaited=False)
    events.run()
    assert done == ["before", "awaited"]
    assert events.now_ns == BEGIN_NS + 5


def test_who_rests_is_woken_once_and_before_anything_happens() -> None:
    events, done = Events(), []
    events.rest(lambda: done.append(events.now_ns - BEGIN_NS))
    events.run(BEGIN_NS + 50)
    for at in (70, 80):
        events.at(BEGIN_NS + at, lambda: done.append(-1))
    events.run()
    assert done == [70, -1, -1]
