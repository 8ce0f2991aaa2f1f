"""Whose weights a LoRA request is computed with, as far as the workers have told.

vLLM's block hashes name an adapter and its path. Neither says which weights it has: files
are replaced, and what was loaded of them before stays in use until it is loaded again. So
the workers tell what the files were that they loaded (`adapter_files`), and that becomes
part of a LoRA request's keys. Until all of them have told the same, the request bypasses
the store.

Where a name and path has had two contents in one engine, its requests bypass the store for
good: blocks of the old ones may be in vLLM's own cache, under the same hashes, and what is
computed behind them is of neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = init_logger("vllm.kvstore")

MAX_ADAPTERS = 1 << 14
"""Told apart in an engine's life. Those beyond bypass the store."""

UNCERTAIN = b""
"""In place of an identity: what was loaded is not known, and may be anything."""


class Adapter(NamedTuple):
    """What a request is computed with. `number`: vLLM's, of what is loaded. `identity`: of
    the content of its files."""

    number: int
    path: str
    identity: bytes

    def keys(self, hashes: Iterable[bytes]) -> list[bytes]:
        """Of blocks with these hashes, that were computed with it: 32 bytes each."""
        identity = self.identity
        return [blake2b(each, key=identity, digest_size=32).digest() for each in hashes]


class AdapterBook:
    """The scheduler's. Used on its thread only."""

    def __init__(self, workers: int) -> None:
        """`workers`: how many load each adapter."""
        self._workers = workers
        # By vLLM's number, what each worker has loaded under it.
        self._loaded: dict[int, dict[int, bytes]] = {}
        self._of_name: dict[tuple[str, str], bytes] = {}

    def heard(self, adapters: Mapping[int, Mapping[int, bytes]]) -> None:
        """What workers have loaded since they last told: by number, then by worker."""
        for number, identities in adapters.items():
            known = self._loaded.pop(number, {})
            self._loaded[number] = {**known, **identities}
            if len(self._loaded) > MAX_ADAPTERS:
                del self._loaded[next(iter(self._loaded))]

    def find(self, request: LoRARequest) -> Adapter | None:
        """What requests of this adapter are computed with, None where that is not known.

        To be called for whatever is computed: what is seen here of a name is remembered.
        """
        told = self._loaded.get(request.lora_int_id, {})
        if len(told) < self._workers:
            return None
        identities = set(told.values())
        identity = identities.pop() if len(identities) == 1 else UNCERTAIN
        name = (request.lora_name, request.lora_path)
        first = self._of_name.get(name)
        if first is None:
            if len(self._of_name) == MAX_ADAPTERS:
                return None
            first = self._of_name[name] = identity
        if first != identity:
            self._of_name[name] = UNCERTAIN
            if first != UNCERTAIN:
                logger.warning(
                    "LoRA adapter %r at %r was loaded with other weights than before; its"
                    " requests are not cached by the KV store until this engine restarts.",
                    *name,
                )
            return None
        if identity == UNCERTAIN:
            return None
        return Adapter(request.lora_int_id, request.lora_path, identity)
