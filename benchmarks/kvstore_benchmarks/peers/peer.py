"""The parent's side: starts a peer's child and asks it to move blocks and look up.

What is not there or ends is an `Absent` with a reason, not an error of the
benchmark's: the others go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import kvstore_benchmarks
from kvstore.errors import KVStoreError
from kvstore_benchmarks.closing import Closing
from kvstore_benchmarks.pipe import ChildFailed, Pipe

FOLDER = Path(".venv-peers")
START_TIMEOUT_S = 180.0
CALL_TIMEOUT_S = 120.0

# The peer's environment does not have this package. It is added last, so that
# nothing beside it comes before what the peer brought.
_RUN = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); name = sys.argv.pop(1);"
    " runpy.run_module(name, run_name='__main__', alter_sys=True)"
)


class Absent(KVStoreError):
    """The peer cannot be measured, or not any more."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A peer in one way of use."""

    name: str
    home: str
    """Its folder among the peers' environments."""
    module: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


QUIET_MOONCAKE = {"GLOG_minloglevel": "2"}
QUIET_LMCACHE = {
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_LOG_LEVEL": "ERROR",
}
KINDS = (
    Kind("mooncake", "mooncake", "mooncake", ("tcp",), QUIET_MOONCAKE),
    Kind("mooncake_shm", "mooncake", "mooncake", ("shm",), QUIET_MOONCAKE),
    Kind("lmcache", "lmcache", "lmcache", (), QUIET_LMCACHE),
)


class Moved(NamedTuple):
    """`failed`, `wrong`: blocks that the peer did not move, or not as they were."""

    seconds: float
    failed: int
    wrong: int


class Asked(NamedTuple):
    """Microseconds of each call; `failed`, `wrong` as in `Moved`, of lookups: answers."""

    microseconds: list[float]
    failed: int
    wrong: int


class Peer(Closing):
    """A running peer. A context manager. Every method raises `Absent`."""

    def __init__(self, kind: Kind, command: list[str], environment: Mapping[str, str]) -> None:
        self.name = kind.name
        self._pipe = Pipe(command, environment)
        try:
            hello = self._answer(START_TIMEOUT_S)
        except Absent:
            self._pipe.close()
            raise
        self.version: str = hello["version"]
        self.way: str = hello["way"]

    def close(self) -> None:
        self._pipe.close({"do": "stop"})

    def prepare(self, nbytes: int, blocks: int) -> None:
        self._call(do="prepare", nbytes=nbytes, blocks=blocks)

    def put(self, per_call: int) -> Moved:
        said = self._call(do="put", per_call=per_call)
        return Moved(said["seconds"], said["failed"], 0)

    def get(self, per_call: int) -> Moved:
        said = self._call(do="get", per_call=per_call)
        return Moved(said["seconds"], said["failed"], said["wrong"])

    def one(self, kind: str, samples: int) -> Asked:
        """`kind`: put or get; one block a call."""
        return _asked(self._call(do="one", kind=kind, samples=samples))

    def lookup(self, kind: str, length: int, samples: int) -> Asked:
        """`kind`: hit, partial (half of the chain is held) or miss."""
        return _asked(self._call(do="lookup", kind=kind, length=length, samples=samples))

    def clear(self) -> None:
        self._call(do="clear")

    def _call(self, **request: Any) -> dict[str, Any]:
        try:
            self._pipe.send(request)
        except ChildFailed as error:
            raise Absent(str(error)) from error
        return self._answer(CALL_TIMEOUT_S)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            said: dict[str, Any] = self._pipe.receive(timeout_s)
        except ChildFailed as error:
            raise Absent(str(error)) from error
        if "error" in said:
            raise Absent(said["error"])
        return said


def start(kind: Kind, folder: Path = FOLDER) -> Peer:
    """Raises `Absent`."""
    home = (folder / kind.home).absolute()
    try:
        state = json.loads((home / "peer.json").read_text())
    except (OSError, ValueError) as error:
        raise Absent(f"not set up in {folder}: make bench-peers") from error
    if "reason" in state:
        raise Absent(state["reason"])
    package = Path(kvstore_benchmarks.__file__).parent
    command = [str(home / "bin" / "python"), "-P", "-c", _RUN, str(package.parent)]
    command += [f"{package.name}.peers.{kind.module}", *kind.arguments]
    return Peer(kind, command, {**kind.environment, **state["environment"]})


def _asked(said: dict[str, Any]) -> Asked:
    return Asked([ns / 1e3 for ns in said["ns"]], said["failed"], said.get("wrong", 0))
