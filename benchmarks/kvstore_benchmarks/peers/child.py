"""The child's side: one line of JSON answers each line it is sent.

A store is asked to put blocks of one size under keys that it has not seen, to get
them again into memory that was erased, and to look chains up. What comes back is
compared with what was put, byte for byte, outside of what is timed.

Requests, each an object with `do`:

    prepare   nbytes, blocks          make that many blocks of random bytes
    put       per_call                store them all under new keys -> seconds, failed
    get       per_call                get what was put last -> seconds, failed, wrong
    one       kind, samples           put or get one block a call -> ns, failed, wrong
    lookup    kind, length, samples   look up chains of that length -> ns, failed
    clear                             forget everything
    stop

`ns` is a list. `failed` and `wrong` count blocks; of lookups, wrong answers. A request
that raised is answered by {"error": ...}.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, TextIO

_compare = ctypes.CDLL(None).memcmp
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Store(Protocol):
    """One peer, ready for use. Chains and blocks are in whatever form suits it."""

    version: str
    way: str
    """How bytes get there, in a few words."""

    def memory(self, nbytes: int) -> memoryview:
        """Memory that blocks may be put from and got to."""
        ...

    def prepare(self, nbytes: int) -> None:
        """Blocks have this size from now on."""
        ...

    def block(self, view: memoryview) -> Any:
        """The form in which `put` and `get` take this block."""
        ...

    def new_chain(self, length: int) -> Any:
        """Keys that nothing was ever put under."""
        ...

    def branch(self, chain: Any, keep: int) -> Any:
        """A chain as long that has the first `keep` positions in common with `chain`."""
        ...

    def put(self, chain: Any, blocks: Sequence[Any]) -> int:
        """Store a chain; how many blocks failed."""
        ...

    def get(self, chain: Any, targets: Sequence[Any]) -> int:
        """Copy a chain's blocks out; how many failed."""
        ...

    def lookup(self, chain: Any) -> int:
        """How many positions are held."""
        ...

    def after_lookup(self) -> None:
        """Give back what the last lookup holds; not timed."""
        ...

    def clear(self) -> None: ...


class Session:
    """Answers requests with one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._nbytes = 0
        self._memory: list[memoryview] = []
        self._sources: list[memoryview] = []
        self._targets: list[memoryview] = []
        self._put: list[Any] = []
        self._got: list[Any] = []
        self._chains: list[Any] = []
        self._held: dict[int, Any] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        arguments = {name: value for name, value in request.items() if name != "do"}
        handler: Callable[..., dict[str, Any]] = getattr(self, f"_do_{request['do']}")
        return handler(**arguments)

    def _do_prepare(self, nbytes: int, blocks: int) -> dict[str, Any]:
        self._do_clear()
        size = nbytes * blocks
        if not self._memory or self._memory[0].nbytes < size:
            self._memory = [self._store.memory(size) for _ in range(2)]
            for memory in self._memory:
                ctypes.memset(address(memory), 1, memory.nbytes)  # Every page is there.
        self._nbytes = nbytes
        self._store.prepare(nbytes)
        self._sources, self._targets = (
            [memory[at : at + nbytes] for at in range(0, size, nbytes)] for memory in self._memory
        )
        self._put, self._got = (
            [self._store.block(view) for view in views] for views in (self._sources, self._targets)
        )
        for block in self._sources:
            for at in range(0, nbytes, mmap.PAGESIZE):
                block[at : at + 8] = secrets.token_bytes(8)
        return {}

    def _do_put(self, per_call: int) -> dict[str, Any]:
        pieces = _pieces(self._put, per_call)
        chains = [self._store.new_chain(len(blocks)) for blocks in pieces]
        put = self._store.put
        started = time.perf_counter()
        failed = sum(map(put, chains, pieces))
        seconds = time.perf_counter() - started
        self._chains = chains
        return {"seconds": seconds, "failed": failed}

    def _do_get(self, per_call: int) -> dict[str, Any]:
        pieces = _pieces(self._got, per_call)
        self._erase(len(self._targets))
        get = self._store.get
        started = time.perf_counter()
        failed = sum(map(get, self._chains, pieces))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "failed": failed, "wrong": self._differing() - failed}

    def _do_one(self, kind: str, samples: int) -> dict[str, Any]:
        store, source, target = self._store, self._put[:1], self._got[:1]
        taken, failed, wrong = [], 0, 0
        for _ in range(samples):
            chain = store.new_chain(1)
            started = time.perf_counter_ns()
            lost = store.put(chain, source)
            if kind == "get":
                self._erase(1)
                started = time.perf_counter_ns()
                lost = store.get(chain, target)
            taken.append(time.perf_counter_ns() - started)
            failed += lost
            if kind == "get" and not lost:
                wrong += not self._equal(0)
        return {"ns": taken, "failed": failed, "wrong": wrong}

    def _do_lookup(self, kind: str, length: int, samples: int) -> dict[str, Any]:
        store = self._store
        held = self._held_chain(length)
        keep = {"hit": length, "partial": length // 2, "miss": 0}[kind]
        taken, failed = [], 0
        for _ in range(samples):
            chain = store.branch(held, keep)
            started = time.perf_counter_ns()
            found = store.lookup(chain)
            taken.append(time.perf_counter_ns() - started)
            store.after_lookup()
            failed += found != keep
        return {"ns": taken, "failed": failed}

    def _do_clear(self) -> dict[str, Any]:
        self._store.clear()
        self._held.clear()
        self._chains = []
        return {}

    def _held_chain(self, length: int) -> Any:
        """A chain of which every position is held; put now where there is none yet."""
        if length not in self._held:
            chain = self._store.new_chain(length)
            failed = self._store.put(chain, self._put[:1] * length)
            if failed:
                raise RuntimeError(f"{failed} of {length} blocks could not be put")
            self._held[length] = chain
        return self._held[length]

    def _erase(self, blocks: int) -> None:
        for target in self._targets[:blocks]:
            ctypes.memset(address(target), 0, target.nbytes)

    def _differing(self) -> int:
        return sum(not self._equal(index) for index in range(len(self._sources)))

    def _equal(self, index: int) -> bool:
        source, target = address(self._sources[index]), address(self._targets[index])
        return bool(_compare(source, target, self._nbytes) == 0)


def _pieces(blocks: list[Any], per_call: int) -> list[list[Any]]:
    return [blocks[at : at + per_call] for at in range(0, len(blocks), per_call)]


def address(view: memoryview) -> int:
    """Of a writable view's first byte."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def private_memory(nbytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, nbytes))


def serve(opened: Callable[[ExitStack], Store]) -> int:
    """Open the store, say so, and answer until there is nothing more to answer.

    What libraries print goes to the standard error, so that it cannot come between
    the answers. What `opened` puts on its stack ends with this process.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with ExitStack() as stack:
        try:
            store = opened(stack)
        except Exception as error:  # noqa: BLE001 - a peer may raise anything
            _say(answers, _failure(error))
            return 1
        _say(answers, {"version": store.version, "way": store.way})
        session = Session(store)
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "stop":
                break
            try:
                said = session.answer(request)
            except Exception as error:  # noqa: BLE001 - as above
                said = _failure(error)
            _say(answers, said)
    return 0


def _failure(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {error}"}


def _say(answers: TextIO, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()
