"""Waiting for a stream so that nothing of it is under way afterwards, whatever fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvstore.device.gpu_driver import Driver
from kvstore.errors import DeviceError, DeviceLost, DeviceStuck

PATIENCE_S = 2.0
"""Of who keeps others waiting too: no copy within a GPU takes so long on one that answers. Less
than what a drive may take (`tiers.nvme_calls.DATA_NS`), so that a GPU is not taken for one."""

_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 1e-3


def wait_for(driver: Driver, stream: Any) -> None:
    """Once it has returned or raised, nothing that was put into the stream is under way, unless
    it raised `DeviceStuck`. Raises `DeviceError`. Takes for ever where the GPU does."""
    try:
        driver.synchronize(driver.record(stream))
    except DeviceLost:
        # It copies nothing any more.
        raise
    except DeviceError:
        _drain(driver, stream)
        raise


@contextmanager
def waited_for(driver: Driver, stream: Any) -> Iterator[None]:
    """`wait_for`, with what is put into the stream inside: also where that fails half-way. What
    has not ended after `PATIENCE_S` is `DeviceStuck`."""
    try:
        yield
    except DeviceLost:
        raise
    except DeviceError:
        _wait_in_time(driver, stream)
        raise
    _wait_in_time(driver, stream)


def _wait_in_time(driver: Driver, stream: Any) -> None:
    until, pause = time.monotonic() + PATIENCE_S, _PAUSE_S
    try:
        while True:
            # Before asking: this process may have stood still, and the GPU not.
            late = time.monotonic() >= until
            if driver.is_over(stream):
                return
            if late:
                raise DeviceStuck(f"copies have not ended after {PATIENCE_S:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
    except (DeviceLost, DeviceStuck):
        raise
    except DeviceError as error:
        raise DeviceStuck(f"copies cannot be waited for: {error}") from error


def _drain(driver: Driver, stream: Any) -> None:
    try:
        driver.drain(stream)
    except DeviceLost:
        pass
    except DeviceError as error:
        raise DeviceStuck(f"copies cannot be waited for: {error}") from error
