"""What a request says of how soon it needs its blocks, and of their next use.

Two of vLLM's own fields tell it: `session_id`, and `priority`, of which 0 is the usual and
less is more urgent. It is taken for both: whose blocks come up from NVMe first, and whose
stay. More can be said of the next use in `kv_transfer_params`:

    kvstore_priority    0 to 100 instead of vLLM's, of their staying; 50 is the usual
    kvstore_category    requests of one kind tend to be followed up alike; not "output",
                        which blocks are that a model made, for prompts are what is stored
    kvstore_retention   a list of {"first_token", "stop_token", "priority", "ttl_ms"}, for
                        parts of the prompt; any of them may be left out

Those pass through proxies and may hold anything. What is not understood counts as not said:
a hint must never cost a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeGuard

from kvstore.types import (
    MAX_HINT_BYTES,
    MAX_PRIORITY,
    MAX_RETENTIONS,
    NO_HINTS,
    OUTPUT,
    Retention,
    Reuse,
)

if TYPE_CHECKING:
    from vllm.v1.request import Request

_PREFIX = "kvstore_"
_MAX_NUMBER = 1 << 53
"""The most that JSON carries exactly, and far more than there are tokens."""


def urgency_of(request: Request) -> int:
    """Of its being answered soon: 0 to `MAX_PRIORITY`, whatever the request says."""
    lateness: int = request.priority
    return min(MAX_PRIORITY, max(0, NO_HINTS.priority - lateness))


def usual_reuse(request_id: str) -> Reuse:
    """Of a request that says nothing."""
    return Reuse(NO_HINTS.priority, request=_name(request_id))


def said_of(request: Request) -> Reuse | None:
    """`reuse_of`, None where that is `usual_reuse`: for the engine's thread."""
    if request.kv_transfer_params is None and request.session_id is None and not request.priority:
        return None
    return reuse_of(request)


def reuse_of(request: Request) -> Reuse:
    """Within the server's bounds, whatever the request says."""
    params, session = request.kv_transfer_params, request.session_id
    priority, category = urgency_of(request), ""
    retention: tuple[Retention, ...] = ()
    if isinstance(params, Mapping):
        told = params.get(_PREFIX + "priority")
        if _is_number(told, MAX_PRIORITY):
            priority = told
        told = params.get(_PREFIX + "category")
        if isinstance(told, str) and told != OUTPUT:
            text = told.encode(errors="replace")
            category = text.decode() if len(text) <= MAX_HINT_BYTES else ""
        told = params.get(_PREFIX + "retention")
        if isinstance(told, list):
            read = (_retention(each, priority) for each in told[:MAX_RETENTIONS])
            retention = tuple(each for each in read if each is not None)
    return Reuse(
        priority,
        retention,
        _name(session) if isinstance(session, str) else b"",
        category,
        _name(request.request_id),
    )


def _retention(told: object, priority: int) -> Retention | None:
    if not isinstance(told, Mapping):
        return None
    first, stop = told.get("first_token", 0), told.get("stop_token", _MAX_NUMBER)
    worth, ttl_ms = told.get("priority", priority), told.get("ttl_ms")
    if not (_is_number(first, _MAX_NUMBER) and _is_number(stop, _MAX_NUMBER) and first < stop):
        return None
    if not _is_number(worth, MAX_PRIORITY):
        return None
    if ttl_ms is not None and not (_is_number(ttl_ms, _MAX_NUMBER) and ttl_ms):
        return None
    return Retention(first, stop, worth, ttl_ms)


def _is_number(told: object, most: int) -> TypeGuard[int]:
    # bool is an int to isinstance.
    return type(told) is int and 0 <= told <= most


def _name(text: str) -> bytes:
    """At most 64 bytes, and another one for every text."""
    name = text.encode(errors="replace")
    return name if len(name) <= MAX_HINT_BYTES else blake2b(name).digest()
