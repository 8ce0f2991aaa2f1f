"""Flows that find a session: the current one, or a new one after a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvstore.client import wire
from kvstore.client.lines import Lines
from kvstore.client.link import Budget, Core, Link, VramGrant
from kvstore.client.presence import Presence
from kvstore.client.steps import Call, Connect, Flow, OpenSession, SessionStream, Work
from kvstore.errors import (
    BadRequest,
    InternalError,
    KVStoreError,
    LeaseExpired,
    NoSession,
    Unavailable,
)
from kvstore.local.arena import Arena
from kvstore.local.attach import attach_path
from kvstore.local.attachment import Attachment
from kvstore.local.ownership import check_directory
from kvstore.wire.v1 import kvstore_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

T = TypeVar("T")


def current_link(core: Core, budget: Budget) -> Flow[Link]:
    """The open link, or a new one."""
    core.check_open()
    link = core.link
    if link is not None and link.alive():
        return link
    made: Link = yield Connect(budget.left())
    return made


def call(
    core: Core,
    budget: Budget,
    method: str,
    make_request: Callable[[], Message],
    undo: Callable[[Link, Any], Call | None] | None = None,
) -> Flow[tuple[Message, Link]]:
    """One RPC that names nothing of an earlier session, and the link it went over.

    When the server has lost the session it has done nothing, so the call is
    repeated once under a new one.
    """

    def over(link: Link) -> Call:
        on_leaving = None if undo is None else partial(undo, link)
        return link.call(method, make_request(), budget.left(), on_leaving)

    link = yield from current_link(core, budget)
    try:
        response = yield over(link)
    except NoSession:
        link.retire()
        link = yield from current_link(core, budget)
        response = yield over(link)
    return response, link


def connect(core: Core, budget: Budget) -> Flow[Link]:
    """Make a new link, with back-off after failures. Drivers run this one at a time."""
    core.check_open()
    if core.link is not None:
        if core.link.alive():
            return core.link
        core.link.retire()
        core.backoff.check()
    try:
        link = yield from _new_link(core, budget)
    except NoSession as error:
        # The one just made: whoever made it is gone again.
        core.backoff.failed()
        raise Unavailable(str(error)) from error
    except KVStoreError:
        core.backoff.failed()
        raise
    core.backoff.succeeded()
    core.counters.count_connect()
    core.link = link
    if core.closed:
        link.retire()
        core.check_open()
    return link


def _new_link(core: Core, budget: Budget) -> Flow[Link]:
    attachment = yield from _attach(core, budget)
    stream: SessionStream | None = None
    lines: Lines | None = None
    try:
        if attachment is None:
            session, stream = yield OpenSession(budget.left())
            # A server that has started meanwhile had its attach socket before it answered.
            attachment = yield from _attach(core, budget)
        if attachment is not None:
            session, lines = attachment.session, Lines(attachment)
            if stream is not None:
                stream.cancel()
                stream = None
        # Whoever just handed out a session is there, even where gRPC still holds
        # its last failure to connect against it.
        response = yield Call(
            "GetServerInfo", pb.GetServerInfoRequest(), session, budget.left(), True, lines=lines
        )
        info = wire.server_info(response)
        if attachment is not None and attachment.epoch != info.epoch:
            raise Unavailable("the server restarted while it was being attached to")
        for spec in list(core.layouts.values()):
            request = pb.RegisterLayoutRequest(layout=wire.layout_message(spec))
            yield Call("RegisterLayout", request, session, budget.left(), lines=lines)
        presence: Presence | None = yield from _presence(core, budget, attachment)
    except BaseException:
        if lines is not None:
            lines.close()
        if attachment is not None:
            attachment.close()
        if stream is not None:
            stream.cancel()
        raise
    link = Link(
        number=core.links_made,
        session=session,
        info=info,
        attachment=attachment,
        lines=lines,
        arena=None if attachment is None else _arena(attachment, core.timeout_s),
        presence=presence,
        stream=stream,
    )
    core.links_made += 1
    return link


def _attach(core: Core, budget: Budget) -> Flow[Attachment | None]:
    """The attach connection, None where the server is to be used over gRPC alone."""
    if core.socket_path is None:
        return None
    path, own = attach_path(core.socket_path), core.own
    timeout_s = budget.left()

    def attach() -> Attachment | None:
        if own:
            # For the gRPC socket too: where only this user can write, nobody else's is.
            check_directory(Path(path).parent, private=True)
        try:
            return Attachment.connect(path, timeout_s, own=own)
        except Unavailable as error:
            # No attach socket, as opposed to one that does not answer: the gRPC
            # socket may have been passed into a container, or forwarded, alone.
            if isinstance(error.__cause__, (FileNotFoundError, ConnectionRefusedError)):
                return None
            raise

    attachment: Attachment | None = yield Work(attach)
    return attachment


def _presence(core: Core, budget: Budget, attachment: Attachment | None) -> Flow[Presence | None]:
    if attachment is None:
        return None
    fetch, timeout_s = attachment.fetch_directory, budget.left()

    def open_directory() -> Presence:
        try:
            return Presence(fetch, core.clock, timeout_s)
        except ValueError as error:
            raise InternalError(f"the server's directory cannot be read: {error}") from error

    presence: Presence = yield Work(open_directory)
    return presence


def _arena(attachment: Attachment, timeout_s: float) -> Arena:
    def fetch(extent: int) -> tuple[int, int]:
        return attachment.fetch_extent(extent, timeout_s)

    return Arena(attachment.extent_bytes, fetch)


def local_arena(link: Link) -> Arena:
    """The link's arena. Raises `InternalError` for one that has none."""
    if link.arena is None:
        raise InternalError("this link does not share the server's memory")
    return link.arena


