"""What the files of a LoRA adapter are at the moment vLLM loads them.

vLLM has no hook for that: it loads an adapter when it is told to, when a request first
needs it, and again after others have pushed it out. So the one method through which all of
that goes is watched, in each worker. What has no such method, or is not in files of this
host, is not known, and bypasses the store.

An adapter's identity is a digest of its content, for adapters of one rank are all of one
size, and times of change survive copies. It is read in a thread, from what vLLM has just
read, once for each version of the files; the files' sizes, times and inodes tell that
nobody changed them meanwhile.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from kvstore_connectors.vllm.adapters import UNCERTAIN, Adapter

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = init_logger("vllm.kvstore")

MAX_REMEMBERED = 4096
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_PIECE_BYTES = 1 << 20

Facts = tuple[tuple[str, int, int, int, int], ...]
"""Of each file: path, size, times of change of content and inode, and the inode."""

_watching: weakref.WeakSet[LoadedAdapters] = weakref.WeakSet()


@dataclass(slots=True, eq=False)
class _Loaded:
    """`manager`: vLLM's, that has it. `identity` is None until it has been read."""

    manager: weakref.ref[Any]
    facts: Facts | None
    identity: bytes | None


class LoadedAdapters:
    """One worker's. All but reading files happens on the engine's thread, and waits for
    nothing."""

    def __init__(self, settings: str) -> None:
        """`settings`: what else decides what is computed with the same files."""
        self._settings = settings.encode()
        self._lock = threading.Lock()
        self._loaded: dict[int, _Loaded] = {}
        self._identities: dict[Facts, bytes] = {}
        self._news: dict[int, bytes] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kvstore-adapter")
        if _watch():
            _watching.add(self)
        else:
            logger.warning("This vLLM loads LoRA adapters in another way: they are not cached.")

    def note(self, manager: object, request: LoRARequest, before: Facts | None) -> None:
        """An adapter has been loaded, from files that were `before`."""
        number, facts = request.lora_int_id, facts_of(request.lora_path)
        if facts != before:
            facts = None
        with self._lock:
            was = self._loaded.pop(number, None)
            known = None if facts is None else self._identities.get(facts)
            loaded = _Loaded(weakref.ref(manager), facts, known)
            self._loaded[number] = loaded
            if len(self._loaded) > MAX_REMEMBERED:
                del self._loaded[next(iter(self._loaded))]
            if known is not None:
                self._news[number] = known
            elif facts is None or (was is not None and was.facts != facts):
                self._news[number] = UNCERTAIN
        if facts is not None and known is None:
            self._reader.submit(self._read, number, loaded, facts, request.is_3d_lora_weight)

    def take_news(self) -> dict[int, bytes]:
        """Identities by number, of what has been loaded since the last call."""
        if not self._news:
            return {}
        with self._lock:
            news, self._news = self._news, {}
        return news

    def has(self, adapter: Adapter) -> bool:
        """Whether it is what this worker computes with, or will once it loads it again."""
        loaded = self._loaded.get(adapter.number)
        if loaded is None or loaded.identity != adapter.identity:
            return False
        manager = loaded.manager()
        if manager is not None and adapter.number in manager.list_adapters():
            return True
        # vLLM will read them in this very step.
        return facts_of(adapter.path) == loaded.facts

    def close(self) -> None:
        _watching.discard(self)
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _read(self, number: int, loaded: _Loaded, facts: Facts, is_3d: bool) -> None:
        digest = sha256(self._settings + bytes([is_3d]))
        try:
            for path, size, *_ in facts:
                digest.update(f"{os.path.basename(path)} {size}\0".encode())
                with open(path, "rb") as file:
                    while piece := file.read(_PIECE_BYTES):
                        digest.update(piece)
            unchanged = _facts([path for path, *_ in facts]) == facts
        except OSError:
            unchanged = False
        with self._lock:
            identity = digest.digest() if unchanged else UNCERTAIN
            if unchanged:
                if len(self._identities) == MAX_REMEMBERED:
                    del self._identities[next(iter(self._identities))]
                self._identities[facts] = identity
            if self._loaded.get(number) is loaded:
                loaded.identity = self._news[number] = identity


def facts_of(lora_path: str) -> Facts | None:
    """Of the files that vLLM reads of an adapter; None where they are not here."""
    # As vLLM resolves it; what is no directory then is the name of a hub's.
    directory = os.path.abspath(os.path.expanduser(lora_path))
    config = os.path.join(directory, _CONFIG)
    weights = [os.path.join(directory, name) for name in _WEIGHTS]
    present = [path for path in weights if os.path.exists(path)]
    try:
        return _facts([config, *present]) if present else None
    except OSError:
        return None


def _facts(paths: list[str]) -> Facts:
    facts = []
    for path in paths:
        status = os.stat(path)
        times = status.st_mtime_ns, status.st_ctime_ns
        facts.append((path, status.st_size, *times, status.st_ino))
    return tuple(facts)


def _watch() -> bool:
    """Watch vLLM's loading of adapters in this process. False where it cannot be."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    load: Any = getattr(WorkerLoRAManager, "_load_adapter", None)
    if load is None:
        return False
    if not hasattr(load, "watched_by_kvstore"):

        @functools.wraps(load)
        def watched(manager: Any, lora_request: LoRARequest) -> Any:
            before = facts_of(lora_request.lora_path)
            loaded = load(manager, lora_request)
            for adapters in list(_watching):
                adapters.note(manager, lora_request, before)
            return loaded

        setattr(watched, "watched_by_kvstore", True)  # noqa: B010
        WorkerLoRAManager._load_adapter = watched
    return True
