"""Finding or starting a server, with a stand-in for `python -m kvstore_server`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.errors import BadRequest, Unavailable, Untrusted
from kvstore.local import spawn
from kvstore.local.attach import attach_path
from tests.unit.local.attach_server import AttachServer
from tests.unit.local.test_ownership import ANOTHER, as_root, listen_as_another

STAND_IN = """
import os, socket, sys, time
from kvstore.local.attach import Attached, decode_request, encode_reply
path = sys.argv[sys.argv.index("--socket") + 1]
with open(path + ".starts", "a") as starts:
    starts.write(f"{os.getpid()} {os.getsid(0) == os.getpid()} {' '.join(sys.argv[1:])}\\n")
if "--fail" in sys.argv:
    print("data directory is not writable", file=sys.stderr)
    sys.exit(3)
if "--hang" in sys.argv:
    time.sleep(90)
    sys.exit()
time.sleep(0.3)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(path + ".attach")
listener.listen(64)
while True:
    connection, _ = listener.accept()
    if connection.recv(4096):
        connection.send(encode_reply(Attached(b"s" * 16, b"e", 4096, "t")))
        connection.recv(4096)
    connection.close()
"""

RACER = """
import sys
from kvstore.local.spawn import ensure_server
sys.stdin.read(1)
print(ensure_server(sys.argv[1], timeout_s=30))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The socket path of a server that is not there yet."""
    package = tmp_path / "modules" / "kvstore_server"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    here = str(Path(spawn.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{here}")
    path = tmp_path / "run" / "s"
    yield path
    for pid in (int(line.split()[0]) for line in starts(path)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def starts(path: Path) -> list[str]:
    file = Path(f"{path}.starts")
    return file.read_text().splitlines() if file.exists() else []


def test_many_racing_processes_start_exactly_one_server(stand_in: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(stand_in)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("x")
        racer.stdin.flush()
    said = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert sorted(said) == ["False"] * 5 + ["True"]
    assert len(starts(stand_in)) == 1


def test_a_started_server_is_detached_and_knows_its_arguments(stand_in: Path) -> None:
    assert spawn.ensure_server(stand_in, ["--more", "1"], idle_exit_s=2.5, timeout_s=30)
    (start,) = starts(stand_in)
    _, leads_session, arguments = start.split(" ", 2)
    assert leads_session == "True"
    assert arguments == f"--socket {stand_in} --idle-exit-s 2.5 --more 1"
    assert Path(f"{stand_in}.log").stat().st_mode & 0o777 == 0o600
    assert stand_in.parent.stat().st_mode & 0o777 == 0o700


def test_a_starter_that_kills_all_below_it_leaves_the_server(stand_in: Path) -> None:
    """vLLM does when it is told to end, and others use the server."""
    script = "import sys; from kvstore.local.spawn import ensure_server; ensure_server(sys.argv[1])"
    command = [sys.executable, "-c", f"{script}; sys.stdin.read()", str(stand_in)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as starter:
        deadline = time.monotonic() + 30
        while not spawn._listening(str(stand_in)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (start,) = starts(stand_in)
        status = Path(f"/proc/{start.split()[0]}/status").read_text()
        assert f"PPid:\t{starter.pid}\n" not in status


def test_a_server_that_is_there_is_taken_as_it_is(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with AttachServer(attach_path(path)):
        assert spawn.ensure_server(path, timeout_s=30) is False
    assert not (tmp_path / "s.log").exists()


def test_a_server_that_gives_up_is_reported_with_its_last_words(stand_in: Path) -> None:
    with pytest.raises(Unavailable, match=r"ended while starting.*data directory is not writable"):
        spawn.ensure_server(stand_in, ["--fail"], timeout_s=30)
    with pytest.raises(Unavailable, match="ended while starting"):
        spawn.ensure_server(stand_in, ["--fail"], timeout_s=30)


def test_a_server_that_never_answers_costs_the_timeout(stand_in: Path) -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable, match="in time"):
        spawn.ensure_server(stand_in, ["--hang"], timeout_s=0.5)
    assert time.monotonic() - started < 45


def test_a_hung_server_is_not_joined_by_a_second_one(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(attach_path(path))
        listener.listen(8)
        with pytest.raises(Unavailable):
            spawn.ensure_server(path, timeout_s=0.3)
    assert not (tmp_path / "s.log").exists()


def test_the_socket_of_a_dead_server_does_not_stop_a_new_one(stand_in: Path) -> None:
    stand_in.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{stand_in}.attach.old")
    os.rename(f"{stand_in}.attach.old", attach_path(str(stand_in)))
    with pytest.raises(Unavailable, match="ended while starting"):
        # The stand-in does not clear the stale socket away; that it was started
        # to try is what matters here.
        spawn.ensure_server(stand_in, timeout_s=30)
    assert len(starts(stand_in)) == 1


@as_root
def test_nothing_is_started_or_attached_to_in_another_users_directory(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    os.chown(tmp_path, ANOTHER, ANOTHER)
    with pytest.raises(Untrusted, match="another user"):
        spawn.ensure_server(path)
    with AttachServer(attach_path(path)), pytest.raises(Untrusted, match="another user"):
        spawn.ensure_server(path)
    assert not list(tmp_path.glob("s.l*"))


@as_root
def test_another_users_server_is_refused_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with AttachServer(attach_path(path)) as server:
        listen_as_another(server._listener)
        with pytest.raises(Untrusted, match=f"user {ANOTHER}'s"):
            spawn.ensure_server(path)


@pytest.mark.parametrize("suffix", [spawn.LOG_SUFFIX, spawn.LOCK_SUFFIX])
def test_a_link_in_a_files_place_is_neither_written_nor_quoted(stand_in: Path, suffix: str) -> None:
    stand_in.parent.mkdir()
    secret = stand_in.parent / "mine"
    secret.write_text("precious")
    Path(f"{stand_in}{suffix}").symlink_to(secret)
    with pytest.raises(Unavailable, match="cannot start a server") as raised:
        spawn.ensure_server(stand_in, ["--fail"], timeout_s=30)
    assert secret.read_text() == "precious"
    assert "precious" not in str(raised.value)
    assert "precious" not in spawn._log_tail(str(stand_in))


def test_a_path_too_long_for_a_socket_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="107"):
        spawn.ensure_server("/tmp/" + "x" * 105)