def slot_at_hand(core: Core, address: int, nbytes: int, epoch: bytes | None) -> memoryview | None:
    """The view if it takes no waiting for the server, else None: then `slot` is needed.

    An epoch that fits is proof enough that the address means this link's memory.
    Without one the session must be open: the next server may use the number too.
    """
    link = core.link
    if link is None or link.arena is None or core.closed:
        return None
    if link.epoch != epoch if epoch is not None else not link.alive():
        return None
    return link.arena.view_mapped(address, nbytes, writable=False)


def slot(core: Core, address: int, nbytes: int, epoch: bytes | None) -> Flow[memoryview]:
    """A view of the arena, of which an extent may have to be mapped first.

    After a loss this opens a new session, but does not look for the address of
    an earlier one in it.
    """
    before = core.link
    link = yield from current_link(core, Budget(core.timeout_s))
    if link.arena is None:
        raise BadRequest("slots need a server on this host")
    if link.epoch != epoch if epoch is not None else link is not before:
        raise LeaseExpired("the address was granted in an earlier session with the server")
    arena = link.arena
    view: memoryview = yield Work(lambda: arena.view(address, nbytes, writable=False))
    return view


def vram(core: Core, gpu: str, layout_ids: Sequence[bytes], reader: bytes) -> Flow[VramGrant]:
    """What the store has of a GPU's memory, as long as the link lasts."""
    budget = Budget(core.timeout_s)
    link = yield from current_link(core, budget)
    grant: VramGrant = yield Work(lambda: link.vram(gpu, layout_ids, budget.left(), reader))
    return grant


def write_slots(
    core: Core,
    slots: Sequence[int],
    addresses: Sequence[int],
    nbytes: int,
    write: Callable[[list[memoryview]], T],
) -> Flow[T]:
    """What `write` returns for the memory of slots, whose session is held meanwhile.

    Once a session ends its slots are others'. It must be the very one that granted
    them, which their ids tell, and must not end before `write` has.
    """
    core.check_open()
    link = core.link
    if link is None or not all(map(link.owns, slots)):
        raise LeaseExpired("the slots were reserved in an earlier session with the server")
    if link.arena is None:
        raise BadRequest("slots need a server on this host")
    arena = link.arena

    def held() -> T:
        link.hold()
        try:
            return write(arena.views(addresses, nbytes, writable=True))
        finally:
            link.let_go()

    result: T = yield Work(held)
    return result
