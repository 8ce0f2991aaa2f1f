"""Tells routers what the store holds of which prompts, as vLLM's own KV cache events.

An event names a block by vLLM's hash and brings the block's tokens, of which routers make
hashes of their own. So only blocks of prompts that came by this engine can be announced.
They are remembered as *runs* of consecutive blocks, `MAX_BLOCKS` of them; the run that came
by least recently is forgotten first, and withdrawn.

The server does not tell what it evicts. Runs are looked up in its directory instead, which
takes microseconds however long they are: often while they may be being stored, and in turns
afterwards. What has changed since it was last announced makes the events.

Blocks in DRAM are announced as `CPU`. Once the end of a prompt is only behind DRAM, all
that is held of the prompt is announced as `STORAGE` too: routers follow a medium from a
prompt's first block on, and what comes before a block that was written to disk has been
there for as long.

When vLLM's own cache is emptied it announces that everything is gone, and routers take that
for all media. What the store holds is then announced again.

Only blocks of full attention: those of windows and states are held in places, and do not
tell how much of a prompt can be loaded.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.distributed.kv_events import (
    MEDIUM_CPU,
    MEDIUM_STORAGE,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
)
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, to_event_extra_keys
from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from kvstore_connectors.vllm.groups import Bands
    from kvstore_connectors.vllm.link import Attached, StoreLink

MAX_BLOCKS = 1 << 17
"""Remembered at a time. About 110 bytes each, and four for each of its tokens."""

YOUNG_S = 30.0
"""For so long after it came by, a run that is not held whole is looked up often."""

SOON_S = 0.05
AGAIN_S = 1.0
"""Between two looks at a run that is young, or is not, at least."""

GONE_AFTER_S = 5.0
"""Without a server for so long, everything is withdrawn."""

MOST_A_STEP = 64
OLD_A_STEP = 4
"""Runs looked up in a step; each takes 3 to 11 us, and what is announced half a ms a prompt."""


@dataclass(slots=True, eq=False)
class _Run:
    """Consecutive blocks of a prompt, of one stored group.

    `parent`: the key before the first one, empty at a prompt's begin. `cpu`, `storage`: how
    many blocks, from the first on, are announced as being there. `behind`: blocks of this
    run, or of one that follows it, have been seen behind DRAM alone.
    """

    group: int
    parent: bytes
    keys: list[bytes]
    tokens: array[int]
    extra_keys: list[tuple[Any, ...] | None]
    session_id: str | None
    young_until_s: float
    cpu: int = 0
    storage: int = 0
    behind: bool = False
    looked_s: float = 0.0

    @property
    def announced(self) -> int:
        """How many blocks, from the first on, on one medium or the other."""
        return max(self.cpu, self.storage)


@dataclass(frozen=True, slots=True)
class _Group:
    """What events say of a stored group. `index`: vLLM's number of it."""

    index: int
    kind: str
    block_tokens: int


