"""Find this host's server, or start one: exactly one, however many processes ask.

The lock `<socket>.lock` is held by whoever starts a server until that server
answers; everybody else waits for the lock and then finds it running. The lock
decides only who starts a server. That no two servers ever share data is the
server's own business.

What is there counts only if it is this user's or root's: the paths may be where others
can write.

The started server is detached: it outlives its starter, also one whose end takes all
processes below it along, as vLLM's does. It writes to `<socket>.log`, and ends itself when
nobody has used it for a while.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kvstore.errors import BadRequest, KVStoreError, NoTenant, Unavailable, Untrusted
from kvstore.local.attach import attach_path
from kvstore.local.attachment import MAX_UNIX_PATH_BYTES, Attachment
from kvstore.local.ownership import make_directory, open_file

LOCK_SUFFIX = ".lock"
LOG_SUFFIX = ".log"
DEFAULT_IDLE_EXIT_S = 60.0
_POLL_S = 0.02
_ATTACH_TRY_S = 1.0
_LOG_TAIL_BYTES = 2000

# Whoever started it has ended when it runs, so it is nobody's child. In a session of its own
# an interrupt typed at a terminal does not reach it.
_ORPHAN = (
    "import subprocess, sys;"
    "print(subprocess.Popen(sys.argv[1:], stdin=-3, stdout=2, start_new_session=True).pid)"
)


def ensure_server(
    socket_path: str | Path,
    args: Sequence[str] = (),
    *,
    idle_exit_s: float = DEFAULT_IDLE_EXIT_S,
    timeout_s: float = 60.0,
) -> bool:
    """Return once this user's server, or root's, answers at `socket_path`; True when this
    call started it.

    `args` are further arguments for `python -m kvstore_server`. A server that is
    there already is taken as it is, whatever its arguments; one that is there and
    does not answer is left alone.

    Raises `Unavailable` when no server answers within `timeout_s`, with the end
    of its log when it gave up; `Untrusted` at once where the directory, a file or the
    server there is another user's; `NoTenant` when one is there that refuses this user.
    """
    path = os.path.abspath(socket_path)
    if len(os.fsencode(attach_path(path))) > MAX_UNIX_PATH_BYTES:
        raise BadRequest(f"a socket path is at most {MAX_UNIX_PATH_BYTES} bytes: {path}")
    deadline = time.monotonic() + timeout_s
    try:
        # Before anything else: whoever owns the directory decides what is found in it.
        make_directory(Path(path).parent)
        if _listening(path):
            _await_attach(path, deadline, None)
            return False
        lock = open_file(path + LOCK_SUFFIX, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise Unavailable(f"cannot start a server at {path}: {error}") from error
    try:
        _lock(lock, path, deadline)
        if _listening(path):
            _await_attach(path, deadline, None)
            return False
        started = _start(path, args, idle_exit_s)
        try:
            _await_attach(path, deadline, started)
        finally:
            os.close(started)
        return True
    finally:
        os.close(lock)


def _listening(path: str) -> bool:
    """Whether some server has the attach socket open, answering or not."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        probe.setblocking(False)
        probe.connect(attach_path(path))
        return True
    except BlockingIOError:
        return True  # Its backlog is full: it listens, and is busy or stopped.
    except PermissionError as error:
        raise NoTenant(f"this user may not open {attach_path(path)}") from error
    except OSError:
        return False
    finally:
        probe.close()


def _lock(descriptor: int, path: str, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Unavailable(f"another process is still starting {path}") from None
            time.sleep(_POLL_S)


def _start(path: str, args: Sequence[str], idle_exit_s: float) -> int:
    """A descriptor of the process, to be closed, that can be read from when it has ended."""
    command = [sys.executable, "-m", "kvstore_server", "--socket", path]
    command += ["--idle-exit-s", f"{idle_exit_s:g}", *args]
    try:
        log = open_file(path + LOG_SUFFIX, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            told = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _ORPHAN, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                check=True,
            ).stdout
            return os.pidfd_open(int(told))
        finally:
            os.close(log)
    except ProcessLookupError:
        raise _ended(path) from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"cannot start a server: {error}") from error


def _await_attach(path: str, deadline: float, started: int | None) -> None:
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Unavailable(f"the server at {path} did not answer in time")
        try:
            Attachment.connect(attach_path(path), min(left, _ATTACH_TRY_S), own=True).close()
            return
        except Untrusted:
            raise
        except Unavailable:
            if started is not None and select.select([started], [], [], 0)[0]:
                raise _ended(path) from None
        except NoTenant:
            raise
        except KVStoreError:
            return  # It answers, if only to say that it is full or draining.
        time.sleep(_POLL_S)


def _ended(path: str) -> Unavailable:
    return Unavailable(f"the server ended while starting: {_log_tail(path)}")


def _log_tail(path: str) -> str:
    try:
        with open(open_file(path + LOG_SUFFIX, os.O_RDONLY), "rb") as log:
            text = log.read()[-_LOG_TAIL_BYTES:]
    except (OSError, Untrusted) as error:
        return f"(its log cannot be read: {error})"
    lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:]) or "(it wrote nothing)"
