"""Room is found at once where most of what is coldest may not leave yet."""

from __future__ import annotations

from kvstore.core.catalog import Replica
from kvstore.core.places.shortlist import BARREN, PASSED_A_FIND, SCANNED, Shortlist, Verdict
from tests.unit.core.policies.harness import replica


class Order:
    """A tier's order, coldest first, of which all wait to be written but those in `clean`."""

    def __init__(self, count: int) -> None:
        self.all = [replica(number) for number in range(count)]
        self.order = list(self.all)
        self.clean: set[Replica] = set()
        self.used: set[Replica] = set()
        self.judged = 0
        self.shortlist = Shortlist()

    def saved(self, number: int) -> None:
        self.clean.add(self.all[number])
        self.shortlist.may_leave(self.all[number])

    def leaves(self) -> int | None:
        found, in_use = self.shortlist.find(iter(self.order), self._may_go)
        assert set(in_use) <= self.used
        if found is None:
            return None
        self.shortlist.used((found,))
        self.order.remove(found)
        return found.address

    def _may_go(self, judged: Replica) -> Verdict:
        self.judged += 1
        if judged in self.used:
            return Verdict.IN_USE
        return Verdict.GO if judged in self.clean else Verdict.LATER


def test_what_was_passed_over_leaves_as_soon_as_it_is_written() -> None:
    order = Order(600)
    order.saved(500)
    assert order.leaves() == 500
    order.judged = 0
    for number in range(100):
        order.saved(number)
        assert order.leaves() == number
    assert order.judged == 100


def test_one_walk_is_for_several_that_leave() -> None:
    order = Order(600)
    for number in range(200, 400):
        order.saved(number)
    left = [order.leaves() for _ in range(100)]
    assert left == list(range(200, 300))
    assert order.judged < 100 * 2 * (PASSED_A_FIND + 2)


def test_without_anything_to_pass_over_the_coldest_leaves_as_the_order_is_now() -> None:
    order = Order(10)
    for number in range(10):
        order.saved(number)
    assert order.leaves() == 0
    order.order.reverse()
    assert order.leaves() == 9


def test_what_is_used_meanwhile_is_not_offered() -> None:
    order = Order(100)
    for number in (60, 61, 70):
        order.saved(number)
    assert order.leaves() == 60
    order.shortlist.used(order.all[1:3])
    order.saved(1)
    order.shortlist.used([order.all[61]])
    assert order.leaves() == 70, "of the two that it found beyond the first, one was used"
    order.saved(0)
    assert order.leaves() == 0


def test_a_new_order_is_walked_anew() -> None:
    order = Order(100)
    for number in (80, 81, 82):
        order.saved(number)
    assert order.leaves() == 80
    order.saved(3)
    order.shortlist.reordered()
    order.order.reverse()
    assert order.leaves() == 82


def test_what_is_passed_over_is_told_coldest_first_and_once_a_walk() -> None:
    order = Order(4)
    order.saved(3)
    assert order.leaves() == 3
    order.shortlist.used([order.all[1]])
    told = [order.shortlist.behind() for _ in range(3)]
    assert [r and r.address for r in told] == [0, 2, None]


def test_who_is_in_use_is_named_once_so_that_it_need_not_be_met_again() -> None:
    order = Order(20)
    order.saved(9)
    assert order.leaves() == 9
    order.used = {order.all[0]}
    order.saved(0)
    order.saved(5)
    assert order.leaves() == 5
    order.saved(19)
    found, in_use = order.shortlist.find(iter(order.order), order._may_go)
    assert found is not None and found.address == 19 and in_use == [order.all[0]]


def test_an_order_that_has_nobody_to_leave_is_not_walked_for_each_that_asks() -> None:
    order = Order(SCANNED + 10)
    assert {order.leaves() for _ in range(BARREN)} == {None}
    assert order.judged == SCANNED
    order.saved(SCANNED + 5)
    assert order.leaves() == SCANNED + 5, "written meanwhile, further on than was looked"
    order.clean.add(order.all[7])
    assert [order.leaves(), order.leaves()] == [None, 7], "after a while it is looked again"


def test_when_others_may_leave_than_before_an_order_is_walked_at_once() -> None:
    order = Order(SCANNED + 10)
    assert order.leaves() is None
    order.clean = set(order.all)
    assert order.leaves() is None
    order.shortlist.reordered()
    assert order.leaves() == 0