class StoreEvents:
    """Used on the engine's thread only; nothing here waits."""

    def __init__(
        self,
        link: StoreLink,
        bands: Bands,
        kv_cache_config: KVCacheConfig,
        most_blocks: int = MAX_BLOCKS,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`most_blocks`: to be remembered."""
        self._link = link
        self._hash_tokens = bands.hash_tokens
        self._stored_groups = len(bands.groups)
        self._most_blocks = most_blocks
        self._now_s = now_s
        self._groups = {
            member: _group(kv_cache_config, bands.groups[member])
            for band in bands.full
            for member in band.members
        }
        self._pool: BlockPool | None = None
        self._cached: object = None
        self._generation = link.generation
        self._up_s = now_s()
        self._storing = False
        # The one that came by least recently first.
        self._runs: dict[_Run, None] = {}
        self._run_of: dict[int, dict[bytes, _Run]] = {group: {} for group in self._groups}
        self._blocks = 0
        # Each run is in one of them, in the order of looks; forgotten ones may be.
        self._young: deque[_Run] = deque()
        self._old: deque[_Run] = deque()
        self._due = 0
        """How many of the young, from the first on, are to be looked up now."""
        self._events: list[KVCacheEvent] = []

    def bind_pool(self, pool: BlockPool) -> None:
        """vLLM's own cache, of which it is noticed that it was emptied."""
        self._pool, self._cached = pool, pool.cached_block_hash_to_block

    @property
    def pending(self) -> bool:
        """Whether a step would announce something that is known by now."""
        return bool(self._events or (self._due and self._link.up))

    def note(self, request: Request) -> None:
        """A prompt came by: it is in the store, or soon will be, or will not."""
        if request.lora_request is not None or request.resumable:
            return
        for group in self._groups:
            self._note(request, group)
        while self._blocks > self._most_blocks:
            self._forget(next(iter(self._runs)))

    def forget_all(self) -> None:
        """Nothing that is announced can be loaded any more."""
        self._follow_vllm()
        for run in list(self._runs):
            self._forget(run)

    def take(self, storing: bool) -> list[KVCacheEvent]:
        """What has changed since the last call. To be called once a step; `storing` tells
        whether blocks are still being stored."""
        now_s = self._now_s()
        if self._storing and not storing:
            self._due = len(self._young)
        self._storing = storing
        self._follow_vllm()
        self._follow_link(now_s)
        attached = self._link.current
        if attached is not None:
            self._look_up(attached, now_s)
        events, self._events = self._events, []
        return events

    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not agree."""
        if self._blocks != sum(len(run.keys) for run in self._runs):
            raise AssertionError("the blocks are counted wrongly")
        queued = [*self._young, *self._old]
        if len(queued) != len(set(queued)) or not set(queued) >= self._runs.keys():
            raise AssertionError("a run is not looked up, or twice in a turn")
        for group, run_of in self._run_of.items():
            keys = {key: run for run in self._runs if run.group == group for key in run.keys}
            if keys != run_of:
                raise AssertionError("a run is not found by its keys")

    # -- what is remembered -----------------------------------------------------

    def _note(self, request: Request, group: int) -> None:
        size, run_of = self._groups[group].block_tokens, self._run_of[group]
        step = size // self._hash_tokens
        blocks = request.num_prompt_tokens // size
        keys = list(map(bytes, request.block_hashes[step - 1 : blocks * step : step]))
        runs = dict.fromkeys(run_of[key] for key in keys if key in run_of)
        # The front of a prompt is to be forgotten last.
        for run in reversed(runs):
            del self._runs[run]
            self._runs[run] = None
        for known, places in groupby(range(len(keys)), lambda place: keys[place] in run_of):
            if not known:
                self._add(self._run(request, group, keys, list(places)))

    def _run(self, request: Request, group: int, keys: list[bytes], places: Sequence[int]) -> _Run:
        """`places`: of consecutive keys of the prompt."""
        size, first = self._groups[group].block_tokens, places[0]
        return _Run(
            group=group,
            parent=keys[first - 1] if first else b"",
            keys=keys[first : first + len(places)],
            tokens=array("I", request.all_token_ids[first * size : (places[-1] + 1) * size]),
            extra_keys=_extra_keys(request, size, places),
            session_id=request.session_id,
            young_until_s=self._now_s() + YOUNG_S,
        )

    def _add(self, run: _Run) -> None:
        self._runs[run] = None
        self._run_of[run.group].update(dict.fromkeys(run.keys, run))
        self._blocks += len(run.keys)
        self._young.append(run)

    def _forget(self, run: _Run) -> None:
        self._announce(run, 0, 0)
        del self._runs[run]
        for key in run.keys:
            del self._run_of[run.group][key]
        self._blocks -= len(run.keys)

    # -- what has changed -------------------------------------------------------

    def _follow_vllm(self) -> None:
        pool = self._pool
        if pool is not None and self._cached is not pool.cached_block_hash_to_block:
            self._cached = pool.cached_block_hash_to_block
            for run in self._runs:
                run.cpu = run.storage = 0
            self._look_at_all()

    def _follow_link(self, now_s: float) -> None:
        if self._link.up:
            self._up_s = now_s
        elif now_s - self._up_s > GONE_AFTER_S:
            self._up_s = math.inf
            for run in self._runs:
                self._announce(run, 0, 0)
        if self._generation != self._link.generation:
            self._generation = self._link.generation
            self._look_at_all()

    def _look_at_all(self) -> None:
        self._young, self._old = deque(self._runs), deque()
        self._due = len(self._young)

    def _look_up(self, attached: Attached, now_s: float) -> None:
        for _ in range(min(len(self._young), MOST_A_STEP)):
            if not self._due and now_s - self._young[0].looked_s < SOON_S:
                break
            self._due = max(0, self._due - 1)
            self._look(attached, self._young.popleft(), now_s)
        for _ in range(min(len(self._old), OLD_A_STEP)):
            if now_s - self._old[0].looked_s < AGAIN_S:
                break
            self._look(attached, self._old.popleft(), now_s)

    def _look(self, attached: Attached, run: _Run, now_s: float) -> None:
        if run not in self._runs:
            return
        run.looked_s = now_s
        # What is before it is announced before it: without that it is nothing to a router.
        front = [run]
        while not self._has_front(front[-1]):
            front.append(self._run_of[run.group][front[-1].parent])
        for each in reversed(front):
            if self._has_front(each):
                self._see(attached, each)
        young = run.announced < len(run.keys) and now_s <= run.young_until_s
        (self._young if young else self._old).append(run)

    def _has_front(self, run: _Run) -> bool:
        """Whether the block before it is announced, if it is remembered."""
        before = self._run_of[run.group].get(run.parent)
        if before is None or before.announced == len(before.keys):
            return True
        return before.announced > before.keys.index(run.parent)

    def _see(self, attached: Attached, run: _Run) -> None:
        shards = len(attached.layouts) // self._stored_groups
        layouts = attached.layouts[run.group * shards : (run.group + 1) * shards]
        seen = attached.client.peek([layout.id for layout in layouts], run.keys)
        if seen is None:
            return
        if seen.held > seen.in_dram:
            self._follow_to_front(run)
        self._announce(run, seen.in_dram, seen.held if run.behind else 0)

    def _follow_to_front(self, run: _Run) -> None:
        """Part of a run is behind DRAM alone: announce all before it as behind DRAM."""
        each: _Run | None = run
        while each is not None and not each.behind:
            each.behind = True
            if each is not run:
                self._announce(each, each.cpu, each.announced)
            each = self._run_of[each.group].get(each.parent)

    def _announce(self, run: _Run, cpu: int, storage: int) -> None:
        """So many blocks of a run's front are held in DRAM, and so many on disk."""
        for medium, was, now in (
            (MEDIUM_CPU, run.cpu, cpu),
            (MEDIUM_STORAGE, run.storage, storage),
        ):
            if now > was:
                self._events.append(self._stored(run, was, now, medium))
            elif now < was:
                index = self._groups[run.group].index
                hashes = _hashes(run.keys[now:was])
                self._events.append(BlockRemoved(hashes, medium=medium, group_idx=index))
        run.cpu, run.storage = cpu, storage
        run.behind = run.behind and bool(cpu or storage)

    def _stored(self, run: _Run, first: int, last: int, medium: str) -> BlockStored:
        group = self._groups[run.group]
        parent = run.keys[first - 1] if first else run.parent
        size = group.block_tokens
        return BlockStored(
            block_hashes=_hashes(run.keys[first:last]),
            parent_block_hash=_hashes([parent])[0] if parent else None,
            token_ids=run.tokens[first * size : last * size].tolist(),
            block_size=size,
            lora_id=None,
            medium=medium,
            lora_name=None,
            extra_keys=to_event_extra_keys(run.extra_keys[first:last]),
            group_idx=group.index,
            kv_cache_spec_kind=group.kind,
            session_id=run.session_id,
        )


def _group(kv_cache_config: KVCacheConfig, index: int) -> _Group:
    spec = kv_cache_config.kv_cache_groups[index].kv_cache_spec
    return _Group(index, get_kv_cache_spec_kind(spec).value, spec.block_size)


def _extra_keys(request: Request, size: int, places: Sequence[int]) -> list[tuple[Any, ...] | None]:
    """What is in blocks' hashes beside their tokens. Of a usual prompt nothing; asking vLLM
    takes a microsecond a block."""
    if not (request.mm_features or request.cache_salt or request.prompt_embeds is not None):
        return [None] * len(places)
    extra_keys, mm_index = [], 0
    for place in places:
        extra, mm_index = generate_block_hash_extra_keys(
            request, place * size, (place + 1) * size, mm_index
        )
        extra_keys.append(extra)
    return extra_keys


def _hashes(keys: Sequence[bytes]) -> list[Any]:
    """As vLLM's events name blocks (`maybe_convert_block_hash`), at a tenth of the cost."""
    if not envs.VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES:
        return list(keys)
    return [int.from_bytes(key[-8:], "big") for key in keys]
