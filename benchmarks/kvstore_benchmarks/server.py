"""A server of one's own for a measurement: small, stated sizes, in its own folder.

The folder holds the data and the log; the socket is under the temporary
directory, because a socket's path may not be long. Both go when the measurement
ends.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from kvstore.client.sync import Client
from kvstore.config import default_data_path
from kvstore.errors import KVStoreError, Unavailable
from kvstore_benchmarks.closing import Closing

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 150.0
DRAIN_S = "100"
"""What is measured after a restart must have been saved, however long the disk takes."""
IDLE_EXIT_S = "900"
"""Longer than the slowest start of an engine, which is the first to attach."""
_POLL_S = 0.05
_LOG_TAIL_LINES = 8


class Server(Closing):
    """`python -m kvstore_server` as a child process. A context manager.

    `restart` keeps the data: what comes back after it comes from NVMe.
    """

    def __init__(self, *, dram: str, nvme: str, folder: Path | None = None) -> None:
        """`dram`, `nvme`: capacities as in the configuration. `folder`: where the
        data may lie, for measuring that device; default: this user's cache."""
        parent = folder or default_data_path().parent
        parent.mkdir(parents=True, exist_ok=True)
        self._sizes = ("--dram-capacity", dram, "--nvme-capacity", nvme)
        self._home = Path(tempfile.mkdtemp(prefix="kvstore-bench-", dir=parent))
        self._run = Path(tempfile.mkdtemp(prefix="kvs-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return str(self._run / "kvstore.sock")

    @property
    def pid(self) -> int:
        """Of the running server."""
        assert self._process is not None
        return self._process.pid

    @property
    def home(self) -> Path:
        """On the device that is measured; removed at the end."""
        return self._home

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def start(self) -> None:
        """Return once the server answers. Raises `Unavailable` with the end of its log."""
        command = [sys.executable, "-m", "kvstore_server", "--socket", self.endpoint]
        command += ["--idle-exit-s", IDLE_EXIT_S]  # Should this process be killed.
        command += ["--drain-s", DRAIN_S]
        command += ["--admin", "", "--nvme-path", str(self._home / "data"), *self._sizes]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                Client(self.endpoint, timeout_s=5.0).close()
                return
            except KVStoreError as error:
                ended = self._process.poll()
                if ended is not None or time.monotonic() > deadline:
                    raise Unavailable(f"no server ({error}): {self._log_tail()}") from error
            time.sleep(_POLL_S)

    def stop(self) -> float:
        """Drain by SIGTERM; the seconds it took. Raises `Unavailable` if it must be killed."""
        assert self._process is not None
        process, self._process = self._process, None
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.wait()
            raise Unavailable(f"the server did not stop: {self._log_tail()}") from error
        if code != 0:
            raise Unavailable(f"the server ended with status {code}: {self._log_tail()}")
        return time.monotonic() - started

    def restart(self) -> float:
        """Stop and start on the same data; the seconds it took."""
        started = time.monotonic()
        self.stop()
        self.start()
        return time.monotonic() - started

    def close(self) -> None:
        try:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
        finally:
            shutil.rmtree(self._home, ignore_errors=True)
            shutil.rmtree(self._run, ignore_errors=True)

    @property
    def _log(self) -> Path:
        return self._home / "server.log"

    def _log_tail(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError as error:
            return f"its log cannot be read: {error}"
        return " | ".join(lines[-_LOG_TAIL_LINES:]) or "it wrote nothing"
