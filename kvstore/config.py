"""The server's configuration: typed, parsed once, failing loudly.

Four layers, the first that has a key wins: command line flag, environment
(`KVSTORE_SECTION_KEY`), TOML file, default. The keys themselves are in
`config_keys`. Every refusal names the key, where its value came from, and the
nearest right name.

`Config` is what was asked for; sizes left to "auto" become bytes in
`store_config`, which alone looks at the machine.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec

from kvstore.config_keys import (
    EVICTION_ENTRY_POINTS,
    EVICTIONS,
    KEYS,
    SECTIONS,
    Dram,
    Key,
    Nvme,
    Policy,
    Server,
    Tenants,
    Vram,
    meta_of,
)
from kvstore.errors import BadRequest, ConfigError
from kvstore.machine import Machine
from kvstore.nearest import nearest
from kvstore.parts import find_device
from kvstore.units import format_size, parse_size

MIB = 1 << 20

MIN_EXTENT_BYTES = 64 << 10
MAX_EXTENT_BYTES = 1 << 30
LEAST_VRAM_BYTES = 2 * MIB
"""A GPU deals in no smaller pieces."""
LEAST_AUTOMATIC_EXTENTS = 8
"""On a disk with less room a server that was told nothing does without; some of them the tier
needs for itself."""
MAX_SOCKET_PATH_BYTES = 107
"""What sockaddr_un holds, less the ending zero."""

ATTACH_SUFFIX = ".attach"
STATE_SUFFIX = ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Everything `Store` needs to know, in its own units."""

    dram_capacity_bytes: int
    nvme_capacity_bytes: int = 0
    extent_bytes: int = 64 * MIB
    nvme_extent_bytes: int = 128 * MIB
    nvme_bytes_per_day: int = 0
    """That may be written there; 0: any."""
    vram_capacity_bytes: int = 0
    """Of each GPU."""
    vram_reserve_bytes: int = 0
    vram_gpudirect: bool = False
    """Read from the NVMe tier straight into that, where it is possible."""
    lease_ms: int = 30_000
    reservation_ms: int = 30_000
    max_sessions: int = 256
    max_leases: int = 4096
    """A session."""
    max_reservations: int = 256
    """A session."""
    max_layouts: int = 1024
    """A tenant."""
    max_blocks: int = 10_000_000
    """A tier."""
    eviction: str = "worth"
    prefetch_share: float = 0.25
    """Of a tenant's DRAM, for what has not been used yet."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of what moves between tiers, by tenant; 1 for others."""


class Config(msgspec.Struct, frozen=True):
    """The configuration asked for, checked, with every path filled in.

    `sources`: key -> where its value came from, for people.
    """

    server: Server
    dram: Dram
    nvme: Nvme
    vram: Vram
    policy: Policy
    tenants: Tenants
    sources: dict[str, str]

    @property
    def socket_path(self) -> Path:
        return Path(self.server.socket)

    @property
    def attach_path(self) -> Path:
        return Path(self.server.socket + ATTACH_SUFFIX)

    @property
    def state_path(self) -> Path:
        return Path(self.server.socket + STATE_SUFFIX)

    @property
    def socket_mode(self) -> int:
        return int(self.server.socket_mode, 8)

    @property
    def gpus(self) -> list[str]:
        return [gpu.strip() for gpu in self.vram.gpus.split(",") if gpu.strip()]

    def defaulted(self, key: str) -> bool:
        return self.sources[key] == "default"

    def refuse(self, key: str, why: str) -> ConfigError:
        """The error for a value of `key` that cannot be used."""
        return ConfigError(f"{key} ({self.sources[key]}): {why}")


def default_socket_path(environ: Mapping[str, str] | None = None) -> Path:
    """Where a server listens, and a client looks, when neither is told."""
    environ = os.environ if environ is None else environ
    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "kvstore" / "kvstore.sock"
    return Path(tempfile.gettempdir()) / f"kvstore-{os.getuid()}" / "kvstore.sock"


def default_data_path(environ: Mapping[str, str] | None = None) -> Path:
    environ = os.environ if environ is None else environ
    cache = environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path("~/.cache").expanduser()) / "kvstore"


