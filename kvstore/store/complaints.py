"""Warnings that somebody could bring about at will: one a second, so that no client can
fill the disk with them."""

from __future__ import annotations

import logging

from kvstore.clock import Clock

EVERY_NS = 1_000_000_000


class Complaints:
    def __init__(self, log: logging.Logger, clock: Clock) -> None:
        self._log = log
        self._clock = clock
        self._so_far = 0
        self._next_ns = 0

    def warn(self, text: str, *args: object) -> None:
        """`text` with `args`, or nothing where it is too soon. Says how many times so far."""
        self._so_far += 1
        now_ns = self._clock.now_ns()
        if now_ns >= self._next_ns:
            self._next_ns = now_ns + EVERY_NS
            self._log.warning(f"{text} (%d so far)", *args, self._so_far)
