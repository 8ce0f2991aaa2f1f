"""`kvstore flush`: write the tenant's blocks that are only in DRAM to NVMe."""

from __future__ import annotations

import argparse

from kvstore.cli.connection import (
    add_endpoint_argument,
    add_timeout_argument,
    calling,
    endpoint_of,
)
from kvstore.cli.main import COMMANDS, Subparsers
from kvstore.wire.v1 import kvstore_pb2 as pb


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("flush", help=COMMANDS["flush"].summary)
    add_endpoint_argument(parser)
    parser.add_argument("--drop", action="store_true", help="and drop them from DRAM")
    add_timeout_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    with calling(endpoint_of(args)) as stub:
        answer = stub.Flush(pb.FlushRequest(drop=args.drop), timeout=args.timeout)
    print(f"{answer.written} blocks written")
    return 0
