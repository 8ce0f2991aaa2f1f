"""Who makes a call: what a handler may ask about its caller, however the call came."""

from __future__ import annotations

from typing import Any, Protocol

import grpc.aio

from kvstore.errors import NoSession
from kvstore.store import Session, Store
from kvstore_server.principals import Principals, TcpPeer

SESSION_METADATA = "kvstore-session-bin"

Context = grpc.aio.ServicerContext[Any, Any]


class Caller(Protocol):
    @property
    def remote(self) -> bool:
        """Whether the caller may be on another host."""
        ...

    def session(self) -> Session:
        """Raises `NoSession`."""
        ...

    def session_or_none(self) -> Session | None:
        """None for who has none. Raises `NoSession` for one that has ended."""
        ...

    def tenant(self) -> str:
        """Raises `NoTenant`, or `NoSession` for a session that has ended."""
        ...


class GrpcCaller:
    """Says by metadata which session is its own, and is somebody without one too."""

    def __init__(self, store: Store, principals: Principals, context: Context) -> None:
        self._store = store
        self._principals = principals
        self._context = context

    @property
    def remote(self) -> bool:
        return isinstance(self._principal(), TcpPeer)

    def session(self) -> Session:
        session = self.session_or_none()
        if session is None:
            raise NoSession(f"this call needs a session, as {SESSION_METADATA} metadata")
        return session

    def tenant(self) -> str:
        session = self.session_or_none()
        if session is not None:
            return session.tenant
        return self._principals.tenant_of(self._principal())

    def session_or_none(self) -> Session | None:
        for name, value in self._context.invocation_metadata() or ():
            if name == SESSION_METADATA and isinstance(value, bytes):
                session = self._store.session(value)
                if session.local and self.remote:
                    # Its owner is a process of this host, known to the kernel.
                    # Whoever shows the id from elsewhere is not.
                    raise NoSession("no such session; attach again")
                return session
        return None

    def _principal(self) -> Any:
        return self._principals.of_peer(self._context.peer())


class AttachedCaller:
    """The process at the other end of an attach connection: its session's lines need no
    word of who calls on them."""

    remote = False

    def __init__(self, store: Store, session: Session) -> None:
        self._store = store
        self._session = session

    def session(self) -> Session:
        return self._store.session(self._session.id)

    def session_or_none(self) -> Session | None:
        return self.session()

    def tenant(self) -> str:
        return self._session.tenant
