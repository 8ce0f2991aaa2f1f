"""One process's connection to the store, kept up in the background.

Whoever wants to use the store borrows the client, and gets None while there is
none: nobody ever waits for a server. A client that failed is dropped at once and
everyone misses until a thread has brought another one up, with back-off. Between
uses the same thread asks the server for a sign of life, so that a dead or hung
one is noticed before a request pays for it.

`generation` counts lives of the server that were attached to: what was known of
one life's content says nothing about the next.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from vllm.logger import init_logger

from kvstore.errors import (
    ConfigError,
    Draining,
    InternalError,
    KVStoreError,
    NoSession,
    NoTenant,
    Unavailable,
    UnknownLayout,
)
from kvstore.types import (
    NO_HINTS,
    ChainPresence,
    ChainQuery,
    CommitAnswer,
    Hints,
    Landing,
    LayoutSpec,
    LeaseGrant,
    Segment,
    SlotGrant,
)

if TYPE_CHECKING:
    from kvstore.client.lease import Layout
    from kvstore.client.link import Counters, VramGrant
    from kvstore_connectors.vllm.config import ConnectorConfig

logger = init_logger("vllm.kvstore")

T = TypeVar("T")

Watch = Callable[[bytes], "bool | None"]
"""Whether a block is held, None where that takes a call."""

FIRST_TRY_S = 5.0
HEARTBEAT_S = 1.0
IDLE_EXIT_S = 60.0
"""A server that the connector started ends this long after its last client."""

BACKOFF_FIRST_S = 0.1
BACKOFF_MOST_S = 3.0
_LONG_OUTAGE_S = 30.0
_PAST_LIVES = 16


def connector_of(config: ConnectorConfig, idle_exit_s: float = IDLE_EXIT_S) -> Connect:
    """How to reach the configured server, or this user's own, started if need be."""
    timeout_s = 1.0 + config.acquire_timeout_ms / 1000 * 1.5

    def connect() -> StoreClient:
        from kvstore.client.rpc import parse_endpoint
        from kvstore.client.sync import Client
        from kvstore.local.spawn import ensure_server

        if config.endpoint is None:
            path = parse_endpoint(None).socket_path
            assert path is not None
            ensure_server(path, config.server_args, idle_exit_s=idle_exit_s)
        return Client(config.endpoint, timeout_s=timeout_s)

    return connect


def is_loss(error: KVStoreError) -> bool:
    """Whether an error means that this client is of no more use."""
    return isinstance(
        error, Unavailable | NoSession | NoTenant | Draining | UnknownLayout | InternalError
    )


class StoreClient(Protocol):
    """What the connector uses of `kvstore.Client`."""

    @property
    def is_local(self) -> bool: ...
    @property
    def epoch(self) -> bytes: ...
    @property
    def counters(self) -> Counters: ...
    def close(self) -> None: ...
    def server_info(self) -> object: ...
    def register_layout(self, spec: LayoutSpec) -> Layout: ...
    def peek(self, layout_ids: Sequence[bytes], keys: Sequence[bytes]) -> ChainPresence | None: ...
    def watch(self, layout_ids: Sequence[bytes]) -> Watch: ...
    def acquire_many(
        self,
        chains: Sequence[ChainQuery],
        wait_ms: int,
        hints: Hints = NO_HINTS,
        *,
        reader: bytes = b"",
    ) -> list[LeaseGrant]: ...
    def release(self, lease_ids: Sequence[int]) -> None: ...
    def prefetch_many(self, chains: Sequence[ChainQuery], within_ms: int = 0) -> int: ...
    def report_damage(self, addresses: Sequence[int]) -> None: ...
    def reserve(self, layout: Layout, count: int, wait_ms: int) -> SlotGrant: ...
    def land(
        self, layout: Layout, slots: Sequence[int], *, not_on: Collection[str] = ()
    ) -> list[Landing]: ...
    def commit(
        self,
        layout: Layout,
        segments: Sequence[Segment],
        *,
        ahead: int,
        landed: Sequence[Landing] = (),
    ) -> CommitAnswer: ...
    def abort(self, slots: Sequence[int]) -> None: ...
    def vram(self, gpu: str, layout_ids: Sequence[bytes], *, reader: bytes = b"") -> VramGrant: ...
    def slot(self, address: int, nbytes: int, *, epoch: bytes | None = None) -> memoryview: ...
    def write_slots(
        self,
        slots: Sequence[int],
        addresses: Sequence[int],
        nbytes: int,
        write: Callable[[list[memoryview]], T],
    ) -> T: ...


