"""Configuration: which layer wins, what is refused and how, what sizes become."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest

from kvstore.config import (
    StoreConfig,
    default_socket_path,
    effective,
    load_config,
    store_config,
)
from kvstore.config_keys import EVICTIONS, KEYS, Key
from kvstore.core.policies import LRU, POLICIES
from kvstore.errors import ConfigError
from kvstore.machine import Machine
from kvstore.tiers.nvme import usable_bytes_of
from kvstore.units import format_size, parse_size

GIB = 1 << 30
MIB = 1 << 20
DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


class FakeMachine(Machine):
    def available_memory_bytes(self) -> int:
        return 32 * GIB

    def free_disk_bytes(self, path: Path) -> int:
        return 400 * GIB

    def disk_bytes(self, path: Path) -> int:
        return 800 * GIB


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "x.toml"
    file.write_text(text)
    return file


def refusal(*args: Any, **kwargs: Any) -> str:
    kwargs.setdefault("environ", {})
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    return str(caught.value)


def test_each_layer_beats_the_one_below(tmp_path: Path) -> None:
    file = toml(tmp_path, "[server]\nlease_ms = 1000\n")
    environ = {"KVSTORE_SERVER_LEASE_MS": "2000"}
    flags = {"server.lease_ms": "3000"}
    assert load_config(environ={}).server.lease_ms == 30_000
    assert load_config(file, environ={}).server.lease_ms == 1000
    assert load_config(file, environ=environ).server.lease_ms == 2000
    config = load_config(file, environ=environ, flags=flags)
    assert config.server.lease_ms == 3000
    assert config.sources["server.lease_ms"] == "flag --lease-ms"


def test_the_environment_can_name_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, "[server]\nlease_ms = 1000\n")
    config = load_config(environ={"KVSTORE_CONFIG": str(file)})
    assert config.server.lease_ms == 1000
    assert config.sources["server.lease_ms"] == f"file {file}"


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_every_key_can_be_given_in_every_layer(tmp_path: Path, key: Key) -> None:
    samples = {
        "server.socket": "/run/x.sock", "server.socket_mode": "0660",
        "server.listen": "127.0.0.1:1", "server.admin": "[::1]:2",
        "server.max_blocks": "2000000", "server.log_level": "debug",
        "server.device": "modelled:gen4-nvme",
        "dram.capacity": "1GiB", "dram.extent": "2MiB",
        "nvme.path": "/data", "nvme.capacity": "7GiB", "policy.eviction": "lru",
        "policy.prefetch_share": "0.5",
        "tenants.default": "a", "tenants.uids": "7=bob", "tenants.tcp": "c",
        "tenants.shares": "bob=2", "vram.gpudirect": "true",
    }  # fmt: skip
    text = samples.get(key.name, "50")
    section, _, name = key.name.partition(".")
    from_flag = load_config(environ={}, flags={key.name: text})
    from_env = load_config(environ={key.env: text})
    if key.name == "tenants.uids":
        document = '[tenants]\nuids = { "7" = "bob" }\n'
    elif key.name == "tenants.shares":
        document = "[tenants]\nshares = { bob = 2 }\n"
    else:
        number = isinstance(key.default, int | float)
        document = f"[{section}]\n{name} = {text if number else repr(text)}\n"
    from_file = load_config(toml(tmp_path, document), environ={})
    values = [getattr(getattr(c, section), name) for c in (from_flag, from_env, from_file)]
    assert values[0] == values[1] == values[2]
    assert from_file.sources[key.name].startswith("file ")


def test_a_wrong_name_is_refused_with_the_nearest_right_one(tmp_path: Path) -> None:
    text = refusal(toml(tmp_path, "[server]\nlease_msec = 1\n"))
    assert "server.lease_msec" in text and "did you mean server.lease_ms?" in text
    text = refusal(toml(tmp_path, "[sever]\n"))
    assert "[sever]" in text and "did you mean server?" in text
    text = refusal(environ={"KVSTORE_SERVER_SOKET": "x"})
    assert "did you mean KVSTORE_SERVER_SOCKET?" in text
    text = refusal(environ={"KVSTORE_SEVER_SOCKET": "x"})
    assert "did you mean KVSTORE_SERVER_SOCKET?" in text


def test_variables_that_an_orchestrator_makes_up_are_not_typos() -> None:
    load_config(
        environ={
            "KVSTORE_SERVICE_HOST": "10.0.0.1",
            "KVSTORE_PORT": "tcp://10.0.0.1:9440",
            "KVSTORE_PORT_9440_TCP_ADDR": "10.0.0.1",
            "KVSTORE_SERVER_SERVICE_PORT": "9440",
            "KVSTORE_SERVER_PORT_9440_TCP": "x",
            "KVSTORE_ENDPOINT": "somebody else's",
        }
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("server.lease_ms", "soon"),
        ("server.lease_ms", "1"),
        ("server.drain_s", "-1"),
        ("server.socket_mode", "rw"),
        ("server.socket_mode", "0000"),
        ("server.socket", "/tmp/a\0b"),
        ("server.socket", "/" + "x" * 110),
        ("server.listen", "0.0.0.0:50051"),
        ("server.listen", "127.0.0.1"),
        ("server.listen", "127.0.0.1:99999"),
        ("server.admin", "example.org:80"),
        ("server.log_level", "loud"),
        ("server.device", "modelled:h100+gen3-nvme"),
        ("dram.capacity", "8 gigs"),
        ("dram.capacity", "-1"),
        ("dram.extent", "big"),
        ("nvme.capacity", "1XB"),
        ("nvme.path", "/tmp/" + "x" * 256),
        ("nvme.path", "/tmp/a\0b"),
        ("vram.capacity", "auto"),
        ("vram.reserve", "some"),
        ("vram.gpudirect", "perhaps"),
        ("nvme.endurance", "0"),
        ("nvme.endurance", "0.0dwpd"),
        ("nvme.endurance", "1 drive"),
        ("nvme.endurance", "-1dwpd"),
        ("policy.eviction", "mru"),
        ("policy.prefetch_share", "1.5"),
        ("policy.prefetch_share", "-0.1"),
        ("tenants.default", "a/b"),
        ("tenants.tcp", "x" * 65),
        ("tenants.uids", "alice"),
        ("tenants.uids", "alice=alice"),
        ("tenants.uids", "7="),
        ("tenants.uids", "7=alice,7=bob"),
        ("tenants.shares", "bob"),
        ("tenants.shares", "bob=0"),
        ("tenants.shares", "b/b=1"),
        ("vram.gpus", "0,1,0"),
    ],
)
def test_a_bad_value_is_refused_with_its_key_and_source(name: str, text: str) -> None:
    key = KEYS[name]
    assert refusal(flags={name: text}).startswith(f"{name} (flag {key.flag}): ")
    assert refusal(environ={key.env: text}).startswith(f"{name} (environment {key.env}): ")


def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    assert "cannot read" in refusal(tmp_path / "absent.toml")
    assert "not valid TOML" in refusal(toml(tmp_path, "[server"))
    assert "expected" in refusal(toml(tmp_path, "[server]\nlease_ms = '1000'\n")).lower()
    assert "[server]" in refusal(toml(tmp_path, "server = 1\n"))
    assert "unknown section" in refusal(toml(tmp_path, "servers = 1\n"))


def test_what_is_refused_is_told_in_words_and_with_what_was_given(tmp_path: Path) -> None:
    assert refusal(flags={"server.drain_s": "1 min"}).endswith("expected a number, not '1 min'")
    assert refusal(toml(tmp_path, "[server]\nlease_ms = 1.5\n")).endswith(
        "expected a whole number, not 1.5"
    )
    assert refusal(flags={"server.log_level": "trace"}).endswith(
        "expected debug, info, warning, error, not 'trace'"
    )
    assert "expected a whole number >= 10" in refusal(flags={"server.lease_ms": "1"})
    assert "0600" in refusal(flags={"server.socket_mode": "rw"})


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0), (4096, 4096), ("512MiB", 512 * MIB), ("8GiB", 8 * GIB), ("8g", 8 * 10**9),
        ("1GB", 10**9), ("1.5 GiB", 3 * GIB // 2), ("1TiB", 1 << 40), ("7B", 7), ("64Ki", 65536),
    ],
)  # fmt: skip
def test_sizes_are_what_they_say(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 3 * MIB, 8 * GIB, 5 << 40])
def test_a_shown_size_reads_back_exactly(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == nbytes


def test_automatic_sizes_are_a_quarter_of_what_is_there() -> None:
    sizes = store_config(load_config(environ={}), FakeMachine())
    assert sizes.dram_capacity_bytes == 8 * GIB
    assert sizes.nvme_capacity_bytes == 100 * GIB
    assert sizes.extent_bytes == 64 * MIB
    assert sizes.nvme_extent_bytes == 128 * MIB


@pytest.mark.parametrize("free", [0, 3 * MIB, 100 * MIB, GIB, 3 * GIB, 5 * GIB, 400 * GIB])
@pytest.mark.parametrize("dram", ["1MiB", "300MiB", "64GiB"])
def test_a_server_that_was_told_nothing_of_its_disk_starts_on_any(free: int, dram: str) -> None:
    class Disk(FakeMachine):
        def free_disk_bytes(self, path: Path) -> int:
            return free

    sizes = store_config(load_config(environ={}, flags={"dram.capacity": dram}), Disk())
    assert sizes.nvme_capacity_bytes in (0, free // 4)
    assert sizes.nvme_capacity_bytes or free < 5 * GIB
    assert not sizes.nvme_capacity_bytes or usable_bytes_of(
        sizes.nvme_capacity_bytes, sizes.nvme_extent_bytes, sizes.max_blocks
    )


@pytest.mark.parametrize("capacity", ["1MiB", "3MiB", "20MiB", "100MiB", "1GiB", "3TiB"])
def test_any_capacity_gets_extents_that_fit_it_and_blocks_that_fit_them(capacity: str) -> None:
    flags = {"dram.capacity": capacity, "nvme.capacity": capacity}
    if parse_size(capacity) < 2 * MIB:
        flags["nvme.capacity"] = "0"
    sizes = store_config(load_config(environ={}, flags=flags), FakeMachine())
    assert sizes.extent_bytes & (sizes.extent_bytes - 1) == 0
    assert sizes.extent_bytes <= sizes.dram_capacity_bytes <= parse_size(capacity)
    assert sizes.dram_capacity_bytes % sizes.extent_bytes == 0
    assert sizes.nvme_capacity_bytes == 0 or sizes.nvme_extent_bytes <= sizes.nvme_capacity_bytes
    assert sizes.nvme_extent_bytes >= sizes.extent_bytes + 4096


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"dram.capacity": "0"}, "dram.capacity"),
        ({"dram.capacity": "1MiB", "dram.extent": "2MiB"}, "dram.capacity"),
        ({"dram.extent": "3MiB"}, "dram.extent"),
        ({"dram.extent": "4KiB"}, "dram.extent"),
        ({"nvme.capacity": "1MiB"}, "nvme.capacity"),
        ({"vram.gpus": "0", "vram.capacity": "1MiB"}, "vram.capacity"),
        ({"nvme.capacity": "0", "vram.gpudirect": "true"}, "vram.gpudirect"),
        ({"nvme.capacity": "0", "server.device": "modelled:gen4-nvme"}, "server.device"),
    ],
)
def test_sizes_that_cannot_work_are_refused(flags: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        store_config(load_config(environ={}, flags=flags), FakeMachine())


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("", 0), ("2TB", 2 * 10**12), ("0.3dwpd", 240 * GIB), ("1 DWPD", 800 * GIB)],
)
def test_an_endurance_is_bytes_or_drive_writes(text: str, nbytes: int) -> None:
    config = load_config(environ={"KVSTORE_NVME_ENDURANCE": text})
    assert store_config(config, FakeMachine()).nvme_bytes_per_day == nbytes


def test_the_default_socket_is_in_the_users_own_directory() -> None:
    inside = default_socket_path({"XDG_RUNTIME_DIR": "/run/user/7"})
    assert inside == Path("/run/user/7/kvstore/kvstore.sock")
    assert default_socket_path({}).parent.name.startswith("kvstore-")
    config = load_config(environ={"XDG_RUNTIME_DIR": "/run/user/7", "XDG_CACHE_HOME": "/c"})
    assert config.socket_path == inside
    assert config.nvme.path == "/c/kvstore"


def test_the_effective_configuration_has_every_key_and_its_source() -> None:
    config = load_config(environ={"KVSTORE_DRAM_CAPACITY": "1GiB"})
    shown = {s.key: s for s in effective(config, store_config(config, FakeMachine()))}
    assert shown.keys() == KEYS.keys()
    assert shown["dram.capacity"].value == "1GiB"
    assert shown["dram.capacity"].source == "environment KVSTORE_DRAM_CAPACITY"
    assert shown["nvme.capacity"].value == "100GiB (auto)"
    assert shown["nvme.capacity"].source == "default"


def test_a_name_that_reads_like_an_automatic_size_is_shown_as_it_is() -> None:
    config = load_config(environ={"KVSTORE_TENANTS_TCP": "auto"})
    shown = {s.key: s.value for s in effective(config, StoreConfig(dram_capacity_bytes=1))}
    assert shown["tenants.tcp"] == "auto"


def test_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    marked = KEYS["tenants.tcp"]._replace(type=Annotated[str, msgspec.Meta(extra={"secret": True})])
    monkeypatch.setitem(KEYS, "tenants.tcp", marked)
    config = load_config(environ={"KVSTORE_TENANTS_TCP": "hunter2"})
    shown = {s.key: s.value for s in effective(config, StoreConfig(dram_capacity_bytes=1))}
    assert shown["tenants.tcp"] == "(set)"


def test_every_policy_can_be_configured() -> None:
    assert set(EVICTIONS) == set(POLICIES)


def test_a_policy_that_is_installed_beside_can_be_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "theirs-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[kvstore.policies]\ntheirs = kvstore.core.policies.lru:LRU\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(environ={"KVSTORE_POLICY_EVICTION": "theirs"})
    assert isinstance(POLICIES[config.policy.eviction](), LRU)


def test_a_policy_misspelt_is_refused_with_the_nearest() -> None:
    assert "did you mean s3-fifo?" in refusal(environ={"KVSTORE_POLICY_EVICTION": "s3fifo"})


def reference_row(key: Key) -> str:
    default = "`{}`" if key.default == {} else f"`{key.default}`" if key.default != "" else "empty"
    return f"| `{key.name}` | {default} | `{key.flag}` | `{key.env}` | {key.description} |"


def test_the_documentation_has_every_key_as_it_is() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    assert rows == [reference_row(key) for key in KEYS.values()]
