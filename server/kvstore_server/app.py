"""The server as a whole: what it is made of, in which order it starts and stops.

Start: claim the socket (so that nothing of a running server is touched), answer
probes, open the tiers, recover, listen, become ready. Whatever fails is undone in
reverse.

Stop: say so (health, readiness), let the store refuse new work and write back what
is only in DRAM, let running calls end, end sessions, stop listening, close the
tiers (which commits the index), remove the socket. `hurry` cuts the waiting short
and skips nothing else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from hashlib import blake2b
from importlib import metadata
from pathlib import Path

from prometheus_client import CollectorRegistry

from kvstore.clock import Clock, MonotonicClock
from kvstore.config import Config, StoreConfig, parse_loopback, store_config
from kvstore.errors import AddressInUse
from kvstore.machine import Machine
from kvstore.metrics import Metrics
from kvstore.parts import MODELLED, find_device
from kvstore.store import MAX_RUNNING, Store
from kvstore.tiers.dram import DramTier
from kvstore.tiers.modelled import Modelled, ModelledDisk
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_disk import Disk
from kvstore.tiers.vram import open_all
from kvstore_server import limits
from kvstore_server.admin import AdminServer, Health
from kvstore_server.attach import AttachServer
from kvstore_server.endpoint import GrpcEndpoint
from kvstore_server.lines import Lines
from kvstore_server.principals import Principals
from kvstore_server.service import KVStoreService, ServerInfo
from kvstore_server.sockets import SocketClaim, listen_seqpacket

_log = logging.getLogger(__name__)

_STOP_GRACE_S = 1.0
_IDLE_POLL_S = 0.25
_OTHER_THREADS = 4
"""Beside the copies: extents, the index, syncs."""


def software_version() -> str:
    try:
        return metadata.version("tiered-kvstore")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def warn_of_too_little(sizes: StoreConfig, machine: Machine | None = None) -> None:
    """Log what this process may not get as much of as it may come to need: it starts, and
    fails when it is full."""
    available = (machine or Machine()).available_memory_bytes()
    if sizes.dram_capacity_bytes > available:
        _log.warning(
            "dram.capacity is %d bytes, but only %d of memory are available: before it is full, "
            "the kernel may kill the server",
            sizes.dram_capacity_bytes, available,
        )  # fmt: skip
    wanted = limits.SPARE_DESCRIPTORS + 2 * sizes.max_sessions
    wanted += sizes.dram_capacity_bytes // sizes.extent_bytes
    wanted += sizes.nvme_capacity_bytes // sizes.nvme_extent_bytes
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted > allowed != resource.RLIM_INFINITY:
        _log.warning(
            "%d descriptors are allowed (ulimit -Hn), and %d may be needed: tiers leave the last "
            "ones to clients and probes, and stay at their size then",
            allowed, wanted,
        )  # fmt: skip


class App:
    """One server in this process, for tests and `run` alike.

    `start`, then `stop`, once each, in one event loop.
    """

    def __init__(self, config: Config, *, clock: Clock | None = None) -> None:
        self.config = config
        self.health = Health()
        self.metrics = Metrics(CollectorRegistry(), version=software_version())
        self.tcp_port: int | None = None
        self.admin_port: int | None = None
        self.left_behind = False
        """Threads that wait for a drive, which may never answer: the process should end
        without them."""
        self._clock = clock or MonotonicClock()
        self._undo = AsyncExitStack()
        self._hurry = asyncio.Event()

    async def start(self) -> None:
        """Raises `ConfigError`, `DataError`, `AddressError`, `TierError`; then
        everything is undone already."""
        try:
            await self._start()
        except BaseException:
            await self._undo.aclose()
            raise

    async def _start(self) -> None:
        config = self.config
        sizes = store_config(config)
        warn_of_too_little(sizes)
        claim = SocketClaim.take(config.socket_path, config.socket_mode)
        self._undo.callback(claim.release)
        await self._start_admin()
        self.store = await self._open_store(sizes)
        self._undo.push_async_callback(self._close_store)
        await self.store.start()
        self.health.stalled_seconds = self._stalled_seconds
        self.metrics.watch_store(self.store.stats, self._stalled_seconds)
        self.metrics.watch_transfers(self.store.transfer_stats)
        self.metrics.watch_vram(self.store.vram_stats)
        await self._listen()
        self._write_state()
        self._undo.callback(config.state_path.unlink, missing_ok=True)
        await self._set_ready(True, "")
        _log.info(
            "ready",
            extra={
                "fields": {
                    "socket": config.server.socket,
                    "tcp_port": self.tcp_port,
                    "admin_port": self.admin_port,
                    "dram_bytes": sizes.dram_capacity_bytes,
                    "nvme_bytes": sizes.nvme_capacity_bytes,
                    "device": config.server.device or None,
                }
            },
        )

    async def _start_admin(self) -> None:
        address = self.config.server.admin
        if not address:
            return
        admin = AdminServer(self.health, self.metrics)
        host, port = parse_loopback(address)
        try:
            self.admin_port = await admin.start(host, port)
        except AddressInUse:
            # Nobody asked for this very port, and two users of one host should
            # both be able to start a server without asking for anything.
            if not self.config.defaulted("server.admin"):
                raise
            self.admin_port = await admin.start(host, 0)
            _log.warning("port %d is in use, the admin port is %d", port, self.admin_port)
        self._undo.push_async_callback(admin.close)

    async def _open_store(self, sizes: StoreConfig) -> Store:
        nvme: NvmeTier | None = None
        if sizes.nvme_capacity_bytes:
            nvme = await self._open_nvme(sizes)
            self.metrics.watch_wear(nvme.wear, self._clock)
        elif self.config.nvme.capacity == "auto":
            _log.warning(
                "too little disk is free at %s: blocks are kept in memory only",
                self.config.nvme.path,
            )
        try:
            vram, vram_refused = await asyncio.to_thread(open_all, self.config.gpus)
            secret = nvme.secret() if nvme is not None else secrets.token_bytes(32)
            return Store(
                config=sizes,
                clock=self._clock,
                dram=DramTier(sizes.extent_bytes, sizes.dram_capacity_bytes),
                nvme=nvme,
                tenant_key=lambda tenant: blake2b(tenant.encode(), key=secret).digest(),
                executor=ThreadPoolExecutor(MAX_RUNNING + _OTHER_THREADS, "kvstore-io"),
                observer=self.metrics,
                costs=None if nvme is None else self._costs(),
                vram=vram,
                vram_refused=vram_refused,
            )
        except BaseException:
            if nvme is not None:
                nvme.close()
            raise

    async def _open_nvme(self, sizes: StoreConfig) -> NvmeTier:
        opening = ThreadPoolExecutor(1, "kvstore-open")
        work = partial(
            NvmeTier.open,
            self.config.nvme.path,
            sizes.nvme_capacity_bytes,
            sizes.nvme_extent_bytes,
            sizes.max_blocks,
            behind=self._modelled(),
            clock=self._clock,
        )
        try:
            return await asyncio.get_running_loop().run_in_executor(opening, work)
        except asyncio.CancelledError:
            # Nobody waits for a drive to be read, or to answer: it is as after a crash.
            self.left_behind = True
            raise
        finally:
            opening.shutdown(wait=False)

    async def _close_store(self) -> None:
        self.left_behind = not await self.store.close()

    def _modelled(self) -> Callable[[Disk], Disk] | None:
        if not self.config.server.device:
            return None
        device = find_device(self.config.server.device)
        _log.warning("NVMe is modelled: it is no faster than %s", device)
        return partial(ModelledDisk, model=Modelled(device, self._clock))

    def _costs(self) -> Path:
        """What is learned of a modelled device is not of the one that is there."""
        name = self.config.server.device.removeprefix(MODELLED)
        return Path(self.config.nvme.path) / (f"costs-{name}.json" if name else "costs.json")

    async def _listen(self) -> None:
        server = self.config.server
        principals = Principals(
            self.config.tenants,
            owner_uid=os.geteuid(),
            owner_only=self.config.socket_mode & 0o077 == 0,
        )
        info = ServerInfo(
            version=software_version(),
            attach_path=str(self.config.attach_path),
            lease_ms=server.lease_ms,
            reservation_ms=server.reservation_ms,
        )
        self._service = KVStoreService(self.store, principals, self.metrics, info)
        self._endpoint = GrpcEndpoint(self._service, max_sessions=server.max_sessions)
        self._undo.push_async_callback(self._endpoint.stop, _STOP_GRACE_S)
        if server.listen:
            self.tcp_port = self._endpoint.listen_tcp(*parse_loopback(server.listen))
        self._endpoint.listen_unix(self.config.socket_path, self.config.socket_mode)
        self._attach = AttachServer(
            listen_seqpacket(self.config.attach_path, self.config.socket_mode),
            self.store,
            principals,
            self.metrics,
            Lines(self._service.unary(), self._service.calls),
            max_connections=server.max_sessions + limits.SPARE_CONNECTIONS,
        )
        self._undo.callback(self._attach.close)
        # Last: to whom gRPC answers, and there is no attach socket, there is none for good.
        await self._endpoint.start()

    async def _set_ready(self, ready: bool, why_not: str) -> None:
        self.health.ready = ready
        self.health.why_not_ready = why_not
        self.metrics.set_ready(ready)
        await self._endpoint.set_serving(ready)

    def _stalled_seconds(self) -> float:
        return (self._clock.now_ns() - self.store.progress_ns()) / 1e9

    def _write_state(self) -> None:
        """For people and `kvstore status`: where to find this server's other ports."""
        server = self.config.server
        state = {
            "pid": os.getpid(),
            "admin": _with_port(server.admin, self.admin_port),
            "listen": _with_port(server.listen, self.tcp_port),
            "epoch": self.store.epoch.hex(),
            "started": time.time(),
            "device": server.device or None,
        }
        path = self.config.state_path
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(json.dumps(state) + "\n")
        partial.replace(path)

    def busy(self) -> bool:
        """Calls are running."""
        return self._service.calls.under_way > 0

    def hurry(self) -> None:
        """Let a `stop`, under way or to come, wait for nothing any more."""
        self._hurry.set()

    async def stop(self) -> None:
        """Drain within `drain_s`, then close everything. Raises nothing."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.server.drain_s
        _log.info("draining")
        await self._set_ready(False, "draining")
        await self._patiently(lambda left: self.store.drain(left), deadline)
        await self._patiently(lambda left: self._service.wait_idle(), deadline)
        self._service.end_sessions()
        self._attach.close()
        await self._undo.aclose()
        _log.info("stopped")

    async def _patiently(self, work: Callable[[float], Awaitable[None]], deadline: float) -> None:
        """Run `work`, told the seconds left, until it ends, time is up or `hurry`."""
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0 or self._hurry.is_set():
            left = 0.0
        task = asyncio.ensure_future(work(left))
        hurried = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((task, hurried), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for future in (task, hurried):
            future.cancel()
        outcome, _ = await asyncio.gather(task, hurried, return_exceptions=True)
        if isinstance(outcome, Exception):
            _log.error("a fault while draining", exc_info=outcome)

    async def wait_idle(self) -> None:
        """Until `idle_exit_s` went by without a session; forever when that is 0."""
        limit_s = self.config.server.idle_exit_s
        if not limit_s:
            await asyncio.Event().wait()
        loop = asyncio.get_running_loop()
        last_used = loop.time()
        while loop.time() - last_used < limit_s:
            await asyncio.sleep(min(_IDLE_POLL_S, limit_s))
            if self.store.stats().sessions:
                last_used = loop.time()


def _with_port(address: str, port: int | None) -> str | None:
    return None if port is None else f"{address.rpartition(':')[0]}:{port}"
