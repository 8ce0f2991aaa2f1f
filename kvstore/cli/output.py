"""What a command prints, whoever reads it: a terminal, a file that is full, or a program that
has read enough.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NOBODY_READS = 128 + signal.SIGPIPE
"""The exit code of a command whose output nobody reads to its end, as a shell has it."""


def console() -> Console:
    """For tables on the standard output. Raises `BrokenPipeError` where nobody reads them."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Output()


def print_table(console: Console, table: Table) -> None:
    """With all of every figure: wider than a terminal where it has to be."""
    wide = console.options.update(width=1000)
    narrow = console.width
    console.width = max(narrow, console.measure(table, options=wide).maximum)
    try:
        console.print(table)
    finally:
        console.width = narrow


def finish() -> None:
    """What was printed is written. Raises `OSError` where it cannot be."""
    if sys.stdout is not None:  # It was closed before the command began.
        sys.stdout.flush()


def nobody_reads() -> bool:
    """Whether the standard output is a pipe or a socket, and whoever read from it has gone."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False  # There is none, or it is no file.
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def give_up() -> None:
    """Drop what could not be written yet, so that nobody tries again at the exit."""
    try:
        finish()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
