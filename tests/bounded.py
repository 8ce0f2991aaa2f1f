"""Run a command, and have an end: of it after a time, and of whatever it has started.

    python bounded.py SECONDS COMMAND...

A test that hangs is ended by its own limit, which ends the process that runs the tests and
nothing else: servers, engines and forked processes go on, keep cores busy beside the tests that
come next, and may hold the pipe that somebody reads to its end. And there is no such limit on
what comes before the first test and after the last.

The exit code is the command's, 124 if it took too long. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TOO_LONG = 124
POLL_S = 0.1
DUMP_S = 10.0
"""For a Python with faulthandler to tell where it hangs, and die of it."""
GRACE_S = 3.0
"""For what has been told to end to do so."""
_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str]) -> int:
    limit_s, command = float(arguments[0]), arguments[1:]
    # Whose parent has ended is this process's child, and not the init process's.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    # Whoever ignores this has no children to wait for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # An interrupt typed at a terminal reaches the command, too, which ends as it likes.
    signal.signal(signal.SIGINT, lambda *_: None)
    # Noted, no more: `timeout` and `make` say it twice, and the second time it must not end
    # whoever is ending what is left.
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: told.append(number))
    try:
        return _run(command, limit_s, told)
    finally:
        _end_all()


def _run(command: list[str], limit_s: float, told: list[int]) -> int:
    process = subprocess.Popen(command)
    deadline = time.monotonic() + limit_s
    code = _wait(process, deadline, told)
    if code is not None:
        return code if code >= 0 else 128 - code
    if told:
        os.kill(process.pid, told[0])
        return 128 + told[0]
    _say(f"{' '.join(command)} takes longer than {limit_s:.0f} s")
    os.kill(process.pid, signal.SIGABRT)
    _wait(process, time.monotonic() + DUMP_S, told)
    return TOO_LONG


def _wait(process: subprocess.Popen[bytes], deadline: float, told: list[int]) -> int | None:
    """Its exit code; None after the deadline, or once this process was told to end. Others that
    end meanwhile are reaped."""
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == process.pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode
        if not ended:
            if told or time.monotonic() > deadline:
                return None
            time.sleep(POLL_S)


def _end_all() -> None:
    """Children, those that come to be when these end, and so on."""
    kill_at = time.monotonic() + GRACE_S
    give_up_at = kill_at + DUMP_S
    said: set[int] = set()
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        now = time.monotonic()
        for child in _children() if now > kill_at else ():
            if child not in said:
                said.add(child)
                _say(f"left behind, and killed: {_name(child)}")
            os.kill(child, signal.SIGKILL)
        if now > give_up_at:
            return
        time.sleep(POLL_S)


def _children() -> list[int]:
    """Those that have not been waited for keep their numbers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # A process's name may be any bytes.
            parent = int(stat.read_bytes().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid():
            found.append(int(stat.parent.name))
    return found


def _name(child: int) -> str:
    words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
    return f"{child} {b' '.join(words).decode(errors='replace')[:200]}"


def _say(text: str) -> None:
    sys.stderr.write(f"bounded: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
