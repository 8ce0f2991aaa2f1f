"""`kvstore check-config`: what `kvstore serve` with the same arguments would do."""

from __future__ import annotations

import argparse
import json

from kvstore.cli.main import COMMANDS, Subparsers
from kvstore.cli.serve import add_config_arguments, config_from, sizes_from
from kvstore.config import Setting, effective


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("check-config", help=COMMANDS["check-config"].summary)
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def run(args: argparse.Namespace) -> int:
    config = config_from(args)
    settings = effective(config, sizes_from(config))
    if args.json:
        document = {s.key: {"value": s.value, "source": s.source} for s in settings}
        print(json.dumps(document, indent=2))
    else:
        print(_as_toml(settings))
    return 0


def _as_toml(settings: list[Setting]) -> str:
    """The settings as a configuration file, with sources as comments."""
    lines: list[str] = []
    section = ""
    for setting in settings:
        table, _, name = setting.key.partition(".")
        if table != section:
            lines += ([""] if section else []) + [f"[{table}]"]
            section = table
        lines.append(f"{f'{name} = {_toml(setting.value)}':55} # {setting.source}")
    return "\n".join(lines)


def _toml(value: object) -> str:
    if isinstance(value, dict):
        pairs = ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return json.dumps(value)
