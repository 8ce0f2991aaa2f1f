"""Every key of the configuration: its name, type, limits, default and meaning.

The one source for the flags' and variables' names, for what is accepted and for
docs/configuration.md. A key is added here and nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

EVICTIONS = (
    "lru",
    "fifo",
    "clock",
    "lfu",
    "sieve",
    "2q",
    "arc",
    "lirs",
    "s3-fifo",
    "w-tinylfu",
    "lhd",
    "gdsf",
    "priority-lru",
    "workload-aware",
    "worth",
)
"""The project's own policies (`kvstore.core.policies`)."""
EVICTION_ENTRY_POINTS = "kvstore.policies"
"""The group in which other distributions declare theirs."""


class Section(msgspec.Struct, frozen=True):
    """A table of the TOML file. Field descriptions are the documentation."""


class Server(Section, frozen=True):
    socket: Annotated[
        str,
        Meta(
            description="Path of the gRPC Unix socket. Empty: "
            "`$XDG_RUNTIME_DIR/kvstore/kvstore.sock`, or `kvstore-UID/kvstore.sock` under the "
            "temporary directory. The attach socket is beside it, with `.attach` added."
        ),
    ] = ""
    socket_mode: Annotated[
        str,
        Meta(
            pattern="^0?[67][0-7]{2}$",
            description="Permissions of both sockets, octal. With anything wider than 0600 a "
            "caller on the Unix socket is known only by the session it attached with.",
        ),
    ] = "0600"
    listen: Annotated[
        str,
        Meta(
            description="Loopback address for gRPC over TCP, as `127.0.0.1:PORT`. Empty: none. "
            "Other addresses are refused: there is no TLS."
        ),
    ] = ""
    admin: Annotated[
        str,
        Meta(
            description="Loopback address of `/livez`, `/readyz` and `/metrics`; port 0 takes any. "
            "Empty: none. If it is left to its default and taken, any free port is used."
        ),
    ] = "127.0.0.1:9440"
    idle_exit_s: Annotated[
        float,
        Meta(ge=0, description="Exit after this many seconds without a session. 0: never."),
    ] = 0.0
    drain_s: Annotated[
        float,
        Meta(ge=0, le=3600, description="The longest a stop waits for calls and write-back."),
    ] = 30.0
    lease_ms: Annotated[
        int, Meta(ge=10, le=600_000, description="How long a lease lasts unless renewed.")
    ] = 30_000
    reservation_ms: Annotated[
        int, Meta(ge=10, le=600_000, description="How long a reservation lasts.")
    ] = 30_000
    max_sessions: Annotated[
        int, Meta(ge=1, le=4096, description="Sessions at a time, of all tenants.")
    ] = 256
    max_leases: Annotated[int, Meta(ge=1, le=1 << 20, description="Leases a session may hold.")] = (
        4096
    )
    max_reservations: Annotated[
        int, Meta(ge=1, le=1 << 20, description="Reservations a session may hold.")
    ] = 256
    max_blocks: Annotated[
        int,
        Meta(
            ge=1_000_000,
            le=100_000_000,
            description="Blocks a tier may hold, if its capacity does not end first. Each takes "
            "about 400 bytes of the server's own memory, and those on disk time at a start.",
        ),
    ] = 10_000_000
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least level logged.")
    ] = "info"
    device: Annotated[
        str,
        Meta(
            description="Hardware to be no faster than, as `modelled:h100+gen4-nvme`: see "
            "[operations.md](operations.md#modelled-devices). Empty: as fast as what is there."
        ),
    ] = ""


class Dram(Section, frozen=True):
    capacity: Annotated[
        str | int,
        Meta(
            description="Memory for blocks. `auto`: a quarter of what is available, cgroup "
            "limits included."
        ),
    ] = "auto"
    extent: Annotated[
        str | int,
        Meta(
            description="The piece in which memory is shared with clients, a power of two; no "
            "block is larger. `auto`: a sixteenth of the capacity, 1 MiB to 64 MiB."
        ),
    ] = "auto"


