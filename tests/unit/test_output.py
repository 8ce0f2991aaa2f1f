"""What a command does where what it prints cannot be written, and with words that mean nothing."""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.table import Table

from kvstore.cli import output
from kvstore.cli.main import main

COMMAND = [sys.executable, "-m", "kvstore.cli"]


def printing(*words: str, into: int, command: Sequence[str] = COMMAND) -> tuple[int, str]:
    """The code and standard error of a command that prints there, and does so at its end."""
    later = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(
        [*command, *words], stdout=into, stderr=subprocess.PIPE, text=True, env=later
    )
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("words", [("check-config",), ("serve", "--help"), ("--help",)])
def test_a_reader_that_has_read_enough_is_no_traceback(words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        code, said = printing(*words, into=writer)
    finally:
        os.close(writer)
    assert (code, said) == (128 + signal.SIGPIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        code, said = printing("check-config", into=full.fileno())
    assert code == 1
    assert said == "kvstore: No space left on device\n"


def test_a_socket_that_nobody_reads_is_no_traceback() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        assert printing("check-config", into=ours.fileno()) == (128 + signal.SIGPIPE, "")


FAILS = """
import sys
import kvstore.cli.check_config
from kvstore.cli.main import main
from kvstore.errors import ConfigError

def run(args):
    print("some of it")
    raise {error}

kvstore.cli.check_config.run = run
sys.exit(main(["check-config"]))
"""


@pytest.mark.parametrize(("error", "code"), [("ConfigError('no')", 78), ("KeyboardInterrupt", 130)])
def test_what_ends_a_command_has_its_code_where_nobody_reads(error: str, code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-c", FAILS.format(error=error)]
        ended, said = printing(into=writer, command=command)
    finally:
        os.close(writer)
    assert ended == code
    assert "Traceback" not in said
    assert "Exception ignored" not in said


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        TimeoutError("timed out"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        BrokenPipeError(),
        OSError(errno.EBADF, "Bad file descriptor"),
    ],
    ids=repr,
)
def test_an_error_that_says_nothing_by_itself_keeps_its_traceback(
    error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: object) -> int:
        raise error

    monkeypatch.setattr("kvstore.cli.check_config.run", run)
    with pytest.raises(type(error)):
        main(["check-config"])


def test_a_table_keeps_its_figures_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    console = output.console()
    console.file = io.StringIO()
    table = Table()
    for column in range(9):
        table.add_column(f"column {column}")
    table.add_row(*(f"{1234567 + column}" for column in range(9)))
    output.print_table(console, table)
    shown = console.file.getvalue()
    assert all(f"{1234567 + column}" in shown for column in range(9))
    assert console.width == 20


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "index", "--blocks", "x"),
        ("bench", "vllm", "--rounds", "0"),
        ("bench", "clients", "--seconds", "-1"),
        ("bench", "transfers", "--loads", "3"),
        ("flush", "--timeout", "-1"),
        ("clear", "--timeout", "soon"),
        ("simulate", "trace", "--expected", "1"),
        ("plan", "--gpus", "0"),
        ("plan", "--mfu", "2"),
    ],
    ids=" ".join,
)
def test_a_value_that_cannot_be_says_what_can(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert " is not a " in said
    assert "invalid" not in said, "argparse's own words name our functions"


def test_a_folder_that_cannot_be_used_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["bench", "index", "--quick", "--dir", str(file / "below")]) == 1
    assert capsys.readouterr().err.endswith(f"kvstore: {file / 'below'}: Not a directory\n")


def test_a_command_without_a_server_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for words in (["status"], ["status", "--endpoint", str(tmp_path / "none.sock")]):
        assert main(words) == os.EX_UNAVAILABLE
        assert "start one with `kvstore serve`" in capsys.readouterr().err
