"""A policy from elsewhere is used, or it is said what it lacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kvstore.core.catalog import Replica
from kvstore.core.policies import POLICIES, EvictionPolicy, PolicyError
from kvstore.errors import ConfigError
from kvstore.sim.replay import Replay
from kvstore.sim.trace import Request, Trace


class Mine(EvictionPolicy):
    """As in docs/policies.md."""

    def __init__(self) -> None:
        self._held: dict[Replica, None] = {}

    def insert(self, replica: Replica) -> None:
        self._held[replica] = None

    def touch(self, replica: Replica) -> None:
        self.remove(replica)
        self.insert(replica)

    def remove(self, replica: Replica) -> None:
        del self._held[replica]

    def candidates(self) -> Iterator[Replica]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class OfSize(Mine):
    def __init__(self, size: int) -> None:
        super().__init__()


class Lists(Mine):
    def candidates(self) -> Iterator[Replica]:
        return list(self._held)  # type: ignore[return-value]


class Empty(EvictionPolicy):
    def __init__(self) -> None: ...


class Underived:
    insert = touch = remove = Mine.insert
    candidates = __len__ = Mine.__len__


class Withholds(Mine):
    def candidates(self) -> Iterator[Replica]:
        return iter(())


class GivesTwice(Mine):
    def candidates(self) -> Iterator[Replica]:
        return (replica for replica in [*self._held] for _ in range(2))


class Remembers(Mine):
    def remove(self, replica: Replica) -> None: ...


class Miscounts(Mine):
    def __len__(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ModuleType("theirs")
    classes = (Mine, OfSize, Lists, Empty, Underived)
    for each in classes:
        setattr(theirs, each.__name__, each)
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    folder = tmp_path / "theirs-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    names = [each.__name__ for each in classes]
    lines = [f"{name} = theirs:{name}" for name in (*names, "Absent")]
    lines += ["nowhere = no_such_module:X", "lru = theirs:Mine"]
    (folder / "entry_points.txt").write_text("\n".join(["[kvstore.policies]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", r"'nowhere' \(no_such_module:X\) cannot be loaded: No module"),
        ("Absent", "cannot be loaded: .*Absent"),
        ("OfSize", "cannot be made without arguments: .*size"),
        ("Lists", "gives no iterator"),
        ("Empty", "has no insert, touch, remove, candidates, __len__;"),
        ("Underived", "has no by_chain, use, hint, miss, insert_all, touch_run, worth;"),
    ],
)
def test_what_cannot_be_a_policy_is_refused_before_it_is_one(name: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said) as refused:
        POLICIES[name]
    assert isinstance(refused.value, ConfigError), "a server must not start with it"


def test_one_that_owes_nothing_is_used_and_takes_no_name_of_ours() -> None:
    assert isinstance(POLICIES["Mine"](), Mine)
    assert not isinstance(POLICIES["lru"](), Mine)


LOOP = Trace(16, 8, [Request(n, 64, 0, ((n % 2 * 4, n % 2 * 4 + 4),)) for n in range(20)])


@pytest.mark.parametrize(
    ("policy", "by_chain", "said"),
    [
        (Withholds, False, "ends while something is held"),
        (GivesTwice, True, "has left, or one twice"),
        (Remembers, False, "has left, or one twice"),
        (Miscounts, False, r"len\(\) is 0 where 6"),
    ],
)
def test_a_contract_that_is_broken_is_named_in_a_replay(
    policy: type[Mine], by_chain: bool, said: str
) -> None:
    with pytest.raises(PolicyError, match=f"{policy.__name__} breaks its contract: .*{said}"):
        Replay(policy(), LOOP, 6).run(by_chain=by_chain)
    for order in (False, True):
        assert Replay(Mine(), LOOP, 6).run(by_chain=order).evictions
