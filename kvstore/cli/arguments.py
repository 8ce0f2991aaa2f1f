"""Kinds of values on the command line, each with a word on what it may be."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def number(least: float, most: float, what: str, *, above: bool = False) -> Callable[[str], float]:
    """From `least` (or `above` it) to `most`; `what` says so to people."""

    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (value > least if above else value >= least) or not value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return check


def whole(most: int, what: str = "") -> Callable[[str], int]:
    """From 1 to `most`; `what` says so to people, to whom `most` may mean nothing."""
    what = what or f"a number from 1 to {most}"

    def check(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or not 0 < int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return int(text)

    return check


def several(each: Callable[[str], int]) -> Callable[[str], tuple[int, ...]]:
    """Separated by commas, each once."""

    def check(text: str) -> tuple[int, ...]:
        return tuple(dict.fromkeys(each(word.strip()) for word in text.split(",")))

    return check


def names(text: str) -> tuple[str, ...]:
    """Separated by commas, each once."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise argparse.ArgumentTypeError("name at least one")
    return found


positive = number(0, 1e12, "a number above 0", above=True)
count = whole((1 << 40) - 1, "a number of one or more")
counts = several(count)
