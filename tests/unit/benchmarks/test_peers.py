"""A peer's failures are counted as its failures and never end the measurement."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvstore_benchmarks.local import peers as local_peers
from kvstore_benchmarks.local.peers import Peers
from kvstore_benchmarks.local.samples import QUICK, PeerSamples
from kvstore_benchmarks.peers.peer import Absent, Kind, Peer, start

NBYTES = 8192
BLOCKS = 5


def fake(fault: str = "none") -> Peer:
    script = Path(__file__).with_name("fake_peer.py")
    return Peer(Kind(fault, "fake", "fake"), [sys.executable, str(script), fault], {})


def test_what_was_put_comes_back_and_is_compared() -> None:
    with fake() as peer:
        assert (peer.version, peer.way) == ("1.0", "a dictionary")
        peer.prepare(NBYTES, BLOCKS)
        put, got = peer.put(per_call=2), peer.get(per_call=2)
        assert (put.failed, got.failed, got.wrong) == (0, 0, 0)
        assert put.seconds > 0 < got.seconds


def test_other_bytes_than_were_put_are_counted() -> None:
    with fake("lies") as peer:
        peer.prepare(NBYTES, BLOCKS)
        peer.put(per_call=BLOCKS)
        assert peer.get(per_call=BLOCKS)[1:] == (0, 1)
        assert peer.one("get", 3)[1:] == (0, 3)


def test_blocks_that_were_not_taken_are_failures_not_wrong_bytes() -> None:
    with fake("refuses") as peer:
        peer.prepare(NBYTES, BLOCKS)
        assert peer.put(per_call=2).failed == BLOCKS
        assert peer.get(per_call=2)[1:] == (BLOCKS, 0)
        assert peer.one("get", 3)[1:] == (3, 0)


@pytest.mark.parametrize("kind", ["hit", "partial", "miss"])
def test_lookups_are_timed_one_by_one_and_their_answers_checked(kind: str) -> None:
    with fake() as good, fake("lies") as liar:
        for peer in (good, liar):
            peer.prepare(NBYTES, 1)
        answered = good.lookup(kind, 4, samples=6)
        assert len(answered.microseconds) == 6
        assert answered.failed == 0
        assert liar.lookup(kind, 4, samples=6).failed == (0 if kind == "miss" else 6)


def test_nothing_that_was_cleared_is_held() -> None:
    with fake() as peer:
        peer.prepare(NBYTES, BLOCKS)
        peer.put(per_call=BLOCKS)
        peer.clear()
        peer.prepare(NBYTES, BLOCKS)
        assert peer.lookup("hit", 3, samples=1).failed == 0


@pytest.mark.parametrize(
    ("fault", "reason"), [("dies", "ended"), ("raises", "OSError: no such luck")]
)
def test_a_peer_that_fails_says_why(fault: str, reason: str) -> None:
    with fake(fault) as peer:
        peer.prepare(NBYTES, BLOCKS)
        with pytest.raises(Absent, match=reason):
            peer.put(per_call=BLOCKS)


def test_a_peer_that_cannot_be_opened_says_why() -> None:
    with pytest.raises(Absent, match="RuntimeError: no memory to be had"):
        fake("unopenable")


def test_a_peer_that_was_not_set_up_says_how(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="make bench-peers"):
        start(Kind("other", "other", "other"), tmp_path)


def test_the_reason_why_a_peer_could_not_be_set_up_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "peer.json").write_text(json.dumps({"reason": "no library"}))
    with pytest.raises(Absent, match="no library"):
        start(Kind("other", "other", "other"), tmp_path)


def test_a_peer_that_fails_is_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_peers, "start", lambda kind, _: fake(kind.name))
    samples: dict[str, PeerSamples] = {}
    with Peers(samples, QUICK) as peers:
        names = ("none", "dies", "unopenable")
        peers.start([Kind(name, "fake", "fake") for name in names], Path())
        peers.prepare(NBYTES, BLOCKS)
        for index in (-1, 0, 1):
            for name in peers.running:
                peers.round(name, NBYTES, BLOCKS, count=index >= 0)
        peers.calls()
        assert peers.running == ["none"]
    assert "no memory" in (samples["unopenable"].reason or "")
    assert "ended" in (samples["dies"].reason or "")
    good = samples["none"]
    assert good.reason is None
    assert len(good.bandwidth[NBYTES].put) == len(good.bandwidth[NBYTES].get) == 2
    assert good.lookup["hit"].keys() == good.lookup["miss"].keys()
    assert len(good.put_one) == QUICK.peer_calls
    assert (good.failed, good.wrong) == (0, 0)
