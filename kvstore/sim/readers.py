"""Traces from files, in the formats of docs/simulator.md.

    Mooncake         JSON lines, `hash_ids` for each request
    sessions         JSON documents, in a tar file or alone, one a session
    Azure            CSV: times and lengths, no prefixes
    kvstore          JSON lines, the first one a header

`.xz` is read as it is. Which format a file has is seen from its beginning. Everything
wrong with a file is a `TraceError` that names the place.
"""

from __future__ import annotations

import csv
import io
import lzma
import random
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from kvstore.core.policies import SessionState
from kvstore.sim.trace import Request, Trace, TraceError, merged, pieces_of

MOONCAKE_BLOCK_TOKENS = 512
AZURE_BLOCK_TOKENS = 16
FORMAT = "kvstore-trace"
MOST_NUMBERS = 1 << 24
"""The hash ids of a session count from 0 or 1."""
MOST_BLOCKS = 1 << 27
"""A replay has some ten bytes for each."""
MOST_NESTED = 64
"""Sub-agents of sub-agents."""
AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]

Count = Annotated[int, Meta(ge=0, le=1 << 40)]
Positive = Annotated[int, Meta(ge=1, le=1 << 40)]
Time = Annotated[float, Meta(ge=0, le=1e15)]
Number = Annotated[int, Meta(ge=0, lt=1 << 62)]


class Line(msgspec.Struct):
    """A line of a Mooncake trace."""

    timestamp: Time
    input_length: Count
    output_length: Count
    hash_ids: list[Number]


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """The first line of a kvstore trace."""

    format: str
    version: int
    block_tokens: Positive


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """Any further line of a kvstore trace."""

    time_ms: Time
    tokens: Count
    blocks: list[Number | str]
    output_tokens: Count = 0
    session: str | int | None = None
    priority: Annotated[int, Meta(ge=0, le=100)] = 50
    category: str = ""
    then: Literal["waiting", "idle", "ended"] | None = None
    expected_ms: Time | None = None


class Turn(msgspec.Struct):
    """A request of a session, or a sub-agent with requests of its own."""

    t: Time
    type: str = ""
    tokens: Count = msgspec.field(default=0, name="in")
    output_tokens: Count = msgspec.field(default=0, name="out")
    hash_ids: list[Number] = []
    stop: str | None = None
    requests: list[Turn] | None = None


class Session(msgspec.Struct):
    block_size: Positive
    requests: list[Turn]
    hash_id_scope: str = "local"


def read_traces(paths: Iterable[Path], *, session_rate: float, seed: int) -> Trace:
    """The files as one workload. Sessions without a common time arrive at `session_rate`
    a second, drawn with `seed`. Raises `TraceError`."""
    paths = list(paths)
    trace = merged(read_trace(path, session_rate=session_rate, seed=seed) for path in paths)
    where = ", ".join(map(str, paths))
    if not any(request.pieces for request in trace.requests):
        raise TraceError(f"{where}: no request asks for any block")
    _check_blocks(where, trace.blocks)
    return trace


def read_trace(path: Path, *, session_rate: float, seed: int) -> Trace:
    name = path.name.removesuffix(".xz")
    data = _content(path)
    if data[257:262] == b"ustar":
        return _sessions(_members(path, data), session_rate, seed)
    if name.endswith(".csv") or data.startswith(AZURE_HEADER[0].encode()):
        return _azure(path, data)
    first, _, _ = data.partition(b"\n")
    known = _keys(first)
    if "format" in known:
        return _kvstore(path, data)
    if "hash_ids" in known or name.endswith(".jsonl"):
        return _mooncake(path, data)
    if "block_size" in _keys(data):
        return _sessions([(str(path), data)], session_rate, seed)
    raise TraceError(f"{path}: not a trace of a known format (docs/simulator.md)")


