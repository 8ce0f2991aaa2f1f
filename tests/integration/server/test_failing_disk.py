"""A real server on a drive that fails, below all of its code: calls of the C library on
segments are spoilt by a library loaded before it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.client.lease import Layout
from kvstore.client.sync import Client
from kvstore.tiers.nvme_fsck import check
from tests.integration.server.harness import daemon
from tests.integration.server.test_full_disk import ask
from tests.integration.server.test_killed import SPEC, content, key

SOURCE = Path(__file__).with_name("failing_disk.c")
SAFE = range(1, 201)
LATER = range(201, 401)
SIZES = ("--nvme-capacity", "256MiB", "--dram-capacity", "16MiB")


@pytest.fixture
def spoil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Switches a fault on, for servers started after this."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library, faults = tmp_path / "failing_disk.so", tmp_path / "faults"
    faults.mkdir()
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True
    )
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("FAILING_DISK", str(faults))
    return lambda fault: (faults / fault).touch()


def store(client: Client, layout: Layout, numbers: range) -> None:
    for start in range(numbers.start, numbers.stop, 40):
        part = range(start, min(start + 40, numbers.stop))
        client.put_many(layout, [key(n) for n in part], [content(n) for n in part])


@pytest.mark.parametrize("fault", ["write-error", "read-error", "sync-error"])
def test_a_drive_that_reports_errors_is_left_alone_and_memory_goes_on(
    fault: str, spoil: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with daemon(tmp_path, *SIZES) as server:
        server.wait_ready()
        with Client(str(server.socket_path)) as client:
            layout = client.register_layout(SPEC)
            store(client, layout, SAFE)
            client.flush(True)
            spoil(fault)
            store(client, layout, LATER)
            if fault == "read-error":
                assert not ask(client, layout, SAFE)
            else:
                client.flush()
            nvme = client.stats().tiers[1]
            assert not nvme.healthy
            assert ask(client, layout, LATER), "what is in memory is served"
            fresh = range(500, 540)
            store(client, layout, fresh)
            assert len(ask(client, layout, fresh)) == 40
        server.process.terminate()
        assert server.process.wait(20) == 0
    monkeypatch.delenv("LD_PRELOAD")
    with daemon(tmp_path, *SIZES) as server:
        server.wait_ready()
        with Client(str(server.socket_path)) as client:
            layout = client.register_layout(SPEC)
            assert len(ask(client, layout, SAFE)) == len(SAFE), "what was flushed is there"
            ask(client, layout, LATER)
            assert client.stats().tiers[1].healthy


@pytest.mark.parametrize("fault", ["write-lost", "sync-lost"])
def test_a_drive_that_lies_costs_blocks_and_nothing_else(
    fault: str, spoil: Callable[[str], None], tmp_path: Path
) -> None:
    with daemon(tmp_path, *SIZES) as server:
        server.wait_ready()
        with Client(str(server.socket_path)) as client:
            layout = client.register_layout(SPEC)
            store(client, layout, SAFE)
            client.flush(True)
            spoil(fault)
            store(client, layout, LATER)
            client.flush(True)
            assert len(ask(client, layout, SAFE)) == len(SAFE)
            held = ask(client, layout, LATER)
            # A sync that is not done is only missed when the power fails.
            assert len(held) == (len(LATER) if fault == "sync-lost" else 0)
            if fault == "write-lost":
                assert client.stats().corrupt_blocks >= len(LATER) // 2
        server.process.kill()
        server.process.wait()
        Path(f"{server.socket_path}.json").unlink()
    with daemon(tmp_path, *SIZES) as server:
        server.wait_ready()
        with Client(str(server.socket_path)) as client:
            layout = client.register_layout(SPEC)
            assert len(ask(client, layout, SAFE)) >= len(SAFE) // 2
            ask(client, layout, LATER)
        server.process.terminate()
        assert server.process.wait(20) == 0
    check(tmp_path / "data")
