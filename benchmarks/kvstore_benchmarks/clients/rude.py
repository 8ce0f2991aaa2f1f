"""Clients that do what the server allows and nobody should: one way each.

flood   the largest calls that are allowed, one after the other
hoard   leases on everything and slots for nothing, held until the end
stall   stopped in the middle of a copy, with slots reserved and not committed
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from kvstore.client.sync import Client, Lease
from kvstore.errors import KVStoreError, Refused
from kvstore.types import ChainQuery
from kvstore_benchmarks.clients.polite import register
from kvstore_benchmarks.clients.work import SHAPES, document_keys

SMALL_BYTES = 4 << 10
CHAIN_BLOCKS = 2048
BIG_BYTES = 1 << 20
BIG_BLOCKS = 64
HOARDED_LEASES = 512
HOARDED_SLOTS = 256
RENEW_S = 1.0


def flood(client: Client, seed: int, start_ns: int, seconds: float) -> dict[str, Any]:
    """How often each call was made, and refused."""
    small, big = register(client, SMALL_BYTES), register(client, BIG_BYTES)
    chain = [secrets.token_bytes(32) for _ in range(CHAIN_BLOCKS)]
    client.put_many(small, chain, [bytes(SMALL_BYTES)] * len(chain))
    max_keys = client.server_info().max_keys
    unknown = [ChainQuery([small.id], [secrets.token_bytes(32) for _ in range(max_keys)])]
    blocks = [bytes(BIG_BYTES)] * BIG_BLOCKS

    def acquire() -> None:
        client.acquire(small, chain, wait_ms=0).release()

    def put() -> None:
        client.put_many(big, [secrets.token_bytes(32) for _ in blocks], blocks, wait_ms=0)

    calls: dict[str, Callable[[], object]] = {
        "lookup": lambda: client.lookup_many(unknown),
        "acquire": acquire,
        "put": put,
    }
    made, refused = Counter[str](), Counter[str]()
    _sleep_until(start_ns)
    while time.monotonic_ns() < start_ns + seconds * 1e9:
        for name, call in calls.items():
            try:
                call()
            except KVStoreError as error:
                refused[f"{name}: {type(error).__name__}"] += 1
            made[name] += 1
    return {"made": dict(made), "refused": dict(refused)}


def hoard(client: Client, seed: int, start_ns: int, seconds: float) -> dict[str, Any]:
    """How much was got hold of. Everything that is refused is asked for only once."""
    layouts = [register(client, shape.nbytes) for shape in SHAPES]
    leases: list[Lease] = []
    lost = slots = 0
    while len(leases) < HOARDED_LEASES:
        index = len(leases) % len(SHAPES)
        number = len(leases) // len(SHAPES) % SHAPES[index].documents
        try:
            lease = client.acquire(layouts[index], document_keys(seed, index, number), wait_ms=0)
        except Refused:
            break
        leases.append(lease)
    try:
        while slots < HOARDED_SLOTS and (got := len(client.reserve(layouts[0], 64, 0).addresses)):
            slots += got
    except Refused:
        pass
    _sleep_until(start_ns)
    while time.monotonic_ns() < start_ns + seconds * 1e9:
        time.sleep(min(RENEW_S, seconds))
        for lease in leases:
            try:
                lease.renew()
            except KVStoreError:
                lost += 1
    return {"leases": len(leases), "slots": slots, "renewals_refused": lost}


def stall(client: Client, seed: int, start_ns: int, seconds: float) -> dict[str, Any]:
    """Stops this process half-way through a put; whoever started it lets it go on."""
    layout = register(client, BIG_BYTES)
    blocks = [bytes(BIG_BYTES)] * BIG_BLOCKS

    def put() -> None:
        client.put_many(layout, [secrets.token_bytes(32) for _ in blocks], blocks, wait_ms=0)

    put()
    began = time.monotonic()
    put()
    half = (time.monotonic() - began) / 2
    _sleep_until(start_ns)
    stop = threading.Timer(half, os.kill, (os.getpid(), signal.SIGSTOP))
    stop.start()
    try:
        put()
    except KVStoreError as error:
        return {"put": type(error).__name__}
    finally:
        stop.join()
    return {"put": "went on"}


WAYS = {"flood": flood, "hoard": hoard, "stall": stall}


def _sleep_until(start_ns: int) -> None:
    time.sleep(max(start_ns - time.monotonic_ns(), 0) / 1e9)
