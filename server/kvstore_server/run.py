"""A server as a process: signals in, an exit code out.

SIGTERM, SIGINT and SIGHUP drain and stop; a second one hurries.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal

from prometheus_client import disable_created_metrics

from kvstore.config import Config
from kvstore.errors import KVStoreError
from kvstore_server.app import App
from kvstore_server.exits import exit_code
from kvstore_server.interpreter import prepare_interpreter, short_collections
from kvstore_server.logs import configure_logging

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(config: Config) -> int:
    """Serve until told to stop, or idle. Returns the exit code (see `exits`)."""
    configure_logging(config.server.log_level)
    _allow_descriptors()
    disable_created_metrics()  # type: ignore[no-untyped-call]
    prepare_interpreter()
    app = App(config)
    try:
        code = asyncio.run(_run(app))
    except KVStoreError as error:
        complain(error)
        code = exit_code(error)
    except Exception as error:  # noqa: BLE001
        # The outermost frame of the process.
        _log.critical("the server failed", exc_info=error)
        code = os.EX_SOFTWARE
    if app.left_behind:
        # The interpreter would wait for these threads before it ends.
        logging.shutdown()
        os._exit(code)
    return code


def _allow_descriptors() -> None:
    """Every extent of memory and of disk is a descriptor, and so is every client: the
    usual soft limit of 1024 is for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def complain(error: KVStoreError) -> None:
    """One line on stderr for a person, whatever the log's format."""
    os.write(2, f"kvstore: {error}\n".encode())


async def _run(app: App) -> int:
    asked = asyncio.Event()

    def on_signal() -> None:
        if asked.is_set():
            app.hurry()
        asked.set()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    stopping = asyncio.ensure_future(asked.wait())
    starting = asyncio.ensure_future(app.start())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return os.EX_OK
    starting.result()
    collecting = asyncio.ensure_future(short_collections(app.busy))
    idle = asyncio.ensure_future(app.wait_idle())
    await asyncio.wait((stopping, idle), return_when=asyncio.FIRST_COMPLETED)
    if idle.done():
        _log.info("no session for %g s", app.config.server.idle_exit_s)
    for future in (stopping, idle, collecting):
        future.cancel()
    await app.stop()
    return os.EX_IOERR if app.left_behind else os.EX_OK
