"""A child process that answers one line of JSON for each line it is sent.

Its standard error goes to a file, whose end is part of every error: a child that
dies says why.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from kvstore.errors import KVStoreError
from kvstore_benchmarks.closing import Closing

STOP_TIMEOUT_S = 20.0
_LOG_TAIL_LINES = 12


class ChildFailed(KVStoreError):
    """The child ended, or did not answer in time."""


class Pipe(Closing):
    """The parent's end. A context manager; leaving it ends the child and its children."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """`environment` is added to this process's own."""
        self._log = open_log("child")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | dict(environment),
            start_new_session=True,
        )
        self._answers: deque[str] = deque()
        self._arrived = threading.Semaphore(0)
        self._reader = threading.Thread(target=self._read, name="child-answers", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, request: Mapping[str, Any]) -> None:
        """Raises `ChildFailed`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ChildFailed(f"the process is gone: {self._log_tail()}") from error

    def receive(self, timeout_s: float) -> Any:
        """The next answer. Raises `ChildFailed`."""
        if not self._arrived.acquire(timeout=timeout_s):
            raise ChildFailed(f"no answer in {timeout_s:g} s: {self._log_tail()}")
        if not self._answers:
            self._arrived.release()  # Whoever asks again is told the same.
            raise ChildFailed(f"the process ended: {self._log_tail()}")
        return json.loads(self._answers.popleft())

    def close(self, farewell: Mapping[str, Any] | None = None) -> None:
        """End the child: by `farewell` and the end of its input, or by force. Idempotent."""
        if self._log.closed:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if farewell is not None:
                self.send(farewell)
            self._process.stdin.close()
            self._process.wait(STOP_TIMEOUT_S)
        except (ChildFailed, OSError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        with suppress(OSError):  # Of what the child did not read.
            self._process.stdin.close()
        self._reader.join(STOP_TIMEOUT_S)
        self._process.stdout.close()
        self._log.close()

    def _read(self) -> None:
        """A thread of its own, so that waiting for an answer can end."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.append(line)
            self._arrived.release()
        self._arrived.release()

    def _log_tail(self) -> str:
        return log_tail(self._log)


def open_log(name: str) -> IO[bytes]:
    """Where a child may write; gone when it is closed."""
    return tempfile.NamedTemporaryFile("w+b", prefix=f"kvstore-{name}-", suffix=".log")


def log_tail(log: IO[bytes]) -> str:
    """The last lines of what a child wrote."""
    text = Path(log.name).read_text(errors="replace")
    return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:])
