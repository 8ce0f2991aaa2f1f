"""How the small commands reach a server: one gRPC channel, one call at a time.

They are not clients of the cache: they need no session, no shared memory and no
reconnecting, only an answer or a clear reason why there is none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from kvstore.cli.arguments import positive
from kvstore.config import load_config
from kvstore.errors import WIRE_ERRORS, KVStoreError, Unavailable, Untrusted
from kvstore.local.ownership import check_directory
from kvstore.wire.v1.kvstore_pb2_grpc import KVStoreStub

CALL_TIMEOUT_S = 10.0

_WHERE = "start one with `kvstore serve`, or say with --endpoint where one is"

# A server is on this host, where no proxy that the environment names finds it.
_OPTIONS = [("grpc.enable_http_proxy", 0)]


def add_endpoint_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--endpoint",
        metavar="WHERE",
        help="unix:///path, a path, or HOST:PORT; default: where `kvstore serve` listens",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the server's TOML file")


def add_timeout_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout", type=positive, default=600.0, metavar="S", help="seconds; default: 600"
    )


def endpoint_of(args: argparse.Namespace) -> str:
    """Raises `ConfigError`, and `Unavailable` where nobody named one and no directory that is
    this user's own can have it."""
    if args.endpoint:
        return str(args.endpoint)
    config = load_config(args.config)
    if config.defaulted("server.socket"):
        try:
            check_directory(config.socket_path.parent, private=True)
        except Untrusted:
            raise
        except Unavailable as error:
            raise Unavailable(f"{error}; {_WHERE}") from error
    return config.server.socket


def socket_of(endpoint: str) -> Path | None:
    """The Unix socket's path; None for an endpoint over TCP."""
    path = endpoint.removeprefix("unix://").removeprefix("unix:")
    return Path(path).absolute() if "/" in path else None


@contextmanager
def calling(endpoint: str) -> Iterator[KVStoreStub]:
    """A stub for `endpoint`. Errors of calls made with it come out typed."""
    path = socket_of(endpoint)
    target = endpoint if path is None else f"unix:{path}"
    with grpc.insecure_channel(target, options=_OPTIONS) as channel:
        try:
            yield KVStoreStub(channel)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            raise _typed(error, endpoint) from error


def _typed(error: grpc.RpcError, endpoint: str) -> KVStoreError:
    trailing: Any = error.trailing_metadata() or ()
    code = dict(trailing).get("kvstore-error")
    if code in WIRE_ERRORS:
        return WIRE_ERRORS[code](error.details() or code)
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"no server answers at {endpoint}; {_WHERE}")
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unavailable(f"{endpoint} did not answer in time: the server is busy, or hangs")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return Unavailable(f"{endpoint} does not know this call: a server of another version")
    return Unavailable(f"{endpoint}: {error.code().name.lower()}: {error.details()}")
