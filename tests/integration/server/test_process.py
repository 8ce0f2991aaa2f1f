"""The server as a process: how it starts, refuses to start, stops, and outlives clients."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1.kvstore_pb2_grpc import KVStoreStub
from tests.integration.server.harness import HANGS_S, PATIENCE_S, Daemon, daemon
from tests.unit.device.gpus import StandInGpu

HOLDER = """
import sys, time
from pathlib import Path
import asyncio
from tests.integration.server.harness import *

async def hold(socket_path, local):
    async with stub_for(f"unix:{socket_path}") as stub:
        if local:
            raw = RawAttachment(socket_path + ".attach")
            session_id = bytes.fromhex(raw.ask({"op": "attach", "protocol": 2})["session"])
        else:
            stream = stub.OpenSession(pb.OpenSessionRequest())
            session_id = (await stream.read()).session
        session = (("kvstore-session-bin", session_id),)
        layout_id = await register(stub)
        await put(stub, session, layout_id, 1, 2)
        await acquire(stub, session, layout_id, 1, 2)
        await reserve(stub, session, layout_id, 2)
        print("holding", flush=True)
        await asyncio.sleep(600)

asyncio.run(hold(sys.argv[1], sys.argv[2] == "local"))
"""

STOPPED_EARLY = """
import os, signal, sys
from kvstore.cli.serve import main

class AskedToStop:
    def find_spec(self, name, *_):
        if name == "kvstore_server.run":
            os.kill(os.getpid(), int(sys.argv[1]))

