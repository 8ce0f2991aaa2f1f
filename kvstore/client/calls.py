"""Flows of the single calls: what the wire offers, in the project's types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from kvstore.client import wire
from kvstore.client.connecting import call, current_link
from kvstore.client.link import MAX_OWED_ABORTS, Budget, Core, Link
from kvstore.client.steps import Call, Flow
from kvstore.client.wire import ServerInfo
from kvstore.errors import (
    BadRequest,
    ClientError,
    KVStoreError,
    LeaseExpired,
    NoSession,
    ReservationExpired,
    Unavailable,
)
from kvstore.types import (
    ChainPresence,
    ChainQuery,
    LayoutSpec,
    LeaseGrant,
    ReservationGrant,
    StoreStats,
)
from kvstore.wire.v1 import kvstore_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

_WAIT_SHARE = 0.8


def server_info(core: Core) -> Flow[ServerInfo]:
    response, _ = yield from call(
        core, Budget(core.timeout_s), "GetServerInfo", pb.GetServerInfoRequest
    )
    return wire.server_info(cast(pb.GetServerInfoResponse, response))


def register_layout(core: Core, spec: LayoutSpec) -> Flow[bytes]:
    def request() -> Message:
        return pb.RegisterLayoutRequest(layout=wire.layout_message(spec))

    response, _ = yield from call(core, Budget(core.timeout_s), "RegisterLayout", request)
    layout_id = cast(pb.RegisterLayoutResponse, response).layout_id
    core.layouts[layout_id] = spec
    return layout_id


def lookup_at_hand(
    core: Core, layout_ids: Sequence[bytes], keys: Sequence[bytes]
) -> ChainPresence | None:
    """What the directory says, without asking the server; None where it cannot tell."""
    link = core.link
    # The connection shows at once that a server died, its directory only after a while.
    if link is None or link.presence is None or core.closed or not link.alive():
        return None
    # What is not as it should be is the server's to refuse.
    if len(keys) > link.info.max_keys or not all(i in core.layouts for i in layout_ids):
        return None
    return link.presence.lookup(layout_ids, keys)


def lookup(core: Core, chains: Sequence[ChainQuery]) -> Flow[list[ChainPresence]]:
    at_hand = [lookup_at_hand(core, chain.layout_ids, chain.keys) for chain in chains]
    if None not in at_hand:
        return cast(list[ChainPresence], at_hand)

    def request() -> Message:
        return pb.LookupRequest(chains=wire.chain_messages(chains))

    response, _ = yield from call(core, Budget(core.timeout_s), "Lookup", request)
    return wire.presences(cast(pb.LookupResponse, response))


def acquire(
    core: Core, budget: Budget, chains: Sequence[ChainQuery], wait_ms: int
) -> Flow[tuple[list[LeaseGrant], Link]]:
    """Leases, and the link they were granted under."""

    def request() -> Message:
        return pb.AcquireRequest(
            chains=wire.chain_messages(chains), wait_ms=_clamp(wait_ms, budget)
        )

    def undo(link: Link, response: pb.AcquireResponse) -> Call | None:
        ids = [lease.lease_id for lease in response.leases if lease.lease_id]
        if not ids:
            return None
        return Call("Release", pb.ReleaseRequest(lease_ids=ids), link.session, core.timeout_s)

    response, link = yield from call(core, budget, "Acquire", request, undo)
    return wire.grants(cast(pb.AcquireResponse, response), link.tag), link


def renew(core: Core, lease_ids: Sequence[int]) -> Flow[int]:
    core.check_open()
    link = core.link
    if link is None or not link.alive() or not all(map(link.owns, lease_ids)):
        raise LeaseExpired("the lease's session with the server has ended")
    request = pb.RenewRequest(lease_ids=map(link.bare, lease_ids))
    try:
        response = yield Call("Renew", request, link.session, Budget(core.timeout_s).left())
    except NoSession as error:
        link.retire()
        raise LeaseExpired("the lease's session with the server has ended") from error
    return cast(pb.RenewResponse, response).expires_ns


def release(core: Core, lease_ids: Sequence[int], timeout_s: float) -> Flow[None]:
    """Leases of a session that has ended went with it, so they need no call."""
    link = core.link
    if link is None or not link.alive():
        return
    current = [link.bare(number) for number in lease_ids if number and link.owns(number)]
    if not current:
        return
    request = pb.ReleaseRequest(lease_ids=current)
    try:
        yield Call("Release", request, link.session, timeout_s)
    except NoSession:
        link.retire()


def reserve(
    core: Core,
    budget: Budget,
    layout_id: bytes,
    entries: Sequence[tuple[bytes, bytes]],
    wait_ms: int,
) -> Flow[tuple[ReservationGrant, Link]]:
    """A reservation, and the link it was granted under."""
    link = yield from current_link(core, budget)
    for number in list(link.owed_aborts):
        yield Call("Abort", pb.AbortRequest(reservation_id=number), link.session, budget.left())
        link.owed_aborts.discard(number)

    def request() -> Message:
        return wire.reserve_message(layout_id, entries, _clamp(wait_ms, budget))

    def undo(link: Link, response: pb.ReserveResponse) -> Call | None:
        number = response.reservation_id
        if not number:
            return None
        return Call("Abort", pb.AbortRequest(reservation_id=number), link.session, core.timeout_s)

    try:
        response, link = yield from call(core, budget, "Reserve", request, undo)
    except Unavailable:
        # What was granted without our hearing of it could never be given back, but
        # with the session.
        link.retire()
        raise
    return wire.reservation(cast(pb.ReserveResponse, response), link.tag), link


def commit(
    core: Core,
    budget: Budget,
    reservation_id: int,
    indices: Sequence[int],
    checksums: Sequence[int],
) -> Flow[None]:
    if len(indices) != len(checksums):
        raise BadRequest(f"{len(indices)} indices but {len(checksums)} checksums")
    core.check_open()
    link = core.link
    if link is None or not link.alive() or not link.owns(reservation_id):
        raise ReservationExpired("the reservation's session with the server has ended")
    request = pb.CommitRequest(
        reservation_id=link.bare(reservation_id), indices=indices, checksums=checksums
    )
    try:
        yield Call("Commit", request, link.session, budget.left())
    except NoSession as error:
        link.retire()
        raise ReservationExpired("the reservation's session with the server has ended") from error


def abort(core: Core, reservation_id: int, timeout_s: float) -> Flow[None]:
    """Nobody may write into the reservation's slots any more when this is called."""
    link = core.link
    if link is None or not reservation_id or not link.owns(reservation_id) or not link.alive():
        return
    number = link.bare(reservation_id)
    try:
        yield Call("Abort", pb.AbortRequest(reservation_id=number), link.session, timeout_s)
    except NoSession:
        link.retire()
    except ClientError:
        raise
    except BaseException:
        # Not heard, or interrupted.
        if len(link.owed_aborts) < MAX_OWED_ABORTS:
            link.owed_aborts.add(number)
        raise


