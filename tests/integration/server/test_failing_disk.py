"""A real server on a drive that fails, below all of its code: calls of the C library on
segments and on the index are spoilt by a library loaded before it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.client.sync import Client
from kvstore.errors import Unavailable
from kvstore.tiers.nvme_fsck import check
from kvstore.types import TierStats
from tests.integration.server.blocks import ask, connected, content, find_all, key, kill, store
from tests.integration.server.harness import PATIENCE_S, daemon

SOURCE = Path(__file__).with_name("failing_disk.c")
SAFE = range(1, 201)
LATER = range(201, 401)
FRESH = range(500, 540)
SIZES = ("--nvme-capacity", "256MiB", "--dram-capacity", "16MiB")


class Faults:
    """Of the drive, for servers started after this was made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, fault: str) -> None:
        (self._folder / fault).touch()

    def end(self, fault: str) -> None:
        (self._folder / fault).unlink()


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library, folder = tmp_path / "failing_disk.so", tmp_path / "faults"
    folder.mkdir()
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True
    )
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("FAILING_DISK", str(folder))
    return Faults(folder)


def nvme(client: Client) -> TierStats:
    return client.stats().tiers[1]


def eventually(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "fault",
    ["write-error", "read-error", "sync-error", "index-write-error", "index-sync-error"],
)
def test_a_drive_that_reports_errors_is_left_alone_and_memory_goes_on(
    fault: str, faults: Faults, tmp_path: Path
) -> None:
    with connected(tmp_path, *SIZES) as (_, client, layout):
        store(client, layout, SAFE)
        client.flush(True)
        faults.begin(fault)
        store(client, layout, LATER)
        if fault == "read-error":
            assert not ask(client, layout, SAFE)
        else:
            client.flush()
        assert not nvme(client).healthy
        assert ask(client, layout, LATER), "what is in memory is served"
        store(client, layout, FRESH)
        assert len(ask(client, layout, FRESH)) == len(FRESH)
    faults.end(fault)
    with connected(tmp_path, *SIZES) as (_, client, layout):
        find_all(client, layout, SAFE)
        ask(client, layout, LATER)
        assert nvme(client).healthy


@pytest.mark.parametrize("fault", ["write-lost", "sync-lost"])
def test_a_drive_that_lies_costs_blocks_and_nothing_else(
    fault: str, faults: Faults, tmp_path: Path
) -> None:
    with connected(tmp_path, *SIZES) as (server, client, layout):
        store(client, layout, SAFE)
        client.flush(True)
        faults.begin(fault)
        store(client, layout, LATER)
        client.flush(True)
        find_all(client, layout, SAFE)
        if fault == "sync-lost":  # Which is only missed when the power fails.
            find_all(client, layout, LATER)
        else:
            assert not ask(client, layout, LATER)
            assert client.stats().corrupt_blocks >= len(LATER) // 2
        kill(server)
    with connected(tmp_path, *SIZES) as (_, client, layout):
        assert len(ask(client, layout, SAFE)) >= len(SAFE) // 2
        ask(client, layout, LATER)
    check(tmp_path / "data")


def test_a_drive_that_hangs_costs_misses_until_it_answers(faults: Faults, tmp_path: Path) -> None:
    with connected(tmp_path, *SIZES) as (_, client, layout):
        store(client, layout, SAFE)
        client.flush(True)
        faults.begin("hang")
        assert not ask(client, layout, SAFE[:10])
        store(client, layout, FRESH)
        assert client.get(layout, key(FRESH[0])) == content(FRESH[0]), "memory is served"
        eventually(lambda: nvme(client).stalled)
        assert nvme(client).healthy
        assert not ask(client, layout, SAFE)
        faults.end("hang")
        eventually(lambda: not nvme(client).stalled)
        # For some seconds it is taken for as slow as it just was.
        find_all(client, layout, SAFE)
        assert nvme(client).stalls


def test_calls_that_need_a_drive_that_hangs_end_in_time(faults: Faults, tmp_path: Path) -> None:
    with connected(tmp_path, *SIZES) as (_, client, layout):
        store(client, layout, SAFE)
        client.flush(True)
        store(client, layout, FRESH)
        faults.begin("hang")
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(Unavailable):
                client.flush(timeout_s=0.5)
            assert time.monotonic() - began < PATIENCE_S / 2
        assert client.get(layout, key(FRESH[0])) == content(FRESH[0]), "memory is served"
        faults.end("hang")
        eventually(lambda: not nvme(client).stalled)
        client.flush()


@pytest.mark.slow
def test_a_server_whose_drive_hangs_stops_all_the_same(faults: Faults, tmp_path: Path) -> None:
    with connected(tmp_path, *SIZES, "--drain-s", "0.5") as (server, client, layout):
        store(client, layout, SAFE)
        client.flush(True)
        faults.begin("hang")
        store(client, layout, FRESH)
        server.process.terminate()
        code, said = server.end()
    assert code == os.EX_IOERR
    assert "does not answer and was left as it is" in said
    with daemon(tmp_path, *SIZES) as server:
        lock = tmp_path / "data" / "LOCK"
        eventually(lambda: lock.read_text() == f"{server.process.pid}\n")
        time.sleep(0.5)
        assert not Path(f"{server.socket_path}.json").exists(), "it waits for the drive"
        server.process.terminate()
        assert server.end()[0] == 0
    faults.end("hang")
    with connected(tmp_path, *SIZES) as (_, client, layout):
        find_all(client, layout, SAFE)
