"""What the scheduler's half knows of one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.types import NO_HINTS, NO_REUSE, Reuse
from kvstore_connectors.vllm.acquire import Held, Ticket
from kvstore_connectors.vllm.adapters import Adapter
from kvstore_connectors.vllm.handover import Coming

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class Tracked:
    """`prompt_tokens`: those whose blocks have keys. `loadable`: how far a load can go,
    0 where nothing is loaded. `done`: the store is not asked any more. `local_tokens`:
    what vLLM had itself when a load was offered. `junction`: where full attention goes
    on in the store, but windows or states do not. `coming`: what another vLLM is storing
    of it, as long as that is waited for. `offered`: for each band, up to which block it
    has been stored; `offering`: whether there is more. `reuse`: what it says of the next
    use of its blocks. `urgency`: 0 to 100, of its being answered soon. `adapter`: what it
    is computed with beside the model.
    """

    request: Request
    prompt_tokens: int
    loadable: int
    offered: list[int]
    preemptions: int = 0
    done: bool = False
    ticket: Ticket | None = None
    held: Held | None = None
    local_tokens: int = 0
    loading: bool = False
    junction: int = 0
    coming: Coming | None = None
    offering: bool = True
    reuse: Reuse = NO_REUSE
    urgency: int = NO_HINTS.priority
    adapter: Adapter | None = None
    _adapted: list[bytes] = field(default_factory=list)

    def hashes(self) -> list[bytes]:
        """Of what is computed of it so far, by its weights and all before; not a copy."""
        hashes: list[bytes] = self.request.block_hashes
        if self.adapter is None:
            return hashes
        if len(self._adapted) < len(hashes):
            self._adapted += self.adapter.keys(hashes[len(self._adapted) :])
        return self._adapted


def keys_of(
    tracked: Tracked, hash_tokens: int, block_tokens: int, start: int, stop: int
) -> list[bytes]:
    """Keys of the blocks [start, stop): the hash at each one's last token."""
    step = block_tokens // hash_tokens
    hashes = tracked.hashes()
    if step == 1:
        return hashes[start:stop]
    return hashes[(start + 1) * step - 1 : stop * step : step]
