"""Flows of the single calls: what the wire offers, in the project's types."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from kvstore.client import wire
from kvstore.client.connecting import call, current_link
from kvstore.client.link import MAX_OWED_ABORTS, Budget, Core, Link
from kvstore.client.steps import Begin, Call, Drop, End, Flow
from kvstore.client.wire import ServerInfo
from kvstore.errors import (
    BadRequest,
    ClientError,
    KVStoreError,
    LeaseExpired,
    NoSession,
    ReservationExpired,
)
from kvstore.types import (
    GPU_ONLY,
    NO_HINTS,
    ChainPresence,
    ChainQuery,
    CommitAnswer,
    Hints,
    Landing,
    LayoutSpec,
    LeaseGrant,
    Segment,
    SessionState,
    SlotGrant,
    StoreStats,
)
from kvstore.wire.columns import pack_numbers
from kvstore.wire.v1 import kvstore_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

_WAIT_SHARE = 0.8
_MOST_MS = (1 << 32) - 1


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


def hint(core: Core, session: bytes, state: SessionState, expected_ms: int | None) -> Flow[None]:
    def request() -> Message:
        return pb.HintRequest(session=session, state=int(state), expected_ms=expected_ms)  # type: ignore[arg-type]

    yield from call(core, Budget(core.timeout_s), "Hint", request)


def lookup_at_hand(
    core: Core, layout_ids: Sequence[bytes], keys: Sequence[bytes]
) -> ChainPresence | None:
    """What the directory says, without asking the server; None where it cannot tell."""
    link = core.link
    if link is None or link.presence is None or core.closed:
        return None
    # What is not as it should be is the server's to refuse.
    if len(keys) > link.info.max_keys:
        return None
    for layout_id in layout_ids:
        if layout_id not in core.layouts:
            return None
    # The connection shows that a server died long before its directory does.
    return link.presence.lookup(layout_ids, keys, link.alive)


def lookup(core: Core, chains: Sequence[ChainQuery]) -> Flow[list[ChainPresence]]:
    at_hand = [lookup_at_hand(core, chain.layout_ids, chain.keys) for chain in chains]
    if None not in at_hand:
        return cast(list[ChainPresence], at_hand)

    def request() -> Message:
        return pb.LookupRequest(chains=wire.chain_messages(chains))

    response, _ = yield from call(core, Budget(core.timeout_s), "Lookup", request)
    return wire.presences(cast(pb.LookupResponse, response))


def acquire(
    core: Core,
    budget: Budget,
    chains: Sequence[ChainQuery],
    wait_ms: int,
    hints: Hints = NO_HINTS,
    reader: bytes = b"",
) -> Flow[tuple[list[LeaseGrant], Link]]:
    """Leases, and the link they were granted under."""

    def request() -> Message:
        return _acquire_message(budget, chains, wait_ms, hints, reader)

    undo = partial(_undo_leases, core)
    response, link = yield from call(core, budget, "Acquire", request, undo)
    return wire.grants(cast(pb.AcquireResponse, response), link.tag), link


def begin_acquire(
    core: Core, link: Link, budget: Budget, chains: Sequence[ChainQuery], wait_ms: int
) -> Flow[Any]:
    """What `end_acquire` wants; with `Drop` the leases are given back."""
    request = _acquire_message(budget, chains, wait_ms)
    undo = partial(_undo_leases, core, link)
    return (yield Begin(link.call("Acquire", request, budget.left(), undo=undo)))


def end_acquire(link: Link, begun: Any) -> Flow[list[LeaseGrant] | None]:
    """None where the server had lost the session and did nothing."""
    try:
        response = yield End(begun)
    except NoSession:
        link.retire()
        return None
    return wire.grants(cast(pb.AcquireResponse, response), link.tag)


def _acquire_message(
    budget: Budget,
    chains: Sequence[ChainQuery],
    wait_ms: int,
    hints: Hints = NO_HINTS,
    reader: bytes = b"",
) -> Message:
    message = pb.AcquireRequest(
        chains=wire.chain_messages(chains), wait_ms=_clamp(wait_ms, budget), reader=reader
    )
    if hints.priority != NO_HINTS.priority:
        message.priority = hints.priority
    if hints.tokens_per_s is not None:
        message.recompute.tokens_per_s = hints.tokens_per_s
        message.recompute.SetInParent()  # Though it may be 0.
    return message


def _undo_leases(core: Core, link: Link, response: pb.AcquireResponse | None) -> Call | None:
    # Those nobody heard of end with their time.
    ids = [] if response is None else [lease.lease_id for lease in response.leases]
    if not any(ids):
        return None
    request = pb.ReleaseRequest(lease_ids=filter(None, ids))
    return link.call("Release", request, core.timeout_s)


def renew(core: Core, lease_ids: Sequence[int]) -> Flow[int]:
    core.check_open()
    link = core.link
    if link is None or not link.alive() or not all(map(link.owns, lease_ids)):
        raise LeaseExpired("the lease's session with the server has ended")
    request = pb.RenewRequest(lease_ids=map(link.bare, lease_ids))
    try:
        response = yield link.call("Renew", request, Budget(core.timeout_s).left())
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
        yield link.call("Release", request, timeout_s)
    except NoSession:
        link.retire()


def release_soon(core: Core, link: Link, lease_ids: Sequence[int]) -> Flow[None]:
    """Send the release and hear no answer: a lease that is not released ends by time,
    or with its link."""
    current = [link.bare(number) for number in lease_ids if link.owns(number)]
    if current and link.alive():
        request = pb.ReleaseRequest(lease_ids=current)
        yield Drop((yield Begin(link.call("Release", request, core.timeout_s))))


def report_damage_soon(core: Core, link: Link, addresses: Sequence[int]) -> Flow[None]:
    """Say that blocks arrived damaged, so that the server looks at them. Nobody waits for
    that: those it does not hear of are reported by whoever reads them next. What is in a GPU's
    memory alone was read by nobody here."""
    in_dram = [address for address in addresses if address < GPU_ONLY]
    current = in_dram[: link.info.max_blocks]
    if current and link.alive():
        request = pb.ReportDamageRequest(addresses=pack_numbers(current))
        yield Drop((yield Begin(link.call("ReportDamage", request, core.timeout_s))))


def report_damage(core: Core, addresses: Sequence[int]) -> Flow[None]:
    """The same, to the server that is attached to; without one there is nobody to tell."""
    if core.link is not None:
        yield from report_damage_soon(core, core.link, addresses)


def reserve(
    core: Core, budget: Budget, layout_id: bytes, count: int, wait_ms: int
) -> Flow[tuple[SlotGrant, Link]]:
    """Slots, and the link they were granted under."""
    link = yield from current_link(core, budget)
    if link.owed_aborts:
        yield from _pay_aborts(link, budget)

    def request() -> Message:
        return pb.ReserveRequest(layout_id=layout_id, count=count, wait_ms=_clamp(wait_ms, budget))

    undo = partial(_undo_slots, core)
    response, link = yield from call(core, budget, "Reserve", request, undo)
    return wire.slot_grant(cast(pb.ReserveResponse, response).slots, link.tag), link


def _pay_aborts(link: Link, budget: Budget) -> Flow[None]:
    owed = list(link.owed_aborts)[: link.info.max_blocks]
    try:
        yield link.call("Abort", pb.AbortRequest(slots=owed), budget.left())
    except NoSession:
        link.retire()
    link.owed_aborts.difference_update(owed)


def ask(
    core: Core, budget: Budget, layout_id: bytes, segments: Sequence[Segment], ahead: int
) -> Flow[tuple[CommitAnswer, Link]]:
    """A commit that names no slots: what is there already. Reserves up to `ahead`
    slots, under the link that comes with the answer."""

    def request() -> Message:
        return pb.CommitRequest(
            layout_id=layout_id, segments=wire.segment_messages(segments, 0), reserve=ahead
        )

    undo = partial(_undo_slots, core)
    response, link = yield from call(core, budget, "Commit", request, undo)
    return wire.commit_answer(cast(pb.CommitResponse, response), link.tag), link


def land(
    core: Core, layout_id: bytes, slots: Sequence[int], not_on: Collection[str]
) -> Flow[list[Landing]]:
    """Places on GPUs for slots of the link there is."""
    core.check_open()
    link = core.link
    if link is None or not link.alive() or not all(map(link.owns, slots)):
        raise ReservationExpired("the slots' session with the server has ended")
    numbers = pack_numbers([link.bare(slot) for slot in slots])
    request = pb.LandRequest(layout_id=layout_id, slots=numbers, not_on=not_on)
    try:
        response = yield link.call("Land", request, Budget(core.timeout_s).left())
    except NoSession as error:
        link.retire()
        raise ReservationExpired("the slots' session with the server has ended") from error
    return wire.landings(cast(pb.LandResponse, response))


def commit(
    core: Core,
    budget: Budget,
    layout_id: bytes,
    segments: Sequence[Segment],
    ahead: int,
    landed: Sequence[Landing] = (),
) -> Flow[CommitAnswer]:
    """Publish, and reserve up to `ahead` slots."""
    core.check_open()
    link = core.link
    if link is None or not link.alive():
        raise ReservationExpired("the slots' session with the server has ended")
    begun = yield from begin_commit(core, link, budget, layout_id, segments, ahead, landed)
    return (yield from end_commit(link, begun))


def begin_commit(
    core: Core,
    link: Link,
    budget: Budget,
    layout_id: bytes,
    segments: Sequence[Segment],
    ahead: int,
    landed: Sequence[Landing] = (),
) -> Flow[Any]:
    """What `end_commit` wants; with `Drop` the slots reserved ahead are given back."""
    if not all(link.owns(slot) for segment in segments for slot in segment.slots if slot):
        raise ReservationExpired("the slots' session with the server has ended")
    request = pb.CommitRequest(
        layout_id=layout_id,
        segments=wire.segment_messages(segments, link.tag),
        reserve=ahead,
        landed=wire.landing_messages(landed),
    )
    undo = partial(_undo_slots, core, link)
    return (yield Begin(link.call("Commit", request, budget.left(), undo=undo)))


def end_commit(link: Link, begun: Any) -> Flow[CommitAnswer]:
    try:
        response = yield End(begun)
    except NoSession as error:
        link.retire()
        raise ReservationExpired("the slots' session with the server has ended") from error
    return wire.commit_answer(response, link.tag)


def _undo_slots(
    core: Core, link: Link, response: pb.ReserveResponse | pb.CommitResponse | None
) -> Call | None:
    if response is None:
        # Slots nobody heard of can only be given back with their session.
        link.retire()
        return None
    grant = wire.slot_grant(response.slots, 0)
    if not grant.addresses:
        return None
    ids = range(grant.first_slot, grant.first_slot + len(grant.addresses))
    return link.call("Abort", pb.AbortRequest(slots=ids), core.timeout_s)


def abort(core: Core, slots: Sequence[int], timeout_s: float) -> Flow[None]:
    """Nobody may write into the slots any more when this is called."""
    link = core.link
    if link is None or not link.alive():
        return
    current = [link.bare(slot) for slot in slots if link.owns(slot)]
    if not current:
        return
    request = pb.AbortRequest(slots=current)
    try:
        # Begun, so that it gets through even where its caller is interrupted.
        yield End((yield Begin(link.call("Abort", request, timeout_s))))
    except NoSession:
        link.retire()
    except ClientError:
        raise
    except BaseException:
        # Not heard, or interrupted.
        if len(link.owed_aborts) + len(current) <= MAX_OWED_ABORTS:
            link.owed_aborts.update(current)
        raise


def give_up(core: Core, slots: Sequence[int]) -> Flow[None]:
    """Abort on the way out of a failed flow, whose own error is the one to raise."""
    try:
        yield from abort(core, slots, Budget(core.timeout_s).left_to_clean_up())
    except KVStoreError:
        return


def prefetch(core: Core, chains: Sequence[ChainQuery], within_ms: int) -> Flow[int]:
    if not 0 <= within_ms <= _MOST_MS:
        raise BadRequest(f"within_ms is 0 to {_MOST_MS}, not {within_ms}")

    def request() -> Message:
        return pb.PrefetchRequest(chains=wire.chain_messages(chains), within_ms=within_ms)

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
