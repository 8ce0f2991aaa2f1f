"""Logs: one JSON object a line, or plain text where a person is watching.

Nothing from a request is ever logged: no keys, no tokens, no prompts. An
unexpected exception is logged by its type and where it happened; its text is left
out, because it may quote what a client sent.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """`{"time","level","logger","message"}`, and what the record's `fields` adds."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            entry["exception"] = describe_exception(record.exc_info[1])
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """`HH:MM:SS level message (field=value ...)`."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        line = f"{clock} {record.levelname.lower():7} {record.getMessage()}"
        fields = getattr(record, "fields", {})
        if fields:
            line += " (" + " ".join(f"{name}={value}" for name, value in fields.items()) + ")"
        if record.exc_info and record.exc_info[1] is not None:
            line += f"\n        {describe_exception(record.exc_info[1])}"
        return line


class Repeats(logging.Filter):
    """Warnings and errors that one place in the code says over and over: `BURST` of them in
    `PERIOD_S`, and with the first one after that how many were left out (`left_out`)."""

    BURST = 5
    PERIOD_S = 10.0
    MOST_PLACES = 1000

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        now = time.monotonic()
        # asyncio says everything in one place, each with what it is on the first line.
        place = record.pathname, record.lineno, str(record.msg).partition("\n")[0]
        since, count = self._said.pop(place, (now, 0))
        if now - since >= self.PERIOD_S:
            if count > self.BURST:
                record.fields = {**getattr(record, "fields", {}), "left_out": count - self.BURST}
            since, count = now, 0
        if len(self._said) >= self.MOST_PLACES:
            del self._said[next(iter(self._said))]
        self._said[place] = since, count + 1
        return count < self.BURST


def describe_exception(error: BaseException) -> str:
    """Type and place, innermost last; never the text."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    places = " > ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(error).__name__} at {places}"


def configure_logging(level: str) -> None:
    """Log to stderr from `level` ("debug" ... "error") on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if sys.stderr.isatty() else JsonFormatter())
    handler.addFilter(Repeats())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