def _content(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    except lzma.LZMAError as error:
        raise TraceError(f"{path}: not an xz file: {error}") from error


def _members(path: Path, data: bytes) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(".json") else None
                if file is not None:
                    yield f"{path}: {member.name}", file.read()
    except tarfile.TarError as error:
        # Some of its messages have a line for each way that was tried.
        why = " ".join(str(error).split())
        raise TraceError(f"{path}: not a tar file: {why}") from error


def _keys(line: bytes) -> set[str]:
    """The keys of a JSON object; none when it is no such thing."""
    try:
        return set(msgspec.json.decode(line, type=dict[str, msgspec.Raw]))
    except (msgspec.DecodeError, RecursionError):
        return set()


def _lines(path: Path, data: bytes) -> Iterator[tuple[str, bytes]]:
    """(where, line) for lines that are not empty."""
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _decode(where: str, line: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    try:
        return decoder.decode(line)
    except msgspec.DecodeError as error:
        raise TraceError(f"{where}: {error}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{where}: not UTF-8") from error
    except RecursionError as error:
        raise TraceError(f"{where}: nested too deeply") from error


class _Clock:
    """Refuses times that run backwards."""

    def __init__(self) -> None:
        self._latest = 0.0

    def at(self, where: str, time_ms: float) -> float:
        if time_ms < self._latest:
            raise TraceError(f"{where}: time runs backwards, from {self._latest} to {time_ms}")
        self._latest = time_ms
        return time_ms


def _mooncake(path: Path, data: bytes) -> Trace:
    decoder = msgspec.json.Decoder(Line)
    clock = _Clock()
    numbers: dict[int, int] = {}
    requests = []
    for where, text in _lines(path, data):
        line: Line = _decode(where, text, decoder)
        time_ms = clock.at(where, line.timestamp)
        _check_length(where, line.input_length, len(line.hash_ids), MOONCAKE_BLOCK_TOKENS)
        prompt = [numbers.setdefault(name, len(numbers)) for name in line.hash_ids]
        requests.append(Request(time_ms, line.input_length, line.output_length, pieces_of(prompt)))
    return Trace(MOONCAKE_BLOCK_TOKENS, len(numbers), requests)


def _kvstore(path: Path, data: bytes) -> Trace:
    lines = _lines(path, data)
    where, text = next(lines)
    header: Header = _decode(where, text, msgspec.json.Decoder(Header))
    if header.format != FORMAT or header.version != 1:
        raise TraceError(f"{where}: not version 1 of {FORMAT}")
    decoder = msgspec.json.Decoder(Asked)
    clock = _Clock()
    numbers: dict[int | str, int] = {}
    sessions: dict[int | str, int] = {}
    requests = []
    for where, text in lines:
        asked: Asked = _decode(where, text, decoder)
        time_ms = clock.at(where, asked.time_ms)
        _check_length(where, asked.tokens, len(asked.blocks), header.block_tokens)
        prompt = [numbers.setdefault(name, len(numbers)) for name in asked.blocks]
        session = None
        if asked.session is not None:
            session = sessions.setdefault(asked.session, len(sessions))
        requests.append(
            Request(
                time_ms,
                asked.tokens,
                asked.output_tokens,
                pieces_of(prompt),
                session,
                asked.priority,
                asked.category,
                None if asked.then is None else SessionState[asked.then.upper()],
                asked.expected_ms,
            )
        )
    return Trace(header.block_tokens, len(numbers), requests)


def _check_length(where: str, tokens: int, blocks: int, block_tokens: int) -> None:
    if blocks > -(-tokens // block_tokens):
        raise TraceError(f"{where}: {tokens} tokens are not {blocks} blocks of {block_tokens}")


def _check_blocks(where: str, blocks: int) -> None:
    if blocks > MOST_BLOCKS:
        raise TraceError(f"{where}: more than {MOST_BLOCKS} blocks")


def _azure(path: Path, data: bytes) -> Trace:
    """Every prompt is its own: what is known is only how much is asked, and when."""
    clock = _Clock()
    begin: datetime | None = None
    requests = []
    blocks = 0
    try:
        rows = csv.reader(io.StringIO(data.decode()), strict=True)
        header = next(rows, [])
        if header != AZURE_HEADER:
            raise TraceError(f"{path}:1: expected the columns {','.join(AZURE_HEADER)}")
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if not row:
                continue
            try:
                when, tokens, output_tokens = row
                # Seven digits of a second are one more than datetime takes.
                moment = datetime.fromisoformat(when[:26])
                begin = begin or moment
                asked, given = int(tokens), int(output_tokens)
            except ValueError as error:
                raise TraceError(f"{where}: {error}") from error
            if asked < 0 or given < 0:
                raise TraceError(f"{where}: a negative number of tokens")
            time_ms = clock.at(where, (moment - begin).total_seconds() * 1e3)
            count = asked // AZURE_BLOCK_TOKENS
            pieces = ((blocks, blocks + count),) if count else ()
            requests.append(Request(time_ms, asked, given, pieces))
            blocks += count
            _check_blocks(where, blocks)
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not UTF-8") from error
    except csv.Error as error:
        raise TraceError(f"{path}:{rows.line_num}: {error}") from error
    return Trace(AZURE_BLOCK_TOKENS, blocks, requests)


def _sessions(documents: Iterable[tuple[str, bytes]], rate: float, seed: int) -> Trace:
    draw = random.Random(seed)
    decoder = msgspec.json.Decoder(Session)
    found: list[tuple[str, Session]] = []
    for where, text in documents:
        session: Session = _decode(where, text, decoder)
        if session.hash_id_scope not in ("local", "global"):
            raise TraceError(f"{where}: hash_id_scope {session.hash_id_scope!r}")
        first = found[0][1] if found else session
        if (session.block_size, session.hash_id_scope) != (first.block_size, first.hash_id_scope):
            raise TraceError(f"{where}: block_size or hash_id_scope is not that of the others")
        found.append((where, session))
    if not found:
        raise TraceError("an archive without sessions")
    block_tokens, scope = found[0][1].block_size, found[0][1].hash_id_scope
    requests: list[Request] = []
    agents = base = blocks = 0
    begin_ms = 0.0
    for where, session in found:
        begin_ms += draw.expovariate(rate) * 1e3
        reader = _Agents(where, block_tokens, base, agents)
        reader.read(session.requests, begin_ms)
        requests += reader.requests
        agents = reader.agents
        blocks = max(blocks, reader.stop)
        base = blocks if scope == "local" else 0
    requests.sort(key=lambda request: request.time_ms)
    return Trace(block_tokens, blocks, requests)


class _Agents:
    """The requests of a session: an agent's own, and those of its sub-agents."""

    def __init__(self, where: str, block_tokens: int, base: int, agents: int) -> None:
        self._where = where
        self._block_tokens = block_tokens
        self._base = base
        self.requests: list[Request] = []
        self.agents = agents
        self.stop = base

    def read(self, turns: list[Turn], begin_ms: float, nested: int = 0) -> None:
        """`begin_ms`: when the agent begins; its turns count from there."""
        if nested > MOST_NESTED:
            raise TraceError(f"{self._where}: nested too deeply")
        clock = _Clock()
        agent = self.agents
        self.agents += 1
        latest = None
        for number, turn in enumerate(turns, 1):
            where = f"{self._where}: request {number}"
            time_ms = begin_ms + clock.at(where, turn.t * 1e3)
            if turn.requests is not None:
                self.read(turn.requests, time_ms, nested + 1)
                continue
            _check_length(where, turn.tokens, len(turn.hash_ids), self._block_tokens)
            prompt = np.array(turn.hash_ids, dtype=np.int64) + self._base
            if len(prompt):
                self.stop = max(self.stop, int(prompt.max()) + 1)
            if self.stop - self._base > MOST_NUMBERS:
                raise TraceError(f"{where}: hash_ids must be less than {MOST_NUMBERS}")
            self.requests.append(
                Request(
                    time_ms,
                    turn.tokens,
                    turn.output_tokens,
                    pieces_of(prompt),
                    agent,
                    then=SessionState.WAITING if turn.stop == "tool_use" else SessionState.IDLE,
                )
            )
            latest = len(self.requests) - 1
        if latest is not None:
            self.requests[latest] = replace(self.requests[latest], then=SessionState.ENDED)
