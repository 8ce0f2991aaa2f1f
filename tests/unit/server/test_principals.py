"""Who is calling: decided by the kernel and the configuration, never by the caller."""

from __future__ import annotations

import pytest

from kvstore.config_keys import Tenants
from kvstore.errors import NoTenant
from kvstore_server.principals import LocalUser, Principals, TcpPeer, UnknownLocal

TENANTS = Tenants(default="common", uids={"7": "alice", "8": "bob"}, tcp="remote")


def principals(tenants: Tenants = TENANTS, *, owner_only: bool = True) -> Principals:
    return Principals(tenants, owner_uid=7, owner_only=owner_only)


@pytest.mark.parametrize("peer", ["unix:", "unix:/run/x.sock"])
def test_on_a_private_socket_the_caller_is_its_owner(peer: str) -> None:
    rules = principals()
    assert rules.of_peer(peer) == LocalUser(7)
    assert rules.tenant_of(rules.of_peer(peer)) == "alice"


def test_on_a_shared_socket_the_caller_is_nobody_until_attached() -> None:
    rules = principals(owner_only=False)
    assert rules.of_peer("unix:") == UnknownLocal()
    with pytest.raises(NoTenant):
        rules.tenant_of(UnknownLocal())


@pytest.mark.parametrize("peer", ["ipv4:127.0.0.1:9", "ipv6:[::1]:9", "", "vsock:1"])
def test_whatever_is_not_the_unix_socket_is_not_its_owner(peer: str) -> None:
    assert principals().of_peer(peer) == TcpPeer()


def test_users_are_mapped_and_others_get_the_default() -> None:
    rules = principals()
    assert rules.tenant_of(LocalUser(8)) == "bob"
    assert rules.tenant_of(LocalUser(9)) == "common"
    assert rules.tenant_of(TcpPeer()) == "remote"


def test_an_empty_tenant_refuses() -> None:
    rules = principals(Tenants(default="", uids={"8": "bob"}, tcp=""))
    assert rules.tenant_of(LocalUser(8)) == "bob"
    for principal in (LocalUser(9), TcpPeer()):
        with pytest.raises(NoTenant):
            rules.tenant_of(principal)
