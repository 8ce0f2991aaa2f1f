"""A real server in this process or another, and the rawest possible clients of it."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import msgspec
import xxhash

from kvstore.clock import Clock
from kvstore.config import Config, load_config
from kvstore.wire.columns import pack_keys, pack_numbers, unpack_numbers
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1.kvstore_pb2_grpc import KVStoreStub
from kvstore_server.app import App
from kvstore_server.limits import MAX_WAIT_MS

MIB = 1 << 20
BLOCK_BYTES = 96 << 10
LAYOUT = pb.Layout(model="m", dtype="bfloat16", block_tokens=16, block_bytes=BLOCK_BYTES)

PATIENCE_S = 60.0
"""With what takes a moment: that of a machine which stands still for many seconds."""
HANGS_S = 200.0
"""What has taken so long will not end."""

Metadata = tuple[tuple[str, str | bytes], ...]


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), HANGS_S))  # type: ignore[arg-type]

    return run


def small_config(directory: Path, **flags: str) -> Config:
    """DRAM only, 8 MiB in extents of 1 MiB, any ports; `flags` as section_key."""
    values = {
        "server.socket": str(directory / "k.sock"),
        "server.admin": "127.0.0.1:0",
        "server.listen": "127.0.0.1:0",
        "server.drain_s": "5",
        "dram.capacity": "8MiB",
        "dram.extent": "1MiB",
        "nvme.path": str(directory / "data"),
        "nvme.capacity": "0",
    }
    values |= {name.replace("__", "."): text for name, text in flags.items()}
    return load_config(environ={}, flags=values)


def without_admin(config: Config) -> Config:
    """`config` as if nobody had said anything about the admin port."""
    sources = config.sources | {"server.admin": "default"}
    server = msgspec.structs.replace(config.server, admin="127.0.0.1:9440")
    return msgspec.structs.replace(config, server=server, sources=sources)


@asynccontextmanager
async def serving(
    directory: Path, *, clock: Clock | None = None, **flags: str
) -> AsyncIterator[App]:
    app = App(small_config(directory, **flags), clock=clock)
    await app.start()
    try:
        yield app
        app.store.check_integrity()
    finally:
        await app.stop()


def unix_target(app: App) -> str:
    return f"unix:{app.config.server.socket}"


def tcp_target(app: App) -> str:
    return f"127.0.0.1:{app.tcp_port}"


@asynccontextmanager
async def stub_for(target: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(
        target, options=[("grpc.max_send_message_length", 64 * MIB)]
    ) as channel:
        yield KVStoreStub(channel)


@asynccontextmanager
async def remote_session(stub: Any) -> AsyncIterator[Metadata]:
    """The metadata of a session that lasts as long as the context."""
    stream = stub.OpenSession(pb.OpenSessionRequest())
    opened = await stream.read()
    try:
        yield (("kvstore-session-bin", opened.session),)
    finally:
        stream.cancel()


class RawAttachment:
    """An attach connection without the client library. Blocking: use `in_thread`."""

    def __init__(self, path: Path | str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(str(path))
        self.fds: list[int] = []

    def ask(self, message: object) -> Any:
        """The answer; descriptors that came with it go to `fds`."""
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        self.socket.send(data)
        return self.read()

    def read(self) -> Any:
        answer, fds, _, _ = socket.recv_fds(self.socket, 4096, 4)
        self.fds += fds
        return json.loads(answer) if answer else None

    def close(self) -> None:
        self.socket.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []


@asynccontextmanager
async def attached(app: App) -> AsyncIterator[tuple[RawAttachment, dict[str, Any], Metadata]]:
    raw = await in_thread(RawAttachment, app.config.attach_path)
    try:
        answer = await in_thread(raw.ask, {"op": "attach", "protocol": 2})
        yield raw, answer, (("kvstore-session-bin", bytes.fromhex(answer["session"])),)
    finally:
        raw.close()


async def in_thread(work: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(work, *args)


async def register(stub: Any, layout: pb.Layout = LAYOUT, **kwargs: Any) -> bytes:
    answer = await stub.RegisterLayout(pb.RegisterLayoutRequest(layout=layout), **kwargs)
    layout_id: bytes = answer.layout_id
    return layout_id


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def keys(*numbers: int) -> bytes:
    """A column of keys."""
    return pack_keys([key(number) for number in numbers])


def payload(number: int, nbytes: int = BLOCK_BYTES) -> bytes:
    return (number.to_bytes(8, "big") * (nbytes // 8 + 1))[:nbytes]


async def reserve(
    stub: Any, session: Metadata, layout_id: bytes, count: int, wait_ms: int = 0
) -> Any:
    """The slots granted."""
    request = pb.ReserveRequest(layout_id=layout_id, count=count, wait_ms=wait_ms)
    return (await stub.Reserve(request, metadata=session)).slots


def slot_ids(slots: Any) -> range:
    return range(slots.first_slot, slots.first_slot + len(unpack_numbers(slots.addresses)))


def write_messages(slots: Iterable[int], *numbers: int) -> Iterator[pb.WriteRequest]:
    """The messages that write `payload(number)` into each slot, in uneven pieces."""
    step = 40_000
    for slot, number in zip(slots, numbers, strict=True):
        data = payload(number)
        for offset in range(0, len(data), step):
            yield pb.WriteRequest(slot=slot, data=data[offset : offset + step])


def segment(
    slots: Iterable[int], *numbers: int, checksums: Sequence[int] | None = None
) -> pb.Segment:
    """The blocks `numbers` as one chain. Without `checksums` those of their payloads."""
    sums = [xxhash.xxh3_64_intdigest(payload(number)) for number in numbers]
    return pb.Segment(
        keys=keys(*numbers),
        slots=pack_numbers(list(slots)),
        checksums=pack_numbers(sums if checksums is None else checksums),
    )


async def commit(
    stub: Any, session: Metadata, layout_id: bytes, *segments: pb.Segment, reserve: int = 0
) -> Any:
    request = pb.CommitRequest(layout_id=layout_id, segments=segments, reserve=reserve)
    return await stub.Commit(request, metadata=session)


async def put(stub: Any, session: Metadata, layout_id: bytes, *numbers: int) -> None:
    """Store blocks for which there must be room."""
    slots = slot_ids(await reserve(stub, session, layout_id, len(numbers), wait_ms=10_000))
    await stub.Write(write_messages(slots, *numbers), metadata=session)
    await commit(stub, session, layout_id, segment(slots, *numbers))


async def acquire(stub: Any, session: Metadata, layout_id: bytes, *numbers: int) -> Any:
    chain = pb.Chain(layout_ids=[layout_id], keys=keys(*numbers))
    answer = await stub.Acquire(
        pb.AcquireRequest(chains=[chain], wait_ms=MAX_WAIT_MS), metadata=session
    )
    return answer.leases[0]


async def read(stub: Any, session: Metadata, lease_id: int, *indices: int) -> bytes:
    stream = stub.Read(pb.ReadRequest(lease_id=lease_id, indices=indices), metadata=session)
    return b"".join([message.data async for message in stream])


async def refused(call: Awaitable[Any]) -> tuple[str, grpc.StatusCode]:
    """(error name, status) of a call that must fail."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        trailing: Any = error.trailing_metadata() or ()
        return dict(trailing).get("kvstore-error", ""), error.code()
    raise AssertionError("the call was not refused")


