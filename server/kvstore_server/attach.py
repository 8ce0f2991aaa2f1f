"""The attach socket: sessions and shared memory for processes of this host.

A connection is a session. The kernel says who is at its other end, and closes it
when that process ends, however it ends; both are things a client cannot fake.

asyncio has no server for SOCK_SEQPACKET, so readiness callbacks on non-blocking
sockets do the work. One datagram is taken per callback, so no client can keep the
others waiting, and the server never waits for a client: one that does not read its
answers is disconnected.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct

from kvstore.errors import BadRequest, KVStoreError, TooMany
from kvstore.local.attach import (
    MAX_DATAGRAM_BYTES,
    PROTOCOL_VERSION,
    Attached,
    AttachRequest,
    DirectoryReply,
    ErrorReply,
    ExtentReply,
    LineReply,
    LineRequest,
    MapRequest,
    Reply,
    VramReply,
    VramRequest,
    decode_request,
    encode_reply,
)
from kvstore.metrics import Metrics
from kvstore.store import Session, Store
from kvstore_server.callers import AttachedCaller
from kvstore_server.limits import ATTACH_TIMEOUT_S, MAX_LINES
from kvstore_server.lines import Line, Lines
from kvstore_server.principals import LocalUser, Principals
from kvstore_server.status import INTERNAL, WireError, wire_error

_log = logging.getLogger(__name__)

_UCRED = struct.Struct("3i")
_ACCEPT_PAUSE_S = 0.1


class AttachServer:
    """Serves a listening SOCK_SEQPACKET socket, which it takes over.

    At most `max_connections` are open at a time; further ones are told so and
    closed.
    """

    def __init__(
        self,
        listener: socket.socket,
        store: Store,
        principals: Principals,
        metrics: Metrics,
        lines: Lines,
        *,
        max_connections: int,
    ) -> None:
        self.store = store
        self.lines = lines
        self.principals = principals
        self.metrics = metrics
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self._listener = listener
        self._max_connections = max_connections
        self._closed = False
        self.loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """End every session and stop listening. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.loop.remove_reader(self._listener)
        self._listener.close()
        for connection in list(self.connections):
            connection.close()

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # No descriptors left, most likely. The listener stays readable, so
            # without a pause this would be called again at once, forever.
            _log.error("cannot accept on the attach socket: %s", error.strerror)
            self.loop.remove_reader(self._listener)
            self.loop.call_later(_ACCEPT_PAUSE_S, self._resume)
            return
        peer.setblocking(False)
        connection = Connection(self, peer)
        if len(self.connections) > self._max_connections:
            connection.refuse(TooMany("too many connections to the attach socket"))

    def _resume(self) -> None:
        if not self._closed:
            self.loop.add_reader(self._listener, self._accept)


class Connection:
    """One client, from its connect to its end."""

    def __init__(self, server: AttachServer, peer: socket.socket) -> None:
        self._server = server
        self._peer = peer
        self._session: Session | None = None
        self._lines: set[Line] = set()
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, _ = _UCRED.unpack(credentials)
        self._principal = LocalUser(uid)
        self._patience = server.loop.call_later(ATTACH_TIMEOUT_S, self.close)
        server.connections.add(self)
        server.loop.add_reader(peer, self._readable)

    def close(self) -> None:
        """End the session, if there is one, and the connection. Idempotent."""
        if self not in self._server.connections:
            return
        self._server.connections.discard(self)
        self._patience.cancel()
        self._server.loop.remove_reader(self._peer)
        self._peer.close()
        for line in list(self._lines):
            line.close()
        if self._session is not None:
            self._server.store.close_session(self._session)

    def refuse(self, error: KVStoreError) -> None:
        """Say why, and close."""
        self._fail(wire_error(error))
        self.close()

    def _readable(self) -> None:
        try:
            # One byte more than allowed, so that an oversized datagram shows.
            datagram = self._peer.recv(MAX_DATAGRAM_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            datagram = b""
        if not datagram:
            self.close()
            return
        try:
            self._answer(datagram)
        except KVStoreError as error:
            self._fail(wire_error(error))
        except Exception as error:  # noqa: BLE001
            # The outermost frame of whatever a client sends here.
            self._server.metrics.unexpected("attach")
            _log.error("a fault while answering on the attach socket", exc_info=error)
            self._fail(INTERNAL)
        if self._session is None:
            # Before there is a session, every error is final.
            self.close()

    def _answer(self, datagram: bytes) -> None:
        request = decode_request(datagram)
        if isinstance(request, AttachRequest):
            self._attach(request)
        elif isinstance(request, MapRequest):
            self._map(request)
        elif isinstance(request, LineRequest):
            self._line()
        elif isinstance(request, VramRequest):
            self._vram(request)
        else:
            self._directory()

    def _attach(self, request: AttachRequest) -> None:
        store = self._server.store
        if self._session is not None:
            raise BadRequest("this connection is attached already")
        tenant = self._server.principals.tenant_of(self._principal)
        if request.protocol != PROTOCOL_VERSION:
            raise BadRequest(
                f"the client speaks attach protocol {request.protocol}, "
                f"the server {PROTOCOL_VERSION}"
            )
        self._session = store.open_session(tenant, local=True)
        self._patience.cancel()
        self._send(Attached(self._session.id, store.epoch, store.extent_bytes, tenant))

    def _map(self, request: MapRequest) -> None:
        if self._session is None:
            raise BadRequest("attach first")
        store = self._server.store
        if request.gpu:
            handout = store.vram_extent(self._session, request.gpu, request.extent)
            self._send(ExtentReply(request.extent, handout.extent_bytes), handout.descriptor)
            return
        descriptor = store.extent_fd(self._session, request.extent)
        self._send(ExtentReply(request.extent, store.extent_bytes), descriptor)

    def _vram(self, request: VramRequest) -> None:
        if self._session is None:
            raise BadRequest("attach first")
        handout = self._server.store.open_vram(
            self._session, request.gpu, request.layouts, request.reader
        )
        self._send(VramReply(handout.extent_bytes), handout.descriptor)

    def _directory(self) -> None:
        if self._session is None:
            raise BadRequest("attach first")
        store = self._server.store
        descriptor = store.directory_fd()
        nbytes = os.fstat(descriptor).st_size
        self._send(DirectoryReply(nbytes, store.tenant_secret(self._session)), descriptor)

    def _line(self) -> None:
        if self._session is None:
            raise BadRequest("attach first")
        if len(self._lines) >= MAX_LINES:
            raise TooMany(f"a session may have {MAX_LINES} lines")
        caller = AttachedCaller(self._server.store, self._session)
        line, theirs = self._server.lines.open(caller, self._lines.discard)
        self._lines.add(line)
        with theirs:
            self._send(LineReply(), theirs.fileno())

    def _fail(self, error: WireError) -> None:
        self._server.metrics.rejected(error.code)
        self._send(ErrorReply(error.code, error.message))

    def _send(self, reply: Reply, descriptor: int | None = None) -> None:
        descriptors = [] if descriptor is None else [descriptor]
        try:
            socket.send_fds(self._peer, [encode_reply(reply)], descriptors, socket.MSG_NOSIGNAL)
        except OSError:
            # The client is gone, or does not read what it asked for.
            self.close()
