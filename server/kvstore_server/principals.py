"""Who is calling, and whose blocks they may see.

A caller becomes a principal by something it cannot make up: the kernel's word on
a Unix socket's peer, or the address it came from. The configuration makes the
principal a tenant. Only those two steps exist, so no call can reach the store
with a tenant of its own choosing.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.config_keys import Tenants
from kvstore.errors import NoTenant


@dataclass(frozen=True, slots=True)
class LocalUser:
    """A process of this host, by the user id the kernel vouches for."""

    uid: int


@dataclass(frozen=True, slots=True)
class TcpPeer:
    """Whoever can reach the loopback port."""


@dataclass(frozen=True, slots=True)
class UnknownLocal:
    """Somebody on the Unix socket of whom gRPC tells nothing. Only an attached
    session says who they are."""


Principal = LocalUser | TcpPeer | UnknownLocal


class Principals:
    """The rules of one server.

    `owner_only`: nobody but the server's own user can open the Unix socket, so
    its callers are that user.
    """

    def __init__(self, tenants: Tenants, *, owner_uid: int, owner_only: bool) -> None:
        self._tenants = tenants
        self._owner_uid = owner_uid
        self._owner_only = owner_only

    def of_peer(self, peer: str) -> Principal:
        """The principal of a gRPC call by its transport, as `context.peer()` names it."""
        if not peer.startswith("unix:"):
            return TcpPeer()
        return LocalUser(self._owner_uid) if self._owner_only else UnknownLocal()

    def tenant_of(self, principal: Principal) -> str:
        """Raises `NoTenant`."""
        match principal:
            case LocalUser(uid):
                tenant = self._tenants.uids.get(str(uid), self._tenants.default)
                who = f"user {uid}"
            case TcpPeer():
                tenant = self._tenants.tcp
                who = "callers over TCP"
            case UnknownLocal():
                raise NoTenant("attach first: this socket is open to several users")
        if not tenant:
            raise NoTenant(f"{who} may not use this server")
        return tenant
