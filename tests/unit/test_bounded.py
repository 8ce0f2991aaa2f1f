"""Tests that hang leave nothing behind, and end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import bounded

FORKS = """
import os, signal, sys, time
if os.fork():
    sys.exit({code})
os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    time.sleep(600)
print("started", flush=True)
time.sleep(600)
"""


def run(limit_s: float, program: str) -> subprocess.CompletedProcess[str]:
    """Returns once nobody has the end of its output open any more."""
    command = [sys.executable, bounded.__file__, str(limit_s), sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize("code", [0, 3])
def test_what_is_left_of_a_command_does_not_hold_its_output(code: int) -> None:
    done = run(100, FORKS.format(code=code))
    assert done.returncode == code
    assert done.stderr.count("left behind, and killed") == 2


def test_a_command_that_takes_too_long_tells_where_it_is_and_ends() -> None:
    where = 'File "<string>", line 1'
    for limit_s in (2, 10, 50):
        done = run(limit_s, "import faulthandler, time; faulthandler.enable(); time.sleep(600)")
        assert done.returncode == bounded.TOO_LONG
        if where in done.stderr:  # Else the machine stood still before it was there.
            break
    assert where in done.stderr


def test_one_that_ends_by_a_signal_has_failed() -> None:
    done = run(100, "import os; os.kill(os.getpid(), 9)")
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr == ""


def test_who_is_told_to_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    program = f"import time; open({str(shown)!r}, 'w').close(); time.sleep(600)"
    command = [sys.executable, bounded.__file__, "300", sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not shown.exists():
            time.sleep(0.02)
        process.terminate()
        # To the end of what the command would say, too.
        process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM
