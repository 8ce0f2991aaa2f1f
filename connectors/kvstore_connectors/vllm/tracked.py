"""What the scheduler's half knows of one request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore_connectors.vllm.acquire import Ticket
from kvstore_connectors.vllm.adapters import Adapter
from kvstore_connectors.vllm.handover import Coming
from kvstore_connectors.vllm.held import Held

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class Tracked:
    """`prompt_tokens`: those whose blocks have keys. `loadable`: how far a load can go,
    0 where nothing is loaded. `done`: the store is not asked any more. `local_tokens`:
    what vLLM had itself when a load was offered. `junction`: where full attention goes
    on in the store, but windows or states do not. `coming`: what another vLLM is storing
    of it, as long as that is waited for. `adapter`: what it is computed with beside the
    model. `storable`: what is computed of it may be stored. `offered`: for each band, up to
    which block it has been. `handed_over`: another vLLM is to decode it.
    """

    request: Request
    prompt_tokens: int
    loadable: int
    done: bool
    coming: Coming | None
    adapter: Adapter | None
    preemptions: int = 0
    ticket: Ticket | None = None
    held: Held | None = None
    local_tokens: int = 0
    loading: bool = False
    junction: int = 0
    storable: bool = False
    offered: list[int] | None = None
    handed_over: bool = False
    _adapted: list[bytes] | None = None

    def hashes(self) -> list[bytes]:
        """Of what is computed of it so far, by its weights and all before; not a copy. May be
        called in any thread."""
        hashes: list[bytes] = self.request.block_hashes
        if self.adapter is None:
            return hashes
        # Another thread may be here too: what it was given is not changed.
        adapted = self._adapted or []
        if len(adapted) < len(hashes):
            adapted = self._adapted = adapted + self.adapter.keys(hashes[len(adapted) :])
        return adapted


def keys_of(
    tracked: Tracked, hash_tokens: int, block_tokens: int, start: int, stop: int
) -> list[bytes]:
    """Keys of the blocks [start, stop): the hash at each one's last token."""
    step = block_tokens // hash_tokens
    hashes = tracked.hashes()
    if step == 1:
        return hashes[start:stop]
    return hashes[(start + 1) * step - 1 : stop * step : step]