async def eventually(fact: Callable[[], bool]) -> None:
    async def ask() -> bool:
        return fact()

    await eventually_answered(ask)


async def eventually_answered(ask: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await ask():
        assert time.monotonic() < deadline, f"not so within {PATIENCE_S} s"
        await asyncio.sleep(0.02)


async def http_get(port: int, path: str, request: bytes | None = None) -> tuple[int, str]:
    """(status, body); status 0 when the connection ends without an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request or f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = await reader.read()
    except ConnectionError:
        answer = b""
    finally:
        writer.close()
    if not answer:
        return 0, ""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


class Daemon:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], socket_path: Path) -> None:
        self.process = process
        self.socket_path = socket_path

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(Path(f"{self.socket_path}.json").read_text())
        return state

    def wait_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not Path(f"{self.socket_path}.json").exists():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self, timeout_s: float = PATIENCE_S) -> tuple[int, str]:
        """(exit code, stderr), once it has ended by itself."""
        _, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, err


@contextmanager
def daemon(directory: Path, *args: str, name: str = "k") -> Iterator[Daemon]:
    """`python -m kvstore_server` with small defaults; `args` come last and win."""
    socket_path = directory / f"{name}.sock"
    command = [sys.executable, "-m", "kvstore_server", "--socket", str(socket_path)]
    command += ["--admin", "127.0.0.1:0", "--dram-capacity", "8MiB", "--dram-extent", "1MiB"]
    command += ["--nvme-path", str(directory / "data"), "--nvme-capacity", "256MiB", *args]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KVSTORE_")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    )
    try:
        yield Daemon(process, socket_path)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
