"""What a request says of itself reaches the store within bounds."""

from __future__ import annotations

import pytest

from kvstore.client import wire
from kvstore.client.calls import _acquire_message
from kvstore.client.link import Budget
from kvstore.errors import BadRequest
from kvstore.types import Hints, Refusal
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore_server.service import _hints


def test_a_request_that_says_nothing_is_like_most() -> None:
    assert _hints(pb.AcquireRequest()) == Hints(50, None)


def test_a_priority_of_zero_is_the_lowest() -> None:
    assert _hints(pb.AcquireRequest(priority=0)).priority == 0


def test_who_computes_says_so_before_having_measured() -> None:
    assert _hints(pb.AcquireRequest(recompute=pb.Recompute())).tokens_per_s == 0.0
    told = pb.AcquireRequest(recompute=pb.Recompute(tokens_per_s=5e3))
    assert _hints(told).tokens_per_s == 5e3


@pytest.mark.parametrize(
    "request_",
    [
        pb.AcquireRequest(priority=101),
        pb.AcquireRequest(recompute=pb.Recompute(tokens_per_s=-1)),
        pb.AcquireRequest(recompute=pb.Recompute(tokens_per_s=float("nan"))),
        pb.AcquireRequest(recompute=pb.Recompute(tokens_per_s=float("inf"))),
    ],
)
def test_what_cannot_be_is_refused(request_: pb.AcquireRequest) -> None:
    with pytest.raises(BadRequest):
        _hints(request_)


def test_the_wires_refusals_are_the_stores() -> None:
    names = {name: number for name, number in pb.Lease.Refusal.items() if number}
    assert names == {refusal.name: int(refusal) for refusal in Refusal}


def test_a_refusal_that_a_client_does_not_know_is_none_to_it() -> None:
    response = pb.AcquireResponse(leases=[pb.Lease(refusal=99), pb.Lease(refusal=pb.Lease.LATE)])  # type: ignore[arg-type]
    assert [grant.refusal for grant in wire.grants(response, 0)] == [None, Refusal.LATE]


@pytest.mark.parametrize("hints", [Hints(), Hints(0), Hints(100, 0.0), Hints(50, 2e4)])
def test_what_a_client_says_is_what_a_server_hears(hints: Hints) -> None:
    message = _acquire_message(Budget(1.0), [], 10, hints)
    assert isinstance(message, pb.AcquireRequest)
    assert _hints(pb.AcquireRequest.FromString(message.SerializeToString())) == hints
