"""The planner's promises, one by one, with every copy ended by hand."""

from __future__ import annotations

import pytest

from kvstore.core.calls import acquires as acquires_module
from kvstore.core.lifecycle import State
from kvstore.errors import (
    BadRequest,
    ForeignLease,
    LeaseExpired,
    NoLowerTier,
    NoSession,
    ReservationExpired,
    TooMany,
    UnknownLayout,
)
from kvstore.types import ChainQuery, CommitOutcome, LayoutSpec, PutOutcome, Segment, Tier
from tests.simulation.model import (
    LEASE_MS,
    RESERVATION_MS,
    SLOT,
    Shell,
    chain,
    key,
    layout,
    make_planner,
)

STORED, DENIED = PutOutcome.STORED, PutOutcome.DENIED


@pytest.fixture
def shell() -> Shell:
    return Shell(make_planner(dram_slots=8, nvme_slots=32))


@pytest.fixture
def dram_only() -> Shell:
    return Shell(make_planner(dram_slots=8, nvme_slots=0))


def a_layout(shell: Shell, tenant: str = "t") -> bytes:
    return shell.planner.register_layout(tenant, layout())


def test_a_block_is_found_only_after_its_commit(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    slots = shell.slots(client, lid)
    assert shell.held(client, lid, [key(1)]) == 0
    assert shell.acquire(client, [lid], [key(1)]).answer == [(0, 0, [], [], 0, 0, None)]
    shell.commit(client, lid, [key(1)], slots, [7])
    assert shell.held(client, lid, [key(1)]) == 1


def test_a_position_counts_only_when_every_shard_holds_it(shell: Shell) -> None:
    client = shell.session(1)
    ranks = [shell.planner.register_layout("t", layout(rank=r, world=2)) for r in (0, 1)]
    keys = chain(1, 3)
    shell.put(client, ranks[0], keys)
    shell.put(client, ranks[1], keys[:2])
    grant = shell.acquire(client, ranks, keys).answer[0]  # type: ignore[index]
    assert grant.held == 2
    read = [shell.memory[Tier.DRAM][address] for address in grant.addresses]
    assert read == [("t", ranks[0], k) for k in keys[:2]] + [("t", ranks[1], k) for k in keys[:2]]


def test_a_hole_ends_a_hit(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    keys = chain(1, 3)
    shell.put(client, lid, [keys[0]])
    shell.put(client, lid, [keys[2]])
    assert shell.acquire(client, [lid], keys).answer[0].held == 1  # type: ignore[index]


def test_tenants_do_not_see_each_others_blocks(shell: Shell) -> None:
    ours, theirs = shell.session(1, "a"), shell.session(2, "b")
    lid = a_layout(shell, "a")
    assert a_layout(shell, "b") == lid
    shell.put(ours, lid, [key(1)])
    assert shell.held(theirs, lid, [key(1)]) == 0
    assert shell.put(theirs, lid, [key(1)]) == [STORED]


def test_what_is_leased_is_not_evicted(dram_only: Shell) -> None:
    shell = dram_only
    client, lid = shell.session(1), a_layout(shell)
    kept = chain(1, 4)
    shell.put(client, lid, kept)
    grant = shell.acquire(client, [lid], kept).answer[0]  # type: ignore[index]
    for base in range(2, 8):
        shell.put(client, lid, chain(base, 4))
    assert [shell.memory[Tier.DRAM][a] for a in grant.addresses] == [("t", lid, k) for k in kept]
    assert shell.put(client, lid, chain(9, 8)).count(STORED) == 4


def test_children_leave_before_parents(dram_only: Shell) -> None:
    shell = dram_only
    client, lid = shell.session(1), a_layout(shell)
    long = chain(1, 8)
    # In pieces, as chunked prefill commits them.
    shell.put(client, lid, long[:4])
    shell.commit(client, lid, long[4:5], shell.slots(client, lid), parent=long[3])
    shell.commit(client, lid, long[5:], shell.slots(client, lid, 3), parent=long[4])
    for number in range(1, 8):
        shell.put(client, lid, [key(10_000_000 + number)])
        assert shell.held(client, lid, long) == 8 - number


def test_a_refused_block_waits_for_space_and_gets_it(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    first, *_ = [shell.slots(client, lid)[0] for _ in range(8)]
    waiting = shell.reserve(client, lid, wait=True)
    assert waiting.answer is None
    shell.planner.abort(client, [first])
    shell.advance(1)
    assert waiting.answer is not None
    assert len(waiting.answer.addresses) == 1


def test_without_patience_a_refused_block_is_denied_at_once(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    ticket = shell.reserve(client, lid, 10, wait=True)
    assert ticket.answer is not None, "a part that is granted is answered at once"
    assert len(ticket.answer.addresses) == 8
    assert shell.put(client, lid, [key(50)]) == [DENIED]


def test_a_full_dram_moves_blocks_to_nvme_and_back(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    first = chain(1, 4)
    shell.put(client, lid, first)
    for base in range(2, 10):
        # A quarter of the slots is kept free or clean: two of eight.
        assert shell.put(client, lid, chain(base, 2)) == [STORED] * 2
        shell.settle()
    assert shell.held(client, lid, first) == 4
    presence = shell.planner.lookup("t", ChainQuery([lid], first))
    assert presence.in_dram == 0
    ticket = shell.acquire(client, [lid], first, wait=True)
    assert ticket.answer is None
    shell.settle()
    assert ticket.answer is not None
    grant = ticket.answer[0]
    assert (grant.held, grant.from_dram) == (4, 0)
    assert [shell.memory[Tier.DRAM][a] for a in grant.addresses] == [("t", lid, k) for k in first]


def on_nvme_only(shell: Shell, length: int = 4) -> tuple[object, bytes, list[bytes]]:
    client, lid = shell.session(1), a_layout(shell)
    keys = chain(1, length)
    shell.put(client, lid, keys)
    shell.planner.flush("t", drop=True)
    shell.run()
    shell.settle()
    assert shell.planner.lookup("t", ChainQuery([lid], keys)) == (length, 0)
    return client, lid, keys


def test_ten_acquires_of_one_prefix_read_it_once(shell: Shell) -> None:
    client, lid, keys = on_nvme_only(shell)
    tickets = [shell.acquire(client, [lid], keys, wait=True) for _ in range(10)]  # type: ignore[arg-type]
    assert len(shell.copies) + len(shell.planner.residency.transfers) <= 2 * len(keys)
    shell.settle()
    assert {t.answer[0].held for t in tickets if t.answer} == {4}
    addresses = {tuple(t.answer[0].addresses) for t in tickets if t.answer}
    assert len(addresses) == 1


def test_a_failed_read_shortens_the_hit_instead_of_lying(shell: Shell) -> None:
    client, lid, keys = on_nvme_only(shell)
    ticket = shell.acquire(client, [lid], keys, wait=True)  # type: ignore[arg-type]
    broken = next(
        i for i, c in enumerate(shell.copies) if c.target.block is shell.copies[1].target.block
    )
    position = keys.index(
        next(k for k in keys if shell.planner.catalog.find(
            shell.planner.catalog.layout("t", lid), k) is shell.copies[broken].target.block)
    )  # fmt: skip
    shell.corrupt_copy(broken)
    shell.settle()
    assert ticket.answer is not None
    assert ticket.answer[0].held == position
    assert shell.held(client, lid, keys[position : position + 1]) == 0  # type: ignore[arg-type]
    damaged = [
        r for r in shell.planner.residency.nvme.replicas()  # type: ignore[union-attr]
        if r.state is State.DAMAGED
    ]  # fmt: skip
    assert len(damaged) == 1, "the slot is quarantined"
    shell.planner.check_integrity()


def test_when_patience_ends_the_ready_prefix_is_granted(shell: Shell) -> None:
    client, lid, keys = on_nvme_only(shell)
    ticket = shell.acquire(client, [lid], keys, wait=True)  # type: ignore[arg-type]
    first = shell.planner.catalog.find(shell.planner.catalog.layout("t", lid), keys[0])
    shell.end_copy(next(i for i, c in enumerate(shell.copies) if c.target.block is first))
    shell.planner.give_up(ticket, shell.now_ns)
    assert ticket.answer is not None
    assert ticket.answer[0].held == 1
    shell.planner.release(client, [ticket.answer[0].lease_id])  # type: ignore[arg-type]
    shell.settle()
    shell.planner.check_integrity()


def test_a_dead_client_leaves_nothing_behind(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    shell.put(client, lid, chain(1, 4))
    shell.acquire(client, [lid], chain(1, 4))
    shell.slots(client, lid, 2)
    shell.planner.close_session(client)
    shell.planner.close_session(client)
    shell.planner.check_integrity()
    assert shell.planner.open_leases == shell.planner.open_reservations == 0
    assert shell.planner.residency.dram.space.used_bytes == 4 * SLOT
    with pytest.raises(NoSession):
        shell.planner.session(client.id)


def test_an_expired_lease_lets_go_and_says_so(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    shell.put(client, lid, [key(1)])
    grant = shell.acquire(client, [lid], [key(1)]).answer[0]  # type: ignore[index]
    shell.advance(LEASE_MS / 2)
    shell.planner.renew(client, [grant.lease_id], shell.now_ns)
    shell.advance(LEASE_MS * 0.75)
    assert shell.planner.open_leases == 1, "a renewed lease lives on"
    shell.advance(LEASE_MS)
    assert shell.planner.open_leases == 0
    with pytest.raises(LeaseExpired):
        shell.planner.renew(client, [grant.lease_id], shell.now_ns)
    shell.planner.release(client, [grant.lease_id])


def test_a_late_local_writer_cannot_hit_anothers_block(shell: Shell) -> None:
    late, lid = shell.session(1), a_layout(shell)
    other = shell.session(2)
    grant = shell.reserve(late, lid).answer
    assert grant is not None
    address = grant.addresses[0]
    shell.advance(RESERVATION_MS + 1)
    with pytest.raises(ReservationExpired):
        shell.commit(late, lid, [key(1)], [grant.first_slot])
    for number in range(2, 20):
        shell.put(other, lid, [key(number)])
        shell.settle()
    in_use = {r.address for r in shell.planner.residency.dram.replicas() if r.state is State.READY}
    assert address not in in_use
    shell.planner.close_session(late)
    shell.planner.check_integrity()
    assert len(shell.planner.residency.dram) == len(in_use)


def test_a_late_remote_writer_is_told_and_holds_nothing(shell: Shell) -> None:
    late, lid = shell.session(1, local=False), a_layout(shell)
    slots = shell.slots(late, lid)
    shell.advance(RESERVATION_MS + 1)
    assert shell.planner.residency.dram.space.used_bytes == 0
    assert shell.planner.open_reservations == 0
    with pytest.raises(ReservationExpired):
        shell.commit(late, lid, [key(1)], slots)
    with pytest.raises(ReservationExpired):
        shell.planner.slot(late, slots[0])
    shell.planner.check_integrity()


def test_foreign_claims_are_refused_and_nothing_happens(shell: Shell) -> None:
    owner, thief, lid = shell.session(1), shell.session(2), a_layout(shell)
    shell.put(owner, lid, [key(1)])
    grant = shell.acquire(owner, [lid], [key(1)]).answer[0]  # type: ignore[index]
    own = shell.acquire(thief, [lid], [key(1)]).answer[0]  # type: ignore[index]
    slots = shell.slots(owner, lid)
    with pytest.raises(ForeignLease):
        shell.planner.release(thief, [own.lease_id, grant.lease_id])
    with pytest.raises(ForeignLease):
        shell.planner.renew(thief, [own.lease_id, grant.lease_id], 0)
    with pytest.raises(ReservationExpired):
        shell.commit(thief, lid, [key(2)], slots)
    with pytest.raises(ReservationExpired):
        shell.planner.slot(thief, slots[0])
    shell.planner.abort(thief, slots)
    assert shell.planner.open_leases == 2
    assert shell.planner.open_reservations == 1


def test_a_repeated_commit_is_harmless_and_a_different_one_is_a_conflict(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    keys, slots = [key(1), key(2)], shell.slots(client, lid, 2)
    stored, present, conflict = CommitOutcome.STORED, CommitOutcome.PRESENT, CommitOutcome.CONFLICT
    assert shell.commit(client, lid, keys, slots, [11, 12]) == [stored] * 2
    assert shell.commit(client, lid, keys, slots, [11, 12]) == [present] * 2
    assert shell.commit(client, lid, keys, slots, [11, 13]) == [present, conflict]
    grant = shell.acquire(client, [lid], keys).answer[0]  # type: ignore[index]
    assert grant.checksums == [11, 12]


def test_a_commit_without_slots_tells_what_is_there_and_publishes_nothing(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    shell.commit(client, lid, [key(1)], shell.slots(client, lid), [11])
    asked = shell.commit(client, lid, [key(1), key(2)], [0, 0], [11, 12])
    assert asked == [CommitOutcome.PRESENT, CommitOutcome.ABSENT]
    assert shell.held(client, lid, [key(2)]) == 0


def test_a_commit_that_makes_no_sense_publishes_nothing(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    other = shell.planner.register_layout("t", layout("other"))
    mine, theirs = shell.slots(client, lid, 2), shell.slots(client, other)
    keys = [key(1), key(2)]
    for slots, sums, error in [
        ([mine[0], mine[0]], [1, 1], BadRequest),
        (mine, [1], BadRequest),
        (mine[:1], [1, 2], BadRequest),
        ([mine[0], theirs[0]], [1, 2], BadRequest),
        ([mine[0], mine[1] + 99], [1, 2], ReservationExpired),
    ]:
        with pytest.raises(error):
            shell.commit(client, lid, keys, slots, sums)
        assert shell.held(client, lid, keys) == 0
        shell.planner.check_integrity()
    assert shell.commit(client, lid, keys, mine) == [CommitOutcome.STORED] * 2


def test_many_segments_cost_a_bounded_walk_over_their_ancestors(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.core.calls.reservations.MAX_TOUCHED", 5)
    client, lid = shell.session(1), a_layout(shell)
    ring, line = chain(1, 4), chain(2, 4)
    shell.commit(client, lid, ring, shell.slots(client, lid, 4), parent=ring[3])
    shell.commit(client, lid, line, shell.slots(client, lid, 4))
    looked_at: list[bytes] = []
    catalog = shell.planner.catalog
    get = catalog.get
    monkeypatch.setattr(catalog, "get", lambda name: looked_at.append(name) or get(name))
    for parents in ([ring[3]] * 100, [ring[0], *line] * 100, [key(90 + i) for i in range(100)]):
        looked_at.clear()
        segments = [Segment(parent, [], [], []) for parent in parents]
        shell.planner.commit(client, lid, segments, reserve=0, now_ns=0)
        assert len(looked_at) <= 5 + len(parents)


def test_what_segments_have_in_common_is_the_last_to_leave(dram_only: Shell) -> None:
    shell = dram_only
    client, lid = shell.session(1), a_layout(shell)
    root, left, right, other = key(1), key(2), key(3), key(9)
    shell.commit(client, lid, [root, left], shell.slots(client, lid, 2))
    shell.commit(client, lid, [right], shell.slots(client, lid), parent=root)
    shell.commit(client, lid, [other], shell.slots(client, lid))
    segments = [Segment(parent, [], [], []) for parent in (left, right)]
    shell.planner.commit(client, lid, segments, reserve=0, now_ns=0)
    order = [
        replica.block.stored_key
        for replica in shell.planner.residency.dram.candidates(
            shell.planner.catalog.layout("t", lid).dram_class
        )
    ]
    name = shell.planner.catalog.layout("t", lid).name
    assert order == [name(each) for each in (other, right, left, root)]


def test_the_second_of_two_writers_of_a_key_finds_it_present(shell: Shell) -> None:
    one, two, lid = shell.session(1), shell.session(2), a_layout(shell)
    ones, twos = shell.slots(one, lid), shell.slots(two, lid, 2)
    assert shell.commit(one, lid, [key(1)], ones, [5]) == [CommitOutcome.STORED]
    outcomes = shell.commit(two, lid, [key(1), key(2)], twos, [5, 6])
    assert outcomes == [CommitOutcome.PRESENT, CommitOutcome.STORED]
    assert shell.planner.residency.dram.space.used_bytes == 2 * SLOT
    assert shell.planner.open_reservations == 0


def test_a_key_named_twice_in_a_commit_is_stored_once(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    outcomes = shell.commit(client, lid, [key(1)] * 2, shell.slots(client, lid, 2), [5, 5])
    assert sorted(outcomes) == [CommitOutcome.STORED, CommitOutcome.PRESENT]
    shell.planner.check_integrity()


def test_slots_reserved_ahead_come_with_the_commit_and_are_never_numbered_twice(
    shell: Shell,
) -> None:
    client, lid = shell.session(1), a_layout(shell)
    seen: set[int] = set()
    slots = shell.slots(client, lid, 2)
    for number in range(4):
        assert not seen & set(slots)
        seen |= set(slots)
        keys = [key(10 * number), key(10 * number + 1)]
        answer = shell.planner.commit(
            client, lid, [Segment(b"", keys, slots, [0, 0])], reserve=2, now_ns=shell.now_ns
        )
        shell.settle()
        slots = [answer.slots.first_slot + i for i in range(len(answer.slots.addresses))]
    shell.planner.check_integrity()
    shell.planner.close_session(client)
    shell.planner.check_integrity()


def test_what_is_being_brought_up_when_its_tier_fails_can_be_stored_anew(shell: Shell) -> None:
    client, lid, keys = on_nvme_only(shell)
    shell.acquire(client, [lid], keys, wait=True)  # type: ignore[arg-type]
    shell.planner.tier_failed(shell.now_ns)
    first = keys[:1]
    slots = shell.slots(client, lid)  # type: ignore[arg-type]
    outcomes = shell.commit(client, lid, first, slots, [3])  # type: ignore[arg-type]
    assert outcomes == [CommitOutcome.STORED]
    shell.planner.check_integrity()
    while shell.copies:
        shell.end_copy()
    shell.planner.check_integrity()
    grant = shell.acquire(client, [lid], first).answer[0]  # type: ignore[index, arg-type]
    assert grant.checksums == [3]


def test_what_nobody_waits_for_does_not_delay_what_is_waited_for(shell: Shell) -> None:
    client, lid, keys = on_nvme_only(shell, length=6)
    hasty = shell.acquire(client, [lid], keys, wait=True)  # type: ignore[arg-type]
    running = len(shell.copies)
    shell.planner.give_up(hasty, shell.now_ns)
    shell.planner.check_integrity()
    assert len(shell.planner.residency.transfers) == running, "the rest was called off"
    shell.settle()
    again = shell.acquire(client, [lid], keys, wait=True)  # type: ignore[arg-type]
    shell.settle()
    assert again.answer is not None
    assert again.answer[0].held == 6


def test_one_tenants_full_share_does_not_hold_up_anothers_wait(shell: Shell) -> None:
    rich, poor = shell.session(1, "rich"), shell.session(2, "poor")
    lid = a_layout(shell, "rich")
    a_layout(shell, "poor")
    slots = shell.slots(poor, lid, 4)
    shell.slots(rich, lid, 4)
    stuck = shell.reserve(rich, lid, wait=True)
    waits = shell.reserve(poor, lid, wait=True)
    assert waits.answer is None
    shell.planner.abort(poor, slots[:1])
    shell.advance(1)
    assert stuck.answer is None
    assert waits.answer is not None
    assert len(waits.answer.addresses) == 1


def test_who_waits_is_answered_when_its_session_ends(shell: Shell) -> None:
    client, lid, keys = on_nvme_only(shell)
    ticket = shell.acquire(client, [lid], keys, wait=True)  # type: ignore[arg-type]
    shell.planner.close_session(client)  # type: ignore[arg-type]
    shell.run()
    assert ticket in shell.answered
    shell.settle()
    shell.planner.check_integrity()


def test_a_prefetch_pushes_out_nothing_that_is_nowhere_else(shell: Shell) -> None:
    client, lid, keys = on_nvme_only(shell, length=4)
    hot = chain(7, 8)
    shell.put(client, lid, hot[:4])  # type: ignore[arg-type]
    shell.settle()
    shell.put(client, lid, hot[4:])  # type: ignore[arg-type]
    shell.settle()
    shell.planner.prefetch("t", [ChainQuery([lid], keys)], now_ns=shell.now_ns)
    shell.run()
    shell.settle()
    assert shell.planner.lookup("t", ChainQuery([lid], hot)).held == len(hot)


def test_unknown_names_are_told_apart(shell: Shell) -> None:
    client = shell.session(1)
    with pytest.raises(UnknownLayout):
        shell.planner.lookup("t", ChainQuery([b"x" * 16], [key(1)]))
    with pytest.raises(UnknownLayout):
        shell.reserve(client, b"x" * 16)
    with pytest.raises(UnknownLayout):
        shell.commit(client, b"x" * 16, [key(1)], [0])
    with pytest.raises(ReservationExpired):
        shell.commit(client, a_layout(shell), [key(1)], [99])
    with pytest.raises(LeaseExpired):
        shell.planner.renew(client, [99], 0)
    shell.planner.abort(client, [99])


def test_a_block_larger_than_an_extent_is_refused_when_registered(shell: Shell) -> None:
    extent = shell.planner.residency.dram.space.extent_bytes
    with pytest.raises(BadRequest, match="does not fit"):
        shell.planner.register_layout("t", LayoutSpec("m", "bf16", 16, extent + 1))


def test_claims_are_bounded(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    shell.put(client, lid, [key(1)])
    for _ in range(64):
        shell.acquire(client, [lid], [key(1)])
    with pytest.raises(TooMany):
        shell.acquire(client, [lid], [key(1)])
    roomy = Shell(make_planner(dram_slots=64, nvme_slots=0))
    writer, lid = roomy.session(1), a_layout(roomy)
    for _ in range(16):
        roomy.slots(writer, lid)
    with pytest.raises(TooMany):
        roomy.reserve(writer, lid)
    for number in range(15):
        roomy.session(100 + number)
    with pytest.raises(TooMany):
        roomy.session(200)
    for number in range(7):
        roomy.planner.register_layout("t", layout(model=f"m{number}"))
    with pytest.raises(TooMany):
        roomy.planner.register_layout("t", layout(model="one more"))


def test_a_cleared_block_stays_readable_for_who_holds_it(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    shell.put(client, lid, [key(1)])
    grant = shell.acquire(client, [lid], [key(1)]).answer[0]  # type: ignore[index]
    assert shell.planner.clear("t").answer == 1
    assert shell.held(client, lid, [key(1)]) == 0
    assert shell.put(client, lid, [key(1)], value="new") == [STORED]
    assert shell.memory[Tier.DRAM][grant.addresses[0]] == ("t", lid, key(1))
    shell.planner.release(client, [grant.lease_id])
    shell.planner.check_integrity()


def test_a_new_tenant_gets_its_share_of_a_full_store(shell: Shell) -> None:
    rich, poor = shell.session(1, "rich"), shell.session(2, "poor")
    lid = a_layout(shell, "rich")
    a_layout(shell, "poor")
    for base in range(4):
        shell.put(rich, lid, chain(base, 4))
        shell.settle()
    for _ in range(4):
        outcome = shell.put(poor, lid, [key(77)])
        shell.settle()
        if outcome == [STORED]:
            break
    assert shell.held(poor, lid, [key(77)]) == 1
    shell.planner.check_integrity()


def test_a_failed_nvme_tier_costs_misses_not_answers(shell: Shell) -> None:
    client, lid, keys = on_nvme_only(shell)
    ticket = shell.acquire(client, [lid], keys, wait=True)  # type: ignore[arg-type]
    shell.planner.tier_failed(shell.now_ns)
    while shell.copies:
        shell.end_copy(fail=True)
    shell.settle()
    assert ticket.answer is not None
    assert ticket.answer[0].held == 0
    assert shell.held(client, lid, keys) == 0  # type: ignore[arg-type]
    for base in range(5, 10):
        assert shell.put(client, lid, chain(base, 4)) == [STORED] * 4  # type: ignore[arg-type]
    with pytest.raises(NoLowerTier):
        shell.planner.flush("t", drop=False)
    shell.planner.check_integrity()


def test_nvme_that_is_full_of_others_does_not_block_dram() -> None:
    shell = Shell(make_planner(dram_slots=16, nvme_slots=4))
    client, lid = shell.session(1), a_layout(shell)
    for base in range(30):
        ticket = shell.reserve(client, lid, 4, wait=True)
        for _ in range(20):
            shell.run()
            shell.settle()
            shell.advance(10)
            if ticket.answer is not None:
                break
        assert ticket.answer is not None, "a put waits for ever"
        granted = len(ticket.answer.addresses)
        for address in ticket.answer.addresses:
            shell.memory[Tier.DRAM][address] = base
        first = ticket.answer.first_slot
        shell.commit(client, lid, chain(base, granted), list(range(first, first + granted)))
        shell.planner.check_integrity()


def test_memory_that_the_machine_refuses_shrinks_the_tier_and_nothing_else(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    shell.put(client, lid, [key(1)])
    number = shell.planner.residency.dram.space.extent_of(
        shell.acquire(client, [lid], [key(1)]).answer[0].addresses[0]  # type: ignore[index]
    )
    shell.planner.extent_failed(Tier.DRAM, number)
    assert shell.put(client, lid, [key(2)]) == [DENIED]
    shell.planner.check_integrity()


def test_parents_in_a_ring_do_not_hold_their_slots_for_ever(dram_only: Shell) -> None:
    shell = dram_only
    client, lid = shell.session(1), a_layout(shell)
    for number in range(8):
        # Parents are what clients say they are: here each block its own.
        slots = shell.slots(client, lid)
        shell.commit(client, lid, [key(number)], slots, parent=key(number))
    assert shell.put(client, lid, [key(100)]) == [STORED]
    shell.planner.check_integrity()


def test_the_blocks_a_session_holds_are_bounded(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acquires_module, "MAX_LEASED", 6)
    client, lid, keys = shell.session(1), a_layout(shell), chain(1, 4)
    shell.put(client, lid, keys)
    grant = shell.acquire(client, [lid], keys).answer[0]  # type: ignore[index]
    with pytest.raises(TooMany):
        shell.acquire(client, [lid], keys)
    assert shell.acquire(client, [lid], keys[:2]).answer is not None
    shell.planner.release(client, [grant.lease_id])
    assert shell.acquire(client, [lid], keys).answer is not None
    shell.planner.close_session(client)
    assert client.leased == 0


def test_clears_that_nobody_waits_for_do_not_pile_up(shell: Shell) -> None:
    client, lid = shell.session(1), a_layout(shell)
    shell.put(client, lid, chain(1, 4))
    shell.planner.chores.part = 1
    first = shell.planner.clear("t")
    for _ in range(100):
        shell.planner.give_up(shell.planner.clear("t"), shell.now_ns)
    last = shell.planner.clear("t")
    assert len(shell.planner.chores) == 1
    while shell.planner.chores:
        shell.planner.chores.go_on()
    shell.run()
    shell.settle()
    assert first.answer == 4
    assert last.answer == 0
    assert shell.held(client, lid, chain(1, 4)) == 0
    assert shell.planner.clear("nobody").answer == 0