class Nvme(Section, frozen=True):
    path: Annotated[
        str,
        Meta(description="Data directory. Empty: `$XDG_CACHE_HOME/kvstore` or `~/.cache/kvstore`."),
    ] = ""
    capacity: Annotated[
        str | int,
        Meta(
            description="Disk for blocks and for what keeping them takes, a tenth of it and below "
            "10 GiB more. `auto`: a quarter of the free space there, or no such tier where that is "
            "little. `0`: no such tier."
        ),
    ] = "auto"
    endurance: Annotated[
        str | int,
        Meta(
            description="What may be written there in any 24 hours: bytes, as `2TB`, or drive "
            "writes a day, as `0.3dwpd`, of which one is the size of the file system. Blocks of "
            "least worth are then not written. Empty: no limit."
        ),
    ] = ""


class Policy(Section, frozen=True):
    eviction: Annotated[
        str,
        Meta(
            description="Which block leaves a full tier first: the name of a policy of "
            "[policies.md](policies.md), or of one that is installed beside."
        ),
    ] = "worth"
    prefetch_share: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="The part of a tenant's memory that may hold what was prefetched and "
            "has not been used yet. 0: nothing is prefetched.",
        ),
    ] = 0.25


class Tenants(Section, frozen=True):
    default: Annotated[
        str,
        Meta(description="Tenant of callers not named in `uids`. Empty: they are refused."),
    ] = "default"
    uids: Annotated[
        dict[str, str],
        Meta(
            description='Tenant by user id, as `{"1000" = "alice"}`; in flags and environment '
            "`1000=alice,1001=bob`."
        ),
    ] = msgspec.field(default_factory=dict)
    tcp: Annotated[
        str, Meta(description="Tenant of callers over TCP. Empty: they are refused.")
    ] = "default"
    shares: Annotated[
        dict[str, Annotated[float, Meta(gt=0)]],
        Meta(
            description="Share of the traffic between memory and disk by tenant, where several "
            'want more than there is, as `{"alice" = 3.0}`; 1 for the others. In flags and '
            "environment `alice=3,bob=1`."
        ),
    ] = msgspec.field(default_factory=dict)


class Vram(Section, frozen=True):
    gpus: Annotated[
        str,
        Meta(
            description="GPUs in whose memory copies of hot blocks are kept for the workers "
            "there, by number, as `0,1`: see [operations.md](operations.md#memory-of-gpus). "
            "Empty: none."
        ),
    ] = ""
    capacity: Annotated[
        str | int, Meta(description="The most that is taken of each of these GPUs' memory.")
    ] = "4GiB"
    reserve: Annotated[
        str | int,
        Meta(
            description="What of a GPU's memory is left free for others; when they take more, "
            "the store gives back what it has."
        ),
    ] = "2GiB"
    gpudirect: Annotated[
        bool,
        Meta(
            description="Read blocks from disk straight into the memory of these GPUs where that "
            "is possible (GPUDirect Storage): see "
            "[operations.md](operations.md#straight-from-a-drive)."
        ),
    ] = False


class Key(NamedTuple):
    """One key of the configuration, under all its names."""

    name: str
    flag: str
    env: str
    type: Any
    default: Any
    description: str


SECTIONS: dict[str, type[Section]] = {
    "server": Server,
    "dram": Dram,
    "nvme": Nvme,
    "policy": Policy,
    "tenants": Tenants,
    "vram": Vram,
}


def _keys() -> dict[str, Key]:
    keys = {}
    for section, struct in SECTIONS.items():
        for field in msgspec.structs.fields(struct):
            dashed = field.name.replace("_", "-")
            default = field.default if field.default is not msgspec.NODEFAULT else {}
            keys[f"{section}.{field.name}"] = Key(
                name=f"{section}.{field.name}",
                flag=f"--{dashed}" if section == "server" else f"--{section}-{dashed}",
                env=f"KVSTORE_{section}_{field.name}".upper(),
                type=field.type,
                default=default,
                description=meta_of(field.type).description or "",
            )
    return keys


def meta_of(annotated: Any) -> Meta:
    """The description and limits of a key, from its type."""
    found: Meta = annotated.__metadata__[0]
    return found


KEYS = _keys()
