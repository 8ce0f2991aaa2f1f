"""The peers as they take part in the rounds: whoever fails is out, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from kvstore_benchmarks.closing import Closing
from kvstore_benchmarks.figures import gbps
from kvstore_benchmarks.local.samples import (
    CHAIN_LENGTHS,
    LOOKUP_KINDS,
    Bandwidth,
    PeerSamples,
    Plan,
)
from kvstore_benchmarks.peers.peer import Absent, Asked, Kind, Moved, Peer, start

BLOCKS_PER_CALL = 256
"""What our own client sends in one call as well."""
LOOKUP_BLOCK_BYTES = 4 << 10
ONE_BLOCK_BYTES = 64 << 10
BURST = 20
LONG_BURST = 4
"""Of chains that take a peer tens of milliseconds."""


class Peers(Closing):
    """The running ones. A context manager; leaving it ends them.

    `samples` has an entry for every peer that was asked for.
    """

    def __init__(self, samples: dict[str, PeerSamples], plan: Plan) -> None:
        self._samples = samples
        self._plan = plan
        self._running: dict[str, Peer] = {}
        self._stack = ExitStack()

    def close(self) -> None:
        self._stack.close()

    @property
    def running(self) -> list[str]:
        return list(self._running)

    def start(self, kinds: Iterable[Kind], folder: Path) -> None:
        for kind in kinds:
            samples = self._samples[kind.name] = PeerSamples()
            try:
                peer = start(kind, folder)
            except Absent as error:
                samples.reason = str(error)
                continue
            self._stack.enter_context(peer)
            self._running[kind.name] = peer
            samples.version, samples.way = peer.version, peer.way

    def prepare(self, nbytes: int, blocks: int) -> None:
        for name in self.running:
            self._samples[name].bandwidth.setdefault(nbytes, Bandwidth())
            self._with(name, lambda peer: peer.prepare(nbytes, blocks))

    def round(self, name: str, nbytes: int, blocks: int, *, count: bool) -> None:
        """Put and get once; `count`: whether it is a sample, and not a warm-up."""

        def once(peer: Peer) -> None:
            moved = {"put": peer.put(BLOCKS_PER_CALL), "get": peer.get(BLOCKS_PER_CALL)}
            peer.clear()
            for way, done in moved.items():
                self._note(name, done)
                right = blocks - done.failed - done.wrong
                if count:
                    samples = getattr(self._samples[name].bandwidth[nbytes], way)
                    samples.append(gbps(right * nbytes, done.seconds))

        self._with(name, once)

    def calls(self) -> None:
        """Single blocks and lookups, in bursts, a peer at a time and in turn."""
        for name in self.running:
            self._with(name, lambda peer: peer.prepare(LOOKUP_BLOCK_BYTES, 1))
        for _ in range(max(self._plan.peer_lookups // BURST, 1)):
            for name in self.running:
                self._with(name, partial(self._lookups, name))
        for name in self.running:
            self._with(name, lambda peer: peer.prepare(ONE_BLOCK_BYTES, 1))
            self._with(name, partial(self._ones, name))

    def _lookups(self, name: str, peer: Peer) -> None:
        by_kind = self._samples[name].lookup
        for kind in LOOKUP_KINDS:
            for length in CHAIN_LENGTHS:
                if kind == "partial" and length == 1:
                    continue
                samples = BURST if length <= BLOCKS_PER_CALL else LONG_BURST
                asked = peer.lookup(kind, length, samples)
                self._note(name, asked)
                by_kind.setdefault(kind, {}).setdefault(length, []).extend(asked.microseconds)

    def _ones(self, name: str, peer: Peer) -> None:
        for kind in ("put", "get"):
            asked = peer.one(kind, self._plan.peer_calls)
            self._note(name, asked)
            getattr(self._samples[name], f"{kind}_one").extend(asked.microseconds)
        peer.clear()

    def _note(self, name: str, done: Moved | Asked) -> None:
        self._samples[name].failed += done.failed
        self._samples[name].wrong += done.wrong

    def _with(self, name: str, do: Callable[[Peer], None]) -> None:
        """Nothing where the peer is out already."""
        if name not in self._running:
            return
        try:
            do(self._running[name])
        except Absent as error:
            self._samples[name].reason = str(error)
            del self._running[name]