Connect = Callable[[], StoreClient]


class Attached:
    """A client with its layouts registered, one for each shard, and its users."""

    def __init__(
        self, client: StoreClient, specs: Sequence[LayoutSpec], layouts: list[Layout], epoch: bytes
    ) -> None:
        self.client = client
        self.specs = specs
        self.layouts = layouts
        self.epoch = epoch
        self.users = 0
        self.dropped = False


class StoreLink:
    """Owns the client. All methods may be called from any thread; none blocks on
    the server except `wait_...` and `close`, which are bounded."""

    def __init__(self, connect: Connect, specs: Sequence[LayoutSpec], name: str) -> None:
        """`connect` may block and raise any `KVStoreError`; it runs in the thread."""
        self._connect = connect
        self._specs = list(specs)
        self._condition = threading.Condition()
        self.current: Attached | None = None
        """The client, for calls that neither wait nor touch the arena. Read only."""
        self._closing = False
        self._epoch = b""
        self._past: deque[bytes] = deque(maxlen=_PAST_LIVES)
        self._sought = b""
        self._hurry = False
        self._unused: list[StoreClient] = []
        self._tried = False
        self.generation = 0
        self.outages = 0
        self._thread = threading.Thread(target=self._run, name=f"kvstore-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def up(self) -> bool:
        """Whether asking the store has a point. A plain read, for hot paths."""
        return self.current is not None

    @property
    def specs(self) -> list[LayoutSpec]:
        return self._specs

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Attached | None]:
        """The current client, kept open meanwhile; None while there is none."""
        with self._condition:
            attached = self.current
            if attached is not None:
                attached.users += 1
        try:
            yield attached
        finally:
            if attached is not None:
                self._give_back(attached)

    def failed(self, attached: Attached, error: KVStoreError) -> None:
        """Tell that a call did not work for want of a server. Idempotent."""
        with self._condition:
            if self.current is not attached:
                return
            self._detach()
            self.outages += 1
        logger.warning("The KV store is gone (%s); continuing without it.", error)

    def suspect(self) -> None:
        """The server did not keep its time: do without it until it answers again."""
        attached = self.current
        if attached is not None:
            self.failed(attached, Unavailable("no answer in time"))

    def change_layouts(self, specs: Sequence[LayoutSpec]) -> None:
        """Use other layouts from now on; the client is detached until they are known."""
        with self._condition:
            self._specs = list(specs)
            self._detach()

    def seeks(self, epoch: bytes) -> bool:
        """Whether the life of the server that somebody else is attached to may still be found
        from here. Then it is looked for at once."""
        with self._condition:
            if self._epoch == epoch:
                return self.current is not None
            if epoch in self._past:
                return False
            if self._sought != epoch:
                self._sought = epoch
                self._hurry = True
                # Whatever there is now is of an earlier life.
                self._detach()
            return True

    def wait_attached(self, timeout_s: float) -> bool:
        with self._condition:
            return self._condition.wait_for(lambda: self.current is not None, timeout_s)

    def wait_first_try(self, timeout_s: float = FIRST_TRY_S) -> bool:
        """Whether the first try found a server; False also if it takes too long.

        For the engine's start, when nobody is waiting yet: without it the first
        requests would find the store not attached, and miss.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._tried, timeout_s)
            return self.current is not None

    def close(self, timeout_s: float = 2.0) -> None:
        """Detach and end the thread. Idempotent."""
        with self._condition:
            self._closing = True
            self._detach()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        else:
            self._close_unused()

    def _detach(self) -> None:
        attached, self.current = self.current, None
        if attached is not None:
            attached.dropped = True
            if not attached.users:
                # The caller may be the engine's own thread: closing is not for it.
                self._unused.append(attached.client)
        self._condition.notify_all()

    def _give_back(self, attached: Attached) -> None:
        with self._condition:
            attached.users -= 1
            last = attached.dropped and not attached.users
        if last:
            # Only now: while a copy runs, the session must hold on to its slots.
            _close(attached.client)

    def _run(self) -> None:
        backoff_s = BACKOFF_FIRST_S
        silent = False
        while not self._closing:
            self._close_unused()
            try:
                attached = self._attach()
            except (ConfigError, NoTenant) as error:
                # Waiting cannot mend these, but an operator can.
                silent = self._complain(error, silent)
                backoff_s = _LONG_OUTAGE_S
            except KVStoreError as error:
                silent = self._complain(error, silent)
            except Exception:
                logger.exception("The KV store's client failed in an unforeseen way.")
                backoff_s = _LONG_OUTAGE_S
            else:
                if attached is not None:
                    silent = False
                    backoff_s = BACKOFF_FIRST_S
                    self._watch(attached)
                    continue
            with self._condition:
                self._tried = True
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._closing, BACKOFF_FIRST_S)
                self._condition.wait_for(
                    lambda: self._closing or self._hurry, backoff_s - BACKOFF_FIRST_S
                )
                self._hurry = False
            backoff_s = min(backoff_s * 2, BACKOFF_MOST_S)
        self._close_unused()

    def _close_unused(self) -> None:
        with self._condition:
            unused, self._unused = self._unused, []
        for client in unused:
            _close(client)

    def _complain(self, error: KVStoreError, silent: bool) -> bool:
        # The one line of an outage was logged when it began.
        if not silent and not self.outages:
            logger.warning("No KV store yet (%s); continuing without it.", error)
        return True

    def _attach(self) -> Attached | None:
        with self._condition:
            specs = self._specs
        client = self._connect()
        try:
            if not client.is_local:
                raise ConfigError("the server's memory cannot be shared with this process")
            layouts = [client.register_layout(spec) for spec in specs]
            epoch = client.epoch
        except BaseException:
            client.close()
            raise
        attached = Attached(client, specs, layouts, epoch)
        with self._condition:
            if self._closing or self._specs is not specs:
                client.close()
                return None
            if epoch != self._epoch:
                self._past.append(self._epoch)
                self._epoch = epoch
                self.generation += 1
            self.current = attached
            self._tried = True
            self._condition.notify_all()
        logger.info("The KV store is attached.")
        return attached

    def _watch(self, attached: Attached) -> None:
        """Return when `attached` is no longer the current client."""
        while True:
            with self._condition:
                if self._condition.wait_for(lambda: self.current is not attached, HEARTBEAT_S):
                    return
            if attached.users:
                # Whoever uses it notices a loss; and a client that found its
                # server anew under a running copy would change what slots mean.
                continue
            with self.borrow() as current:
                if current is not attached:
                    return
                try:
                    attached.client.server_info()
                except KVStoreError as error:
                    self.failed(attached, error)
                    return
                if attached.client.epoch != attached.epoch:
                    self._renew(attached)
                    return

    def _renew(self, attached: Attached) -> None:
        """The server restarted between two calls: start afresh, quietly."""
        with self._condition:
            if self.current is attached:
                self._detach()


def _close(client: StoreClient) -> None:
    try:
        client.close()
    except KVStoreError as error:
        logger.debug("Closing the KV store's client: %s", error)
