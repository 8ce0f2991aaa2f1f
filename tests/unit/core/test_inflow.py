"""What has come to a link since, however many tenants come."""

from __future__ import annotations

from kvstore.core.links.inflow import MOST_TENANTS, Inflow
from kvstore.core.links.learned import LinkCost, Speed
from kvstore.core.transfers import Link, Transfer, TransferClass, Wish
from kvstore.types import Tier


def link() -> Link:
    return Link(1, {tier: LinkCost(Speed(0.0, 1e9)) for tier in Tier})


def push(line: Link, tenant: str, at_ns: int, nbytes: int = 1000) -> None:
    wish = Wish(TransferClass.DEMAND, at_ns)
    line.push(Transfer((tenant, at_ns), nbytes, Tier.DRAM, tenant, wish))


def pass_through(line: Link, tenant: str, at_ns: int) -> None:
    """Somebody's demand comes and is called off before it begins."""
    push(line, tenant, at_ns)
    line.cancel((tenant, at_ns))


def test_who_waits_is_not_passed_by_its_own_work_when_many_others_come() -> None:
    line = link()
    push(line, "waits", 0, nbytes=1_000_000)
    before_ns = line.inflow.before("waits", 50)
    assert before_ns == 0
    for number in range(3 * MOST_TENANTS):
        pass_through(line, str(number), number)
    came_ns = line.inflow.total_ns - 1_000_000
    assert line.inflow.before("waits", 50) - before_ns == came_ns == 3 * MOST_TENANTS * 1000


def test_tenants_that_are_known_are_bounded() -> None:
    line = link()
    push(line, "waits", 0)
    for number in range(5 * MOST_TENANTS):
        pass_through(line, str(number), number)
    assert len(line.inflow) <= MOST_TENANTS + 1


def test_where_all_wait_all_are_known_and_none_is_sought_at_every_turn() -> None:
    looked = 0
    tenants: list[str] = []

    def waiting() -> set[str]:
        nonlocal looked
        looked += 1
        return set(tenants)

    inflow = Inflow(waiting)
    for number in range(4 * MOST_TENANTS):
        tenants.append(str(number))
        inflow.note(str(number), 50, 7, number)
    assert len(inflow) == 4 * MOST_TENANTS and looked <= 8
    assert inflow.before("0", 50) == 7 * (4 * MOST_TENANTS - 1)
    del tenants[:]
    for number in range(4 * MOST_TENANTS, 9 * MOST_TENANTS):
        inflow.note(str(number), 50, 7, number)
    assert len(inflow) <= MOST_TENANTS


def test_who_came_latest_is_known_though_it_came_first_once() -> None:
    line = link()
    pass_through(line, "often", 0)
    for number in range(3 * MOST_TENANTS):
        pass_through(line, str(number), 2 * number + 1)
        pass_through(line, "often", 2 * number + 2)
    assert line.inflow.before("often", 50) == 3 * MOST_TENANTS * 1000