def load_config(
    file: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Config:
    """The configuration from all layers. `flags`: key name -> text.

    Without `file`, the environment's `KVSTORE_CONFIG` may name one.
    Raises `ConfigError`.
    """
    environ = os.environ if environ is None else environ
    if file is None and environ.get("KVSTORE_CONFIG"):
        file = Path(environ["KVSTORE_CONFIG"])
    values: dict[str, Any] = {}
    sources = dict.fromkeys(KEYS, "default")
    for name, raw, source in _layers(file, environ, flags or {}):
        strict = source.startswith("file ")
        values[name] = _convert(KEYS[name], raw, source, strict)
        sources[name] = source
    values["server.socket"] = values.get("server.socket") or str(default_socket_path(environ))
    values["nvme.path"] = values.get("nvme.path") or str(default_data_path(environ))
    for name in ("server.socket", "nvme.path"):
        values[name] = os.path.abspath(os.path.expanduser(values[name]))
    parts: dict[str, Any] = {
        section: struct(
            **{
                name.partition(".")[2]: value
                for name, value in values.items()
                if name.partition(".")[0] == section
            }
        )
        for section, struct in SECTIONS.items()
    }
    config = Config(**parts, sources=sources)
    _check(config)
    return config


def _layers(
    file: Path | None, environ: Mapping[str, str], flags: Mapping[str, str]
) -> Iterable[tuple[str, Any, str]]:
    """(key, raw value, source), weakest layer first."""
    if file is not None:
        for name, raw in _read_file(file).items():
            yield name, raw, f"file {file}"
    by_env = {key.env: key.name for key in KEYS.values()}
    for variable, text in sorted(environ.items()):
        if variable in by_env:
            yield by_env[variable], text, f"environment {variable}"
        else:
            _check_stray_variable(variable, by_env)
    for name, text in flags.items():
        yield name, text, f"flag {KEYS[name].flag}"


_ORCHESTRATOR = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT(_\d+_(TCP|UDP)|$)")
"""Variables that Kubernetes makes up for a service whose name begins with "kvstore"."""


def _check_stray_variable(variable: str, known: Mapping[str, str]) -> None:
    if not variable.startswith("KVSTORE_") or _ORCHESTRATOR.search(variable):
        return
    in_section = variable.startswith(tuple(f"KVSTORE_{name.upper()}_" for name in SECTIONS))
    near = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
    if in_section or near:
        raise ConfigError(f"unknown environment variable {variable}{nearest(variable, known)}")


def _read_file(file: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read file {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"file {file} is not valid TOML: {error}") from error
    values = {}
    for section, table in document.items():
        if section not in SECTIONS:
            raise ConfigError(
                f"unknown section [{section}] in file {file}{nearest(section, SECTIONS)}"
            )
        if not isinstance(table, dict):
            raise ConfigError(f"{section} in file {file} is to be a section, [{section}]")
        for key, raw in table.items():
            name = f"{section}.{key}"
            if name not in KEYS:
                raise ConfigError(f"unknown key {name} in file {file}{nearest(name, KEYS)}")
            values[name] = raw
    return values


def _convert(key: Key, raw: Any, source: str, strict: bool) -> Any:
    if isinstance(raw, str) and key.name in ("tenants.uids", "tenants.shares"):
        raw = _split_pairs(key, raw, source)
    try:
        return msgspec.convert(raw, key.type, strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{key.name} ({source}): {_in_words(key, error, raw)}") from error


_TYPES = {"int": "a whole number", "float": "a number", "str": "text", "object": "a table"}


def _in_words(key: Key, error: msgspec.ValidationError, raw: Any) -> str:
    """What was expected, for people who do not read Python's types."""
    if "matching regex" in str(error):
        return f"expected permissions as 0600 or 0660, the owner's included, not {raw!r}"
    if "Invalid enum value" in str(error):
        return f"expected {', '.join(get_args(get_args(key.type)[0]))}, not {raw!r}"
    in_words = re.sub(r"`(\w+)`", lambda name: _TYPES.get(name[1], name[1]), str(error))
    expected, wrong_type, _ = in_words.replace("Expected", "expected").partition(", got ")
    return f"{expected}, not {raw!r}" if wrong_type else expected


def _split_pairs(key: Key, text: str, source: str) -> dict[str, str]:
    pairs = {}
    for item in filter(None, text.split(",")):
        left, equals, right = item.partition("=")
        if not equals:
            what = "UID=TENANT" if key.name == "tenants.uids" else "TENANT=SHARE"
            raise ConfigError(f"{key.name} ({source}): expected {what}, not {item!r}")
        if left.strip() in pairs:
            raise ConfigError(f"{key.name} ({source}): {left.strip()!r} is there twice")
        pairs[left.strip()] = right.strip()
    return pairs


_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _check(config: Config) -> None:
    """Refuse what no machine could run."""
    for name, path in (("server.socket", config.server.socket), ("nvme.path", config.nvme.path)):
        if "\0" in path or any(len(part) > 255 for part in os.fsencode(path).split(b"/")):
            raise config.refuse(name, f"{path!r} cannot be a path")
    path = config.server.socket + ATTACH_SUFFIX
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise config.refuse(
            "server.socket", f"{path} is longer than the {MAX_SOCKET_PATH_BYTES} bytes of a socket"
        )
    for name, text in (
        ("server.listen", config.server.listen),
        ("server.admin", config.server.admin),
    ):
        if text:
            try:
                parse_loopback(text)
            except ValueError as error:
                raise config.refuse(name, str(error)) from error
    if config.server.device:
        try:
            find_device(config.server.device)
        except BadRequest as error:
            raise config.refuse("server.device", str(error)) from error
    for name, size in (
        ("dram.capacity", config.dram.capacity),
        ("dram.extent", config.dram.extent),
        ("nvme.capacity", config.nvme.capacity),
        ("vram.capacity", config.vram.capacity),
        ("vram.reserve", config.vram.reserve),
    ):
        if size != "auto" or name.startswith("vram."):
            try:
                parse_size(size)
            except ValueError as error:
                raise config.refuse(name, str(error)) from error
    try:
        _bytes_per_day(config.nvme.endurance, 1)
    except ValueError as error:
        raise config.refuse("nvme.endurance", str(error)) from error
    for name, tenant in (
        ("tenants.default", config.tenants.default),
        ("tenants.tcp", config.tenants.tcp),
    ):
        if tenant and not _TENANT.fullmatch(tenant):
            raise config.refuse(name, f"{tenant!r} is not a tenant's name (A-Z a-z 0-9 . _ -)")
    installed = entry_points(group=EVICTION_ENTRY_POINTS).names
    if config.policy.eviction not in {*EVICTIONS, *installed}:
        known = [*EVICTIONS, *sorted(installed)]
        name = config.policy.eviction
        raise config.refuse(
            "policy.eviction",
            f"no policy {name!r} ({', '.join(known)}){nearest(name, known)}",
        )
    if len(set(config.gpus)) < len(config.gpus):
        raise config.refuse("vram.gpus", f"a GPU is there twice in {config.vram.gpus!r}")
    for tenant in config.tenants.shares:
        if not _TENANT.fullmatch(tenant):
            raise config.refuse("tenants.shares", f"{tenant!r} is not a tenant's name")
    for uid, tenant in config.tenants.uids.items():
        if not uid.isdecimal():
            raise config.refuse("tenants.uids", f"{uid!r} is not a numeric user id")
        if not _TENANT.fullmatch(tenant):
            raise config.refuse("tenants.uids", f"{tenant!r} is not a tenant's name")


def parse_loopback(text: str) -> tuple[str, int]:
    """(host, port) of "127.0.0.1:PORT", "[::1]:PORT" or "localhost:PORT".
    Raises `ValueError`."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    host = host.removeprefix("[").removesuffix("]")
    if host == "localhost":
        host = "127.0.0.1"
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ValueError(f"{host!r} is not a loopback address, and there is no TLS")
    return host, int(port)


def store_config(config: Config, machine: Machine | None = None) -> StoreConfig:
    """The store's part, with every size in bytes. Raises `ConfigError`."""
    machine = machine or Machine()
    dram = _capacity(config.dram.capacity, lambda: machine.available_memory_bytes() // 4)
    nvme = _capacity(
        config.nvme.capacity, lambda: machine.free_disk_bytes(Path(config.nvme.path)) // 4
    )
    if config.dram.extent == "auto":
        extent = _auto_extent(dram, at_most=64 * MIB)
    else:
        extent = parse_size(config.dram.extent)
        if extent & (extent - 1) or not MIN_EXTENT_BYTES <= extent <= MAX_EXTENT_BYTES:
            raise config.refuse("dram.extent", "must be a power of two, 64KiB to 1GiB")
    if dram < extent:
        raise config.refuse(
            "dram.capacity", f"{format_size(dram)} is less than one extent ({format_size(extent)})"
        )
    # A slot on disk is a block and its header, so the largest block needs the
    # next power of two there.
    nvme_extent = max(_auto_extent(nvme, at_most=128 * MIB), 2 * extent)
    if config.nvme.capacity == "auto" and nvme < LEAST_AUTOMATIC_EXTENTS * nvme_extent:
        nvme = 0
    if config.server.device and not nvme:
        raise config.refuse("server.device", "without an NVMe tier there is nothing to model")
    if 0 < nvme < nvme_extent:
        raise config.refuse(
            "nvme.capacity",
            f"{format_size(nvme)} is less than one extent on disk ({format_size(nvme_extent)}, "
            "from dram.extent); 0 switches the tier off",
        )
    vram = parse_size(config.vram.capacity)
    if config.gpus and vram < max(extent, LEAST_VRAM_BYTES):
        raise config.refuse("vram.capacity", f"{format_size(vram)} is too little to be of use")
    if config.vram.gpudirect and not nvme:
        raise config.refuse("vram.gpudirect", "nvme.capacity is 0: there is nothing to read from")
    return StoreConfig(
        dram_capacity_bytes=dram // extent * extent,
        nvme_capacity_bytes=nvme,
        extent_bytes=extent,
        nvme_extent_bytes=nvme_extent,
        nvme_bytes_per_day=_bytes_per_day(
            config.nvme.endurance, machine.disk_bytes(Path(config.nvme.path))
        ),
        vram_capacity_bytes=vram,
        vram_reserve_bytes=parse_size(config.vram.reserve),
        vram_gpudirect=config.vram.gpudirect,
        lease_ms=config.server.lease_ms,
        reservation_ms=config.server.reservation_ms,
        max_sessions=config.server.max_sessions,
        max_leases=config.server.max_leases,
        max_reservations=config.server.max_reservations,
        max_blocks=config.server.max_blocks,
        eviction=config.policy.eviction,
        prefetch_share=config.policy.prefetch_share,
        shares=config.tenants.shares,
    )


def _capacity(asked: str | int, automatic: Callable[[], int]) -> int:
    return automatic() if asked == "auto" else parse_size(asked)


_DRIVE_WRITES = re.compile(r"(\d+(?:\.\d+)?)\s*dwpd", re.IGNORECASE)


def _bytes_per_day(asked: str | int, drive_bytes: int) -> int:
    """0: no limit. Raises `ValueError`."""
    if asked == "":
        return 0
    drive_writes = _DRIVE_WRITES.fullmatch(str(asked).strip())
    if drive_writes is not None:
        most = float(drive_writes[1])
        nbytes = max(1, int(most * drive_bytes)) if most else 0
    else:
        try:
            nbytes = parse_size(asked)
        except ValueError as error:
            raise ValueError(f"{asked!r} is neither a size such as 2TB nor 0.3dwpd") from error
    if not nbytes:
        raise ValueError("nothing could be written; nvme.capacity = 0 means no such tier")
    return nbytes


def _auto_extent(capacity: int, at_most: int) -> int:
    """The power of two nearest below a sixteenth of `capacity`, within bounds."""
    sixteenth = max(capacity // 16, MIB)
    return min(1 << (sixteenth.bit_length() - 1), at_most)


class Setting(NamedTuple):
    """One line of the effective configuration."""

    key: str
    value: Any
    source: str


def effective(config: Config, sizes: StoreConfig) -> list[Setting]:
    """Every key with its value in force and where that came from.

    Keys marked secret in their struct show as "(set)" or "(not set)".
    """
    automatic = {
        "dram.capacity": sizes.dram_capacity_bytes,
        "dram.extent": sizes.extent_bytes,
        "nvme.capacity": sizes.nvme_capacity_bytes,
    }
    settings = []
    for key in KEYS.values():
        section, _, name = key.name.partition(".")
        value = getattr(getattr(config, section), name)
        if (meta_of(key.type).extra or {}).get("secret"):
            value = "(set)" if value else "(not set)"
        elif value == "auto" and key.name in automatic:
            value = f"{format_size(automatic[key.name])} (auto)"
        settings.append(Setting(key.name, value, config.sources[key.name]))
    return settings
