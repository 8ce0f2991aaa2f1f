"""Traces made up for tests, and replays of them that take no short cuts."""

from __future__ import annotations

import random
from heapq import heappop, heappush

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


def conversations(count: int, seed: int, priority: int = 50) -> Trace:
    """So many requests, evenly over a second: conversations of some turns that a person
    thinks between, some two hundred requests long."""
    draw = random.Random(seed)
    waiting: list[tuple[float, int, list[int], int]] = []
    fresh = opened = 0
    clock = 0.0
    requests: list[Request] = []
    while len(requests) < count:
        clock += 1
        if draw.random() < 0.25:
            opened += 1
            turns = 1 + min(int(draw.expovariate(1 / 6)), 40)
            heappush(waiting, (clock, opened, [], turns))
        while waiting and waiting[0][0] <= clock and len(requests) < count:
            _, number, prompt, turns = heappop(waiting)
            grown = 3 + int(draw.expovariate(1 / 5))
            prompt = [*prompt, *range(fresh, fresh + grown)]
            fresh += grown
            now = 1000 * len(requests) / count
            tokens = 512 * len(prompt)
            requests.append(Request(now, tokens, 1, pieces_of(prompt), priority=priority))
            if turns > 1:
                back = clock + draw.lognormvariate(5.3, 0.8)
                heappush(waiting, (back, number, prompt, turns - 1))
    return Trace(512, fresh, requests)


def prompt_of(request: Request) -> list[int]:
    return [block for first, stop in request.pieces for block in range(first, stop)]
