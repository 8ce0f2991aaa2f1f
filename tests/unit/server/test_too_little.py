"""A server that may run out of something says so when it starts, not when it has."""

from __future__ import annotations

import resource

import pytest

from kvstore.config import StoreConfig
from kvstore.machine import Machine
from kvstore_server.app import warn_of_too_little

MIB = 1 << 20


class Small(Machine):
    def available_memory_bytes(self) -> int:
        return 100 * MIB


@pytest.fixture(autouse=True)
def few_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))


def sizes(dram: int, nvme: int) -> StoreConfig:
    return StoreConfig(
        dram_capacity_bytes=dram * MIB,
        nvme_capacity_bytes=nvme * MIB,
        extent_bytes=MIB,
        nvme_extent_bytes=MIB,
        max_sessions=8,
    )


def test_what_there_is_enough_of_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_too_little(sizes(32, 64), Small())
    assert not caplog.messages


def test_more_memory_than_there_is_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_too_little(sizes(101, 0), Small())
    assert ["dram.capacity" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize(("dram", "nvme"), [(100, 13), (1, 112)])
def test_more_descriptors_than_are_allowed_are_told_of(
    caplog: pytest.LogCaptureFixture, dram: int, nvme: int
) -> None:
    warn_of_too_little(sizes(dram, nvme), Small())
    assert ["ulimit" in message for message in caplog.messages] == [True]
