"""What traces say is what is replayed, and what cannot be read is named."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kvstore.core.policies import SessionState
from kvstore.sim.readers import read_traces
from kvstore.sim.trace import Trace, TraceError


def read(*paths: Path, rate: float = 1.0, seed: int = 1) -> Trace:
    return read_traces(paths, session_rate=rate, seed=seed)


def mooncake(**changes: Any) -> dict[str, Any]:
    line = {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [7, 9]}
    return {**line, **changes}


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def blocks(trace: Trace, number: int) -> list[int]:
    return [b for first, stop in trace.requests[number].pieces for b in range(first, stop)]


def test_equal_names_are_equal_blocks(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        mooncake(),
        "",
        mooncake(timestamp=3, input_length=1500, hash_ids=[7, 9, 1 << 60]),
    )
    trace = read(path)
    assert trace.block_tokens == 512 and trace.blocks == 3
    assert blocks(trace, 0) == blocks(trace, 1)[:2]
    assert [request.time_ms for request in trace.requests] == [0, 3]
    packed = tmp_path / "t.jsonl.xz"
    packed.write_bytes(lzma.compress(path.read_bytes()))
    assert read(packed) == trace


def test_two_files_share_no_block_and_begin_together(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", mooncake(timestamp=50), mooncake(timestamp=60))
    two = write(tmp_path / "2.jsonl", mooncake(timestamp=5))
    trace = read(one, two)
    assert trace.blocks == 4
    assert [request.time_ms for request in trace.requests] == [0, 0, 10]
    assert blocks(trace, 0) == blocks(trace, 2) and not {*blocks(trace, 0), *blocks(trace, 1)} & {4}


def turn(t: float, ids: list[int], **more: Any) -> dict[str, Any]:
    return {"t": t, "type": "n", "in": 64 * len(ids), "out": 1, "hash_ids": ids, **more}


def session(*turns: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"block_size": 64, "hash_id_scope": "local", "requests": list(turns), **changes}


def archive(path: Path, *documents: object) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for number, document in enumerate(documents):
            data = json.dumps(document).encode()
            member = tarfile.TarInfo(f"sessions/{number}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_sessions_arrive_at_the_stated_rate_and_share_no_block(tmp_path: Path) -> None:
    document = session(turn(0, [1, 2]), turn(4, [1, 2, 3]))
    path = archive(tmp_path / "a.tar.xz", *[document] * 400)
    trace = read(path, rate=0.5)
    assert trace.blocks >= 400 * 3 and len({blocks(trace, n)[0] for n in range(800)}) == 400
    assert 600e3 < trace.requests[-1].time_ms < 1000e3
    assert trace == read(path, rate=0.5) != read(path, rate=0.5, seed=2)


def test_a_sub_agent_counts_its_time_from_its_begin(tmp_path: Path) -> None:
    agent = {"t": 10, "type": "subagent", "requests": [turn(0, [5]), turn(7, [5, 6])]}
    path = write(tmp_path / "s.json", session(turn(0, [1]), agent, turn(12, [1, 2])))
    times = [request.time_ms for request in read(path).requests]
    assert [round(time - times[0]) for time in times] == [0, 10_000, 12_000, 17_000]
    first, *agents, last = (request.session for request in read(path).requests)
    assert first != agents[0] == last or len({first, *agents, last}) == 2


def test_azure_prompts_are_their_own(tmp_path: Path) -> None:
    path = write(
        tmp_path / "azure.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,48,10",
        "2023-11-16 18:17:04.0319600,33,8",
    )
    trace = read(path)
    assert trace.blocks == 5 and trace.requests[1].time_ms == pytest.approx(52)
    assert not {*blocks(trace, 0)} & {*blocks(trace, 1)}


HEADER = {"format": "kvstore-trace", "version": 1, "block_tokens": 16}


def test_the_documented_format_tells_sessions_and_priorities(tmp_path: Path) -> None:
    path = write(
        tmp_path / "own.jsonl",
        HEADER,
        {"time_ms": 1.5, "tokens": 40, "blocks": ["a", "b"], "session": "x", "priority": 90},
        {
            "time_ms": 2,
            "tokens": 48,
            "blocks": ["a", "c", 3],
            "session": "x",
            "category": "chat",
            "then": "waiting",
            "expected_ms": 750,
        },
    )
    first, second = read(path).requests
    assert first.session == second.session and first.priority == 90 and second.category == "chat"
    assert first.then is None and second.then is SessionState.WAITING
    assert first.expected_ms is None and second.expected_ms == 750
    assert read(path).block_tokens == 16 and read(path).blocks == 4


def test_what_is_wrong_is_named_with_its_line(tmp_path: Path) -> None:
    wrong: list[tuple[list[object], int]] = [
        ([mooncake(), "{"], 2),
        ([mooncake(), "[]"], 2),
        ([mooncake(), "", mooncake(hash_ids=["x"])], 3),
        ([mooncake(hash_ids=[-1])], 1),
        ([mooncake(timestamp=9), mooncake(timestamp=8)], 2),
        ([mooncake(timestamp=-1)], 1),
        ([mooncake(input_length="many")], 1),
        ([mooncake(input_length=100)], 1),
        ([{"timestamp": 0, "hash_ids": []}], 1),
        ([HEADER, {"time_ms": 0, "tokens": 16, "blocks": [1], "priority": 101}], 2),
        ([HEADER, {"time_ms": 0, "tokens": 16, "blocks": [1], "pirority": 1}], 2),
        ([{**HEADER, "version": 2}], 1),
        ([{**HEADER, "block_tokens": 0}], 1),
        ([HEADER, {"time_ms": 1e300, "tokens": 16, "blocks": [1]}], 2),
        ([HEADER, {"time_ms": 0, "tokens": 16, "blocks": [1], "expected_ms": -1}], 2),
    ]
    for number, (lines, line) in enumerate(wrong):
        path = write(tmp_path / f"{number}.jsonl", *lines)
        with pytest.raises(TraceError, match=rf"{number}\.jsonl:{line}: "):
            read(path)


def test_wrong_rows_of_a_table_are_named_with_their_line(tmp_path: Path) -> None:
    header, good = "TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.97,48,10"
    for number, row in enumerate(
        ("x,1,1", "2023-11-16 18:17:03.97,48", "2023-11-16 18:17:03.97,-1,1",
         "2023-11-16 18:17:01.97,48,1", "2023-11-16 18:17:03.97,many,1")
    ):  # fmt: skip
        path = write(tmp_path / f"{number}.csv", header, good, row)
        with pytest.raises(TraceError, match=rf"{number}\.csv:3: "):
            read(path)
    with pytest.raises(TraceError, match=r"h\.csv:1: expected the columns"):
        read(write(tmp_path / "h.csv", "a,b,c", good))


def test_more_blocks_than_a_replay_has_room_for_are_refused_with_their_place(
    tmp_path: Path,
) -> None:
    header, huge = "TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.97,99999999999,1"
    with pytest.raises(TraceError, match=r"a\.csv:2: more than \d+ blocks"):
        read(write(tmp_path / "a.csv", header, huge))
    many = [session(turn(0, [(1 << 24) - 1]))] * 9
    with pytest.raises(TraceError, match=r"s\.tar\.xz: more than \d+ blocks"):
        read(archive(tmp_path / "s.tar.xz", *many))


@pytest.mark.parametrize("nested", [100, 100_000])
def test_what_is_nested_too_deeply_is_refused(tmp_path: Path, nested: int) -> None:
    path = tmp_path / "s.json"
    agents = '[{"t":0,"requests":' * nested + "[]" + "}]" * nested
    path.write_text(f'{{"block_size":64,"requests":{agents}}}')
    with pytest.raises(TraceError, match=r"s\.json: "):
        read(path)


def test_wrong_sessions_are_named_with_their_request(tmp_path: Path) -> None:
    for number, document in enumerate(
        (
            session(turn(0, [1]), turn(-1, [1])),
            session(turn(5, [1]), turn(4, [1])),
            session(turn(0, [1]), turn(1, [1 << 30])),
            session(turn(0, [1]), {**turn(1, [1, 2]), "in": 64}),
        )
    ):
        path = archive(tmp_path / f"{number}.tar.xz", session(turn(0, [1])), document)
        with pytest.raises(TraceError, match=r"sessions/1\.json: .*(request 2|requests\[1\])"):
            read(path)
    with pytest.raises(TraceError, match="block_size"):
        read(archive(tmp_path / "b.tar.xz", session(turn(0, [1])), session(block_size=32)))


def test_files_that_are_no_traces_are_refused(tmp_path: Path) -> None:
    for name, data in (
        ("x.xz", b"no"),
        ("y.txt", b"hello"),
        ("z.jsonl", b""),
        ("u.jsonl", b"\xff"),
        ("t.tar", bytes(257) + b"ustar" + bytes(500)),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(TraceError) as refused:
            read(path)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(TraceError, match="No such file"):
        read(tmp_path / "absent.jsonl")
    own = write(tmp_path / "own.jsonl", HEADER, {"time_ms": 0, "tokens": 16, "blocks": [1]})
    with pytest.raises(TraceError, match="replay them apart"):
        read(own, write(tmp_path / "m.jsonl", mooncake()))
