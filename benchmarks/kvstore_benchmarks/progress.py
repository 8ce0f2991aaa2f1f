"""What a long measurement is doing, on the standard error.

On a terminal one line that changes; elsewhere, a log or a pipe, a line for each step
with the seconds since the start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

Progress = Callable[[str], None]


@contextmanager
def progress() -> Iterator[Progress]:
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with console.status("starting") as status:
            yield status.update
    else:
        started = time.monotonic()
        yield lambda step: console.print(
            f"{time.monotonic() - started:6.1f} s  {step}", soft_wrap=True
        )
