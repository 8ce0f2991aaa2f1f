"""Tests that hang leave nothing behind, and end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import bounded

HOME = Path(bounded.__file__).parent.parent
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


@pytest.mark.parametrize("times", [1, 2])
def test_who_is_told_to_stop_leaves_nothing_behind(tmp_path: Path, times: int) -> None:
    shown = tmp_path / "shown"
    program = f"""
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
if os.fork():
    open({str(shown)!r}, "w").close()
while True:
    time.sleep(600)
"""
    command = [sys.executable, bounded.__file__, "300", sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not shown.exists():
            time.sleep(0.02)
        process.terminate()
        assert process.stdout is not None
        # The command has heard of it.
        said = process.stdout.readline()
        if times > 1:
            process.terminate()
        # To the end of what the command would say, too.
        process.communicate(timeout=200)
    assert said == b"told\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_a_parent_that_ignores_its_children_changes_no_exit_code() -> None:
    """As it is inherited."""
    command = [sys.executable, bounded.__file__, "100", sys.executable, "-c", "raise SystemExit(3)"]
    ignoring = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    starts = f"{ignoring}; os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", starts, *command], timeout=200, check=False)
    assert done.returncode == 3


LEAVES = """
import threading, time
from tests import conftest

conftest.EXIT_S = 1.0
pytest_unconfigure = conftest.pytest_unconfigure


def test_it():
    threading.Thread(target=time.sleep, args=(600,)).start()
"""


def test_a_thread_that_a_test_leaves_behind_fails_the_run_and_is_shown(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(LEAVES)
    (tmp_path / "test_it.py").write_text("from conftest import test_it")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTHONPATH": str(HOME)},
    )  # fmt: skip
    assert "1 passed" in done.stdout
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr


PYTHON = """#!/bin/sh
case "$*" in
"-m pytest "*) ;;
*) exec {python} "$@" ;;
esac
echo "$*" >> {ran}
case "$*" in *" and not soak $FAILS"*) ;; *) exit 0 ;; esac
exec {python} -m pytest -q -p no:cacheprovider -c /dev/null --noconftest {fails}
"""
LANES = [
    "--ignore",
    "tests/e2e/test_one_server.py",
    "tests/e2e/test_variants.py",
    "tests/unit",
    "tests/integration/server",
]
"""What each of the lanes of `make test` begins with."""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("fails", ["none", *LANES])
def test_where_a_test_of_any_lane_fails_make_fails(tmp_path: Path, fails: str) -> None:
    test, ran, python = (tmp_path / name for name in ("test_it.py", "ran", "python"))
    test.write_text("def test_it() -> None:\n    raise ValueError\n")
    python.write_text(PYTHON.format(python=sys.executable, ran=ran, fails=test))
    python.chmod(0o755)
    made = (".venv/.ready-dev", ".venv/.ready-run", ".venv-router/.ready", "wire-tools", "lint")
    command = ["make", "test", f"BIN={tmp_path}", *(word for each in made for word in ("-o", each))]
    # Not a part of the make that runs this.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        command, cwd=HOME, env={**ours, "FAILS": fails}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    lanes = ran.read_text().splitlines()
    assert (done.returncode == 0) == (fails == "none"), done.stdout + done.stderr
    assert ("1 failed" in done.stdout) == (fails != "none")
    assert fails != "none" or len(lanes) == len(LANES)
