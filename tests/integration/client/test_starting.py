"""A server started on demand by the processes that need it, and the examples that do so."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvstore
from kvstore.cli.connection import endpoint_of
from kvstore.errors import Untrusted
from tests.integration.client.conftest import Server

SMALL = ["--dram-capacity", "16MiB", "--dram-extent", "4MiB", "--nvme-capacity", "0", "--admin", ""]
EXAMPLES = Path(__file__).parents[3] / "examples" / "python"

RACER = """
import sys, kvstore
started = kvstore.ensure_server(sys.argv[1], sys.argv[2:], idle_exit_s=15, timeout_s=40)
with kvstore.Client(sys.argv[1]) as client:
    print(started, client.is_local, client.epoch.hex())
"""


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "run" / "s")
    yield path
    state = Path(f"{path}.json")
    if state.exists():
        os.kill(json.loads(state.read_text())["pid"], 9)


def test_racing_processes_share_the_one_server_they_start_and_it_ends_when_idle(
    socket: str,
) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, socket, *SMALL], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    said = sorted(racer.communicate(timeout=120)[0].split()[0:3] for racer in racers)
    assert [line[0] for line in said] == ["False"] * 3 + ["True"]
    assert {line[1] for line in said} == {"True"}
    assert len({line[2] for line in said}) == 1, "two servers were started"
    deadline = time.monotonic() + 90
    while Path(f"{socket}.json").exists():
        assert time.monotonic() < deadline, "an idle server stays"
        time.sleep(0.05)
    assert kvstore.ensure_server(socket, SMALL, idle_exit_s=5, timeout_s=40)


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_does_what_it_says(example: str, server: Server) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example), server.socket],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "shared memory" in done.stdout or "sums: [0.0, 16384.0, 32768.0, 49152.0]" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
@pytest.mark.parametrize("attach", [True, False], ids=["attach", "gRPC alone"])
def test_a_server_in_another_users_directory_is_used_only_where_it_is_named(
    driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, attach: bool
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    # Not the test's own directory, in which the server's name would be too long.
    with tempfile.TemporaryDirectory() as shared:
        monkeypatch.setattr(tempfile, "tempdir", shared)
        directory = Path(shared) / f"kvstore-{os.getuid()}"
        directory.mkdir(mode=0o700)
        path = directory / "kvstore.sock"
        server = Server(directory)
        server.arguments[1] = server.socket = str(path)
        server.start()
        try:
            if not attach:
                Path(f"{path}.attach").unlink()
            unnamed = argparse.Namespace(endpoint=None, config=None)
            driver(None).close()
            assert endpoint_of(unnamed) == str(path)
            os.chown(directory, 1001, 1001)
            with pytest.raises(Untrusted, match="another user"):
                driver(None)
            with pytest.raises(Untrusted, match="another user"):
                endpoint_of(unnamed)
            driver(str(path)).close()
            assert endpoint_of(argparse.Namespace(endpoint=str(path), config=None)) == str(path)
            with pytest.raises(Untrusted, match="another user"):
                kvstore.ensure_server(path)
        finally:
            server.kill()
