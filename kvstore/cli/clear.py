"""`kvstore clear`: forget every block of the caller's tenant."""

from __future__ import annotations

import argparse
import os
import sys

from kvstore.cli.connection import (
    add_endpoint_argument,
    add_timeout_argument,
    calling,
    endpoint_of,
)
from kvstore.cli.main import COMMANDS, Subparsers
from kvstore.wire.v1 import kvstore_pb2 as pb


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("clear", help=COMMANDS["clear"].summary)
    add_endpoint_argument(parser)
    parser.add_argument("--yes", action="store_true", help="do it; without this nothing is done")
    add_timeout_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if not args.yes:
        print("kvstore: clear forgets all blocks of this tenant; do it by --yes", file=sys.stderr)
        return os.EX_USAGE
    with calling(endpoint_of(args)) as stub:
        answer = stub.Clear(pb.ClearRequest(), timeout=args.timeout)
    print(f"{answer.blocks} blocks forgotten")
    return 0