def give_back(core: Core, budget: Budget, *, lease_ids: Sequence[int]) -> Flow[None]:
    """Release on the way out of a flow: late is no reason to fail, the lease times out."""
    try:
        yield from release(core, lease_ids, budget.left_to_clean_up())
    except KVStoreError:
        return


def give_up(core: Core, budget: Budget, *, reservation_id: int) -> Flow[None]:
    """Abort on the way out of a failed flow, whose own error is the one to raise."""
    try:
        yield from abort(core, reservation_id, budget.left_to_clean_up())
    except KVStoreError:
        return


def prefetch(core: Core, chains: Sequence[ChainQuery]) -> Flow[int]:
    def request() -> Message:
        return pb.PrefetchRequest(chains=wire.chain_messages(chains))

    response, _ = yield from call(core, Budget(core.timeout_s), "Prefetch", request)
    return cast(pb.PrefetchResponse, response).started


def stats(core: Core) -> Flow[StoreStats]:
    response, _ = yield from call(core, Budget(core.timeout_s), "GetStats", pb.GetStatsRequest)
    return wire.stats(cast(pb.GetStatsResponse, response))


def clear(core: Core) -> Flow[int]:
    response, _ = yield from call(core, Budget(core.timeout_s), "Clear", pb.ClearRequest)
    return cast(pb.ClearResponse, response).blocks


def flush(core: Core, drop: bool, timeout_s: float) -> Flow[int]:
    def request() -> Message:
        return pb.FlushRequest(drop=drop)

    response, _ = yield from call(core, Budget(timeout_s), "Flush", request)
    return cast(pb.FlushResponse, response).written


def _clamp(wait_ms: int, budget: Budget) -> int:
    """How long the server may wait so that its answer comes in time."""
    if wait_ms < 0:
        raise BadRequest(f"wait_ms must not be negative, but is {wait_ms}")
    return min(wait_ms, wire.MAX_WAIT_MS, int(budget.left() * 1000 * _WAIT_SHARE))