sys.meta_path.insert(0, AskedToStop())
sys.exit(main(["--nvme-capacity", "0", "--socket", sys.argv[2]]))
"""


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_while_the_server_is_imported_is_no_failure(
    tmp_path: Path, asked: signal.Signals
) -> None:
    command = [sys.executable, "-c", STOPPED_EARLY, str(int(asked)), str(tmp_path / "k.sock")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def stats(server: Daemon) -> Any:
    with grpc.insecure_channel(f"unix:{server.socket_path}") as channel:
        return KVStoreStub(channel).GetStats(pb.GetStatsRequest(), timeout=PATIENCE_S)


@contextmanager
def holder(server: Daemon, kind: str) -> Iterator[subprocess.Popen[str]]:
    """A client that holds something of everything, until it is killed or the end."""
    command = [sys.executable, "-c", HOLDER, str(server.socket_path), kind]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    ) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "holding\n"
            yield client
        finally:
            client.kill()


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_what_a_killed_client_held_is_back_within_two_seconds(tmp_path: Path, kind: str) -> None:
    with daemon(tmp_path, "--nvme-capacity", "0") as server:
        server.wait_ready()
        # The best of some: of a machine that stands still it says nothing.
        took_s = []
        while not took_s or (min(took_s) > 2 and len(took_s) < 5):
            with holder(server, kind) as client:
                held = stats(server)
                assert (held.sessions, held.leases, held.reservations) == (1, 1, 1)
                client.kill()
            began = time.monotonic()
            while (left := stats(server)).sessions:
                assert time.monotonic() < began + PATIENCE_S
                time.sleep(0.02)
            took_s.append(time.monotonic() - began)
            assert (left.leases, left.reservations) == (0, 0)
            assert left.tenant_blocks == 2
        assert min(took_s) <= 2


def test_sigterm_drains_commits_and_the_next_server_finds_the_blocks(tmp_path: Path) -> None:
    with daemon(tmp_path) as server:
        server.wait_ready()
        with holder(server, "local"):
            server.process.send_signal(signal.SIGTERM)
            code, err = server.end()
    assert code == 0
    assert json.loads(err.splitlines()[-1])["message"] == "stopped"
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["data", "k.sock.serving"]
    with daemon(tmp_path) as server:
        server.wait_ready()
        again = stats(server)
        assert again.tenant_blocks == 2
        assert again.tiers[1].blocks == 2


def test_a_second_signal_cuts_the_drain_short(tmp_path: Path) -> None:
    with daemon(tmp_path, "--nvme-capacity", "0", "--drain-s", str(HANGS_S)) as server:
        server.wait_ready()
        with grpc.insecure_channel(f"unix:{server.socket_path}") as channel:
            stub = KVStoreStub(channel)
            stream = stub.OpenSession(pb.OpenSessionRequest())
            metadata = (("kvstore-session-bin", next(stream).session),)
            layout = pb.Layout(model="m", dtype="x", block_tokens=1, block_bytes=1 << 20)
            layout_id = stub.RegisterLayout(pb.RegisterLayoutRequest(layout=layout)).layout_id

            def reserve(count: int, wait_ms: int) -> Any:
                request = pb.ReserveRequest(layout_id=layout_id, count=count, wait_ms=wait_ms)
                return stub.Reserve.future(request, metadata=metadata)

            reserve(8, 0).result()
            waiting = reserve(1, 60_000)  # DRAM is full: this call runs on.
            # Calls of one connection begin in their order: that one is under way.
            for _ in range(3):
                stub.GetStats(pb.GetStatsRequest(), timeout=PATIENCE_S)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(timeout=1)
            server.process.send_signal(signal.SIGTERM)
            code, _ = server.end()
            waiting.cancel()
            stream.cancel()
        assert code == 0


def test_a_server_without_sessions_ends_by_itself(tmp_path: Path) -> None:
    idle = ("--nvme-capacity", "0", "--idle-exit-s", "3")
    for _ in range(5):
        with daemon(tmp_path, *idle) as server, closing(unix_peer()) as peer:
            ready = Path(f"{server.socket_path}.json")
            while server.process.poll() is None and not ready.exists():
                time.sleep(0.02)
            try:
                peer.connect(f"{server.socket_path}.attach")
                peer.send(b'{"op":"attach","protocol":2}')
                attached = b"attached" in peer.recv(4096)
            except OSError:
                attached = False
            if not attached:  # On a machine that stood still it was idle for so long.
                assert server.end()[0] == 0
                continue
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(timeout=4)
            peer.close()
            assert server.end()[0] == 0
            return
    raise AssertionError("it never waited for its first session")


def unix_peer() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def test_a_second_server_leaves_the_first_one_alone(tmp_path: Path) -> None:
    with daemon(tmp_path) as first:
        first.wait_ready()
        with daemon(tmp_path) as same_socket:
            code, err = same_socket.end()
            assert code == os.EX_UNAVAILABLE
            assert err == f"kvstore: socket {first.socket_path}: another server is serving there\n"
        with daemon(tmp_path, name="other") as same_data:
            code, err = same_data.end()
            assert code == os.EX_TEMPFAIL
            assert err.startswith("kvstore: data directory ") and err.count("\n") == 1
            assert not same_data.socket_path.exists()
        assert stats(first).sessions == 0


def test_the_socket_of_a_dead_server_is_no_obstacle(tmp_path: Path) -> None:
    with daemon(tmp_path, "--nvme-capacity", "0") as first:
        first.wait_ready()
        first.process.kill()
        first.process.wait()
        assert first.socket_path.exists()
        Path(f"{first.socket_path}.json").unlink()
        with daemon(tmp_path, "--nvme-capacity", "0") as second:
            second.wait_ready()
            assert stats(second).sessions == 0


@pytest.mark.parametrize("flag", ["--listen", "--admin"])
def test_a_port_in_use_is_one_clear_line(tmp_path: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with daemon(tmp_path, "--nvme-capacity", "0", flag, address) as server:
            code, err = server.end()
    assert code == os.EX_UNAVAILABLE
    assert err == f"kvstore: {address} is in use by another process\n"


def test_a_foreign_file_at_the_sockets_path_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "k.sock").write_text("mine")
    with daemon(tmp_path) as server:
        code, err = server.end()
    assert code == os.EX_CANTCREAT
    assert "is in the way and is not a socket" in err
    assert (tmp_path / "k.sock").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_not_served_from(tmp_path: Path) -> None:
    os.chown(tmp_path, 1001, 1001)
    with daemon(tmp_path, "--nvme-capacity", "0") as server:
        code, err = server.end()
    assert code == os.EX_CANTCREAT
    assert err == f"kvstore: directory {tmp_path} belongs to another user\n"


def test_an_unusable_data_directory_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a directory")
    with daemon(tmp_path) as server:
        code, err = server.end()
    assert code == os.EX_CANTCREAT
    assert str(tmp_path / "data") in err and err.count("\n") == 1


def test_data_of_another_version_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "VERSION").write_text("kvstore-data 999\n")
    with daemon(tmp_path) as server:
        code, err = server.end()
    assert code == os.EX_DATAERR
    assert "999" in err and err.count("\n") == 1


def test_a_config_typo_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[server]\nsoket = '/x'\n")
    with daemon(tmp_path, "--config", str(file)) as server:
        code, err = server.end()
    assert code == os.EX_CONFIG
    assert err == (
        f"kvstore: unknown key server.soket in file {file}; did you mean server.socket?\n"
    )


def test_the_commands_for_people_work_on_a_running_server(tmp_path: Path) -> None:
    def kvstore(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvstore.cli", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)

    device = "modelled:h100+gen4-nvme"
    gpu = StandInGpu(tmp_path / "gpu", 4 << 30)
    gpu.say(refuses=["straight"])
    gpus = ("--vram-gpus", f"{gpu.name},stand-in:/none", "--vram-gpudirect", "true")
    with daemon(tmp_path, "--device", device, *gpus) as server:
        server.wait_ready()
        endpoint = ("--endpoint", str(server.socket_path))
        # The GPUs are looked at beside everything else.
        deadline = time.monotonic() + PATIENCE_S
        while "not known yet" in (for_people := kvstore("status", *endpoint).stdout):
            assert time.monotonic() < deadline, for_people
        shown = json.loads(kvstore("status", "--json", *endpoint).stdout)
        assert shown["pid"] == server.process.pid
        assert shown["admin"] == server.state["admin"]
        assert [tier["tier"] for tier in shown["tiers"]] == ["dram", "nvme"]
        assert shown["device"] == device
        there, refused = shown["vram"]
        assert (there["healthy"], there["capacity_bytes"]) == (True, 4 << 30)
        assert not there["reads_straight"]
        assert not refused["healthy"]
        assert refused["off_because"] == "there is no /none that says what the GPU is like"
        assert device in for_people
        assert "stand-in:/none is off: there is no /none" in for_people
        assert f"nothing is read straight into {gpu.name}: the GPU refuses straight" in for_people
        assert kvstore("flush", *endpoint).stdout == "0 blocks written\n"
        assert kvstore("flush", "--drop", *endpoint).stdout == "0 blocks written\n"
        assert kvstore("clear", *endpoint).returncode == os.EX_USAGE
        assert kvstore("clear", "--yes", *endpoint).stdout == "0 blocks forgotten\n"
        server.process.send_signal(signal.SIGTERM)
        _, logged = server.end()
        assert "it is no faster than NVIDIA H100" in logged
        gone = kvstore("status", *endpoint)
        assert gone.returncode == os.EX_UNAVAILABLE
        assert gone.stderr.startswith(f"kvstore: no server answers at {server.socket_path}; start")


def test_secrets_and_sockets_are_not_readable_by_others(tmp_path: Path) -> None:
    with daemon(tmp_path) as server:
        server.wait_ready()
        for name in ("k.sock", "k.sock.attach", "data/secret"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
