"""What a prefill and a decode vLLM tell each other in `kv_transfer_params`, and the wait.

A block's key says what it is, so no address changes hands: prefill stores, decode looks
for the same keys. All that decode must know is that a prompt's blocks are on their way,
for it asks while they are still being stored. It loads them as they come and waits as
long as more keep coming; when none has come for a while it computes the rest.

The parameters pass through a proxy and may hold anything. What is not understood counts
as not said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOKENS = "kvstore_tokens"
LOOK_EVERY_S = 0.001
ASK_EVERY_S = 0.005


def is_handed_over(params: object) -> bool:
    """Whether another vLLM is to decode what this one computes."""
    return isinstance(params, Mapping) and params.get("do_remote_decode") is True


def answer_for_decode(params: object, tokens: int) -> dict[str, Any] | None:
    """What to answer a request that asks for its prompt to be handed over; None for one
    that does not. `tokens`: of the prompt, that are or will soon be in the store."""
    if not is_handed_over(params):
        return None
    return {"do_remote_prefill": True, "do_remote_decode": False, TOKENS: tokens}


def tokens_to_come(params: object, limit: int) -> int:
    """How many of a prompt's tokens another vLLM stores, 0 where nobody said that one
    does. `limit`: how many can be loaded, which a proxy that says no number means."""
    if not isinstance(params, Mapping) or params.get("do_remote_prefill") is not True:
        return 0
    told = params.get(TOKENS)
    # bool is an int to isinstance.
    return max(0, min(told, limit)) if type(told) is int else limit


@dataclass(slots=True)
class Coming:
    """Blocks for the first `tokens` of a prompt, of which `seen` are in the store."""

    tokens: int
    patience_s: float
    until_s: float
    seen: int = 0
    next_look_s: float = 0.0

    @classmethod
    def of(cls, params: object, limit: int, patience_s: float, now_s: float) -> Coming | None:
        tokens = tokens_to_come(params, limit)
        return cls(tokens, patience_s, now_s + patience_s) if tokens else None

    def wait_on(self, seen: int, now_s: float, pause_s: float) -> bool:
        """Whether more may come, now that so many tokens are seen; if so, look again
        after `pause_s`."""
        if seen > self.seen:
            self.seen = seen
            self.until_s = now_s + self.patience_s
        self.next_look_s = now_s + pause_s
        return seen < self.tokens and now_s < self.until_s
