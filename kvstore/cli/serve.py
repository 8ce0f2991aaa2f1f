"""`kvstore serve`, and `python -m kvstore_server`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kvstore.cli.main import COMMANDS, Parser, Subparsers
from kvstore.config import Config, StoreConfig, load_config, store_config
from kvstore.config_keys import KEYS
from kvstore.errors import ConfigError
from kvstore.units import format_size


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("serve", help=COMMANDS["serve"].summary)
    add_config_arguments(parser)
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config`, and a flag for every key of the configuration."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file (KVSTORE_CONFIG)")
    for key in KEYS.values():
        parser.add_argument(
            key.flag,
            dest=key.name,
            metavar=key.name.rpartition(".")[2].upper(),
            help=f"{key.description} Default: {key.default!r}.".replace("%", "%%"),
        )


def config_from(args: argparse.Namespace) -> Config:
    """Raises `ConfigError`."""
    given = vars(args)
    flags = {name: given[name] for name in KEYS if given.get(name) is not None}
    return load_config(args.config, flags=flags)


def sizes_from(config: Config) -> StoreConfig:
    """Sizes with which a server can start. Raises `ConfigError`."""
    sizes = store_config(config)
    if not sizes.nvme_capacity_bytes:
        return sizes
    try:
        from kvstore.tiers.nvme import usable_bytes_of
    except ModuleNotFoundError:
        return sizes  # Nor can a server start.
    if not usable_bytes_of(sizes.nvme_capacity_bytes, sizes.nvme_extent_bytes, sizes.max_blocks):
        raise config.refuse(
            "nvme.capacity",
            f"{format_size(sizes.nvme_capacity_bytes)} has no room for blocks beside what the tier "
            f"needs for itself, some pieces of {format_size(sizes.nvme_extent_bytes)} (from "
            "dram.extent) among it; give more, or a smaller dram.extent",
        )
    return sizes


def run(args: argparse.Namespace) -> int:
    config = config_from(args)
    sizes_from(config)
    # The server has handlers of its own. Until then, a second in which it is imported, nothing
    # is held, and whoever wants it stopped is not told of a failure.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os._exit(os.EX_OK))
    try:
        from kvstore_server.run import run as run_server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the server's packages are not installed ({error.name} is missing); "
            "install tiered-kvstore[server]"
        ) from error
    return run_server(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Without the word `serve`, for `python -m kvstore_server`."""
    parser = Parser(prog="kvstore_server", description="Run the KV-cache store's server.")
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except ConfigError as error:
        print(f"kvstore: {error}", file=sys.stderr)
        return os.EX_CONFIG
