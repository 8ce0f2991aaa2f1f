"""Each wait of the connector's copies is needed: without any one of them bytes are wrong.

The device holds back what it is given, the engine's computing too, and does it in any order
that events allow. Rivals' connectors have corrupted KV for want of one such wait.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvstore.device import flight
from kvstore.device.adversarial import AdversarialDevice, Temper
from kvstore.device.vram_stand_in import StandInVram
from kvstore.errors import DeviceError, Unavailable
from kvstore_connectors.vllm import landing, loader, saver
from tests.unit.connectors.test_copies import BLOCKS, PIECE, Rank, eventually
from tests.unit.connectors.test_landing import Ground, handed_over
from tests.unit.device.gpus import StandInGpu
from tests.unit.device.planting import waits, without

NAMES = ("wait_event", "finish")
MODULES = (loader, saver, flight, landing)
BLOCK_BYTES = 2 * PIECE


class Modules:
    """The connector's copying, with one module of it changed."""

    def __init__(self, changed: ModuleType | None = None) -> None:
        name = "" if changed is None else changed.__name__
        self.loader = changed if changed and "loader" in name else loader
        self.saver = changed if changed and "saver" in name else saver
        self.flight = changed if changed and "flight" in name else flight
        self.landing = changed if changed and "landing" in name else landing

    def rank(self, device: AdversarialDevice, monkeypatch: pytest.MonkeyPatch) -> Rank:
        for module in (self.loader, self.saver):
            monkeypatch.setattr(module, "Flight", self.flight.Flight)
            monkeypatch.setattr(module, "CHUNK_BYTES", 4 * BLOCK_BYTES)
        monkeypatch.setattr(self.saver, "LandingZone", self.landing.LandingZone)
        return Rank(device=device, loader=self.loader.Loader, saver=self.saver.Saver)


def right(modules: Modules, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether all bytes are, whatever the device does."""
    return all(
        scenario(modules, AdversarialDevice(seed, temper), monkeypatch)
        for scenario in (stores, loads, fails_to_load, fails_to_store, lands, fails_to_land)
        for temper in Temper
        for seed in range(3)
    )


def stores(modules: Modules, device: AdversarialDevice, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Blocks are stored that the engine is still computing."""
    rank = modules.rank(device, monkeypatch)
    content = torch.randint(0, 256, rank.memory.shape, dtype=torch.uint8)
    device.compute(lambda: rank.memory.copy_(content))
    block_ids = random.sample(range(BLOCKS), 30)
    rank.saver.submit(rank.store_job(1, block_ids))
    eventually(rank.saver.take_reports)
    layers = content.view(2, BLOCKS, PIECE)
    wanted = {
        bytes([1, block]): bytes(layers[:, block].reshape(-1).tolist()) for block in block_ids
    }
    rank.close()
    return rank.store.blocks == wanted


def loads(modules: Modules, device: AdversarialDevice, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Blocks are loaded that their last owner is still using."""
    rank = modules.rank(device, monkeypatch)
    datas = [random.randbytes(BLOCK_BYTES) for _ in range(30)]
    block_ids = random.sample(range(BLOCKS), 30)
    device.compute(lambda: rank.memory.fill_(0xEE))
    failed = rank.load(rank.load_job(datas, block_ids))
    reported = [rank.bytes_of(block) for block in block_ids]
    device.settle()
    rank.close()
    settled = [rank.bytes_of(block) for block in block_ids]
    return not failed and reported == settled == datas


def fails_to_load(
    modules: Modules, device: AdversarialDevice, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """A load fails half way and is reported; the engine computes its blocks instead."""
    rank = modules.rank(device, monkeypatch)
    left = 10

    def lost() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Unavailable("gone")

    rank.store.before_slot = lost
    block_ids = list(range(30))
    failed = rank.load(rank.load_job([bytes(BLOCK_BYTES)] * 30, block_ids))
    rank.memory.fill_(0x33)
    device.settle()
    rank.close()
    return bool(failed) and set(rank.memory.tolist()) == {0x33}


def fails_to_store(
    modules: Modules, device: AdversarialDevice, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """A store fails half way; its slots are given back and become somebody else's."""
    rank = modules.rank(device, monkeypatch)
    real, left = rank.saver._stream.save, 3

    def save(blocks: Any, block_ids: Sequence[int], slots: Sequence[memoryview]) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise DeviceError("refused")
        return real(blocks, block_ids, slots)

    monkeypatch.setattr(rank.saver._stream, "save", save)
    rank.saver.submit(rank.store_job(1, list(range(30))))
    reports = rank.saver.take_reports()
    eventually(lambda: reports.update(rank.saver.take_reports()) or reports)
    for slot in rank.store.slots.values():
        slot[:] = b"\x77" * BLOCK_BYTES
    device.settle()
    rank.close()
    slots = set(map(bytes, rank.store.slots.values()))
    return reports[1].lost and not rank.store.blocks and slots == {b"\x77" * BLOCK_BYTES}


def lands(modules: Modules, device: AdversarialDevice, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Blocks that the engine is still computing are written to where another GPU's readers look
    as soon as they are committed."""
    with tempfile.TemporaryDirectory() as folder, _ground(folder) as ground:
        device.vram = StandInVram(ground.gpu.name)
        rank = modules.rank(device, monkeypatch)
        ground.serve(rank.store)
        seen: list[bytes] = []

        def look(call: str) -> None:
            if call == "commit":
                seen.extend(map(ground.at, ground.granted.values()))

        rank.store.on_call = look
        content = torch.randint(0, 256, rank.memory.shape, dtype=torch.uint8)
        device.compute(lambda: rank.memory.copy_(content))
        block_ids = random.sample(range(BLOCKS), 12)
        rank.saver.submit(handed_over(rank, 1, block_ids))
        eventually(rank.saver.take_reports)
        layers = content.view(2, BLOCKS, PIECE)
        wanted = [bytes(layers[:, block].reshape(-1).tolist()) for block in block_ids]
        rank.close()
    return seen == wanted and len(rank.store.landed) == len(block_ids)


def fails_to_land(
    modules: Modules, device: AdversarialDevice, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """A store fails half way; its places are given back and become somebody else's."""
    with tempfile.TemporaryDirectory() as folder, _ground(folder) as ground:
        device.vram = StandInVram(ground.gpu.name)
        rank = modules.rank(device, monkeypatch)
        ground.serve(rank.store)

        def refused(*_: Any) -> Any:
            raise DeviceError("refused")

        monkeypatch.setattr(rank.saver._stream, "save", refused)
        rank.saver.submit(handed_over(rank, 1, list(range(12))))
        eventually(rank.saver.take_reports)
        ground.fill(0x55)
        device.settle()
        rank.close()
        return {byte for place in ground.granted.values() for byte in ground.at(place)} == {0x55}


def _ground(folder: str) -> contextlib.closing[Ground]:
    return contextlib.closing(Ground(StandInGpu(Path(folder) / "gpu.json", 1 << 20)))


def test_with_all_its_waits_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    assert right(Modules(), monkeypatch)


@pytest.mark.parametrize(
    ("module", "line"),
    [(module, line) for module in MODULES for line in waits(module, *NAMES)],
)
def test_without_any_one_wait_it_is_not(
    module: ModuleType, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not right(Modules(without(module, line, NAMES, tmp_path)), monkeypatch)


def test_the_waits_are_found() -> None:
    """For the engine, before a load and before a store; for copies that arrive, and for
    those that are given up; for those that land."""
    assert [len(waits(module, *NAMES)) for module in MODULES] == [1, 1, 2, 1]
