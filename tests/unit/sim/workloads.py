"""Traces made up for tests, and replays of them that take no short cuts."""

from __future__ import annotations

import random

from kvstore.sim.trace import Request, Trace, pieces_of


def sessions(count: int, seed: int, turns: int = 12) -> Trace:
    """Sessions that each grow by some blocks a turn and now and then begin anew in the
    middle, all behind one of three system prompts."""
    draw = random.Random(seed)
    systems = [list(range(n * 4, n * 4 + 4)) for n in range(3)]
    fresh = 12
    alive: list[list[int]] = []
    requests = []
    for now in range(count * turns):
        if len(alive) < 6 or (len(alive) < count and draw.random() < 0.1):
            alive.append(list(draw.choice(systems)))
        prompt = draw.choice(alive)
        if draw.random() < 0.1:
            del prompt[draw.randrange(4, len(prompt) + 1) :]
        grown = draw.randrange(1, 9)
        prompt += range(fresh, fresh + grown)
        fresh += grown
        requests.append(
            Request(now, 16 * len(prompt), 1, pieces_of(prompt), session=id(prompt) % 97)
        )
        if len(prompt) > 60:
            alive.remove(prompt)
    return Trace(16, fresh, requests)


def prompt_of(request: Request) -> list[int]:
    return [block for first, stop in request.pieces for block in range(first, stop)]
