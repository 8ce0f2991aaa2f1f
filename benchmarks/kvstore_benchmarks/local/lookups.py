"""Latencies: lookups, which cost microseconds, and calls that ask the server.

A lookup is timed by two readings of the clock around one call; what the readings and
the call as such take is measured in the same way and given beside it. Lookups of
different kinds take turns in bursts, single calls one by one, so that a slow moment
falls on all alike. The chains differ from call to call, so that a lookup does not
always find its own last one in the processor's cache.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

from kvstore.client.lease import Layout
from kvstore.client.sync import Client
from kvstore.types import KEY_BYTES
from kvstore_benchmarks.local.baselines import aligned_blocks
from kvstore_benchmarks.local.copies import new_keys, register
from kvstore_benchmarks.local.samples import CHAIN_LENGTHS, Latency, Plan, Wrong

BLOCK_BYTES = 4 << 10
"""Small, because only their number matters."""
ONE_BLOCK_BYTES = 64 << 10
CHAINS = 8
MISSES = 64
BURST = 100
ACQUIRED_LENGTHS = (1, 256, 2000)

Chain = Sequence[bytes]
Lookup = Callable[[Layout, Chain], Any]


def lookups(client: Client, plan: Plan, latency: Latency) -> None:
    """Raises `Wrong` where the store finds other lengths than were put."""
    layout = register(client, BLOCK_BYTES)
    held = _put_chains(client, layout)
    variants = _variants(held)
    _check(client, layout, variants)
    for _ in range(max(plan.lookups // BURST, 1)):
        latency.harness += _timed(_nothing, layout, held, BURST)
        for (kind, length), chains in variants.items():
            before = client.counters.rpcs
            taken = _timed(client.lookup, layout, [keys for keys, _ in chains], BURST)
            latency.lookup.setdefault(kind, {}).setdefault(length, []).extend(taken)
            asked = client.counters.rpcs - before
            latency.lookup_rpcs[kind] = latency.lookup_rpcs.get(kind, 0) + asked
    _check(client, layout, variants)
    _calls(client, layout, held, plan, latency)


def _put_chains(client: Client, layout: Layout) -> list[list[bytes]]:
    block = aligned_blocks(1, BLOCK_BYTES)[0]
    chains = [new_keys(max(CHAIN_LENGTHS)) for _ in range(CHAINS)]
    for keys in chains:
        client.put_many(layout, keys, [block] * len(keys))
    return chains


def _variants(held: list[list[bytes]]) -> dict[tuple[str, int], list[tuple[Chain, int]]]:
    """By kind and length: chains, and how much of each is held."""
    variants: dict[tuple[str, int], list[tuple[Chain, int]]] = {}
    for length in CHAIN_LENGTHS:
        variants["hit", length] = [(keys[:length], length) for keys in held]
        variants["miss", length] = [(new_keys(length), 0) for _ in range(MISSES)]
        if length > 1:
            cuts = [max(length * (index + 1) // (CHAINS + 1), 1) for index in range(CHAINS)]
            variants["partial", length] = [
                (keys[:cut] + new_keys(length - cut), cut)
                for keys, cut in zip(held, cuts, strict=True)
            ]
    return variants


def _check(
    client: Client, layout: Layout, variants: dict[tuple[str, int], list[tuple[Chain, int]]]
) -> None:
    for (kind, length), chains in variants.items():
        for keys, expected in chains:
            found = client.lookup(layout, keys).held
            if found != expected:
                raise Wrong(f"{kind} of {length}: {expected} blocks are held, {found} are found")


def _timed(call: Lookup, layout: Layout, chains: Sequence[Chain], samples: int) -> list[float]:
    """Microseconds of each call."""
    clock = time.perf_counter_ns
    taken = []
    for keys in islice(cycle(chains), samples):
        started = clock()
        call(layout, keys)
        taken.append(clock() - started)
    return [ns / 1e3 for ns in taken]


def _nothing(layout: Layout, keys: Chain) -> None:
    """What the harness itself costs."""


def _calls(
    client: Client, small: Layout, held: list[list[bytes]], plan: Plan, latency: Latency
) -> None:
    layout = register(client, ONE_BLOCK_BYTES)
    block = aligned_blocks(1, ONE_BLOCK_BYTES)[0]
    key = new_keys(1)[0]
    client.put(layout, key, block)

    def acquire_and_release(chains: Iterator[Chain]) -> None:
        chain = next(chains)
        with client.acquire(small, chain, wait_ms=0) as lease:
            if lease.held != len(chain):
                raise Wrong(f"{lease.held} of {len(chain)} blocks were acquired")

    kinds: list[tuple[list[float], Callable[[], object]]] = [
        (latency.rpc, client.server_info),
        (
            latency.put_one,
            lambda: client.put(layout, secrets.token_bytes(KEY_BYTES), block),
        ),
        (latency.get_one, lambda: client.get(layout, key, into=block)),
    ]
    for length in ACQUIRED_LENGTHS:
        chains = cycle([keys[:length] for keys in held])
        taken = latency.acquire_release.setdefault(length, [])
        kinds.append((taken, partial(acquire_and_release, chains)))
    for _, call in kinds:
        call()
    for taken, call in islice(cycle(kinds), plan.calls * len(kinds)):
        started = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - started) / 1e3)
