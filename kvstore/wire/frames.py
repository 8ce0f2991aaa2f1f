"""Frames of a line: how calls and answers follow each other on a stream socket.

Both begin with five bytes: how many bytes follow the first four (u32, little endian),
and one number. In a call that is the length of the method's name, which follows, and
then the request; in an answer it is ANSWER, and the response follows, or ERROR, and the
attach protocol's error does. A line carries one call at a time.
"""

from __future__ import annotations

from struct import Struct

HEAD = Struct("<IB")
LENGTH_BYTES = 4
"""Of the head, those that the length it tells does not count."""
MAX_FRAME_BYTES = (4 << 20) + 256
"""Of what follows the length: a message of the wire's most bytes and a name."""

ANSWER = 0
ERROR = 1


def frame(number: int, *parts: bytes) -> bytes:
    """One frame: its number and what follows it."""
    return b"".join((HEAD.pack(1 + sum(map(len, parts)), number), *parts))
