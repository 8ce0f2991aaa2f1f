"""A child that dies, hangs or will not end is an error with a reason, not a hang."""

from __future__ import annotations

import sys
import time

import pytest

from kvstore_benchmarks.pipe import ChildFailed, Pipe

ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


def pipe(code: str, **environment: str) -> Pipe:
    return Pipe([sys.executable, "-c", code], environment)


def test_answers_come_in_order() -> None:
    with pipe(ECHO) as child:
        for number in range(3):
            child.send({"number": number})
        assert [child.receive(60)["number"] for _ in range(3)] == [0, 1, 2]


def test_a_child_that_dies_says_why_each_time_it_is_asked() -> None:
    with pipe("import sys; sys.exit('out of luck')") as child:
        for _ in range(2):
            with pytest.raises(ChildFailed, match="out of luck"):
                child.receive(60)


def test_a_child_that_hangs_is_given_up() -> None:
    with (
        pipe("import sys; sys.stdin.read()") as child,
        pytest.raises(ChildFailed, match="no answer"),
    ):
        child.receive(0.05)


def test_a_child_that_will_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_benchmarks.pipe.STOP_TIMEOUT_S", 0.2)
    child = pipe("import time; print('{}', flush=True); time.sleep(60)")
    child.receive(60)
    started = time.monotonic()
    child.close({"do": "stop"})
    child.close()
    assert time.monotonic() - started < 40


def test_a_child_gets_what_is_added_to_the_environment() -> None:
    with pipe("import os; print('\"' + os.environ['KV_ADDED'] + '\"')", KV_ADDED="x") as child:
        assert child.receive(60) == "x"
