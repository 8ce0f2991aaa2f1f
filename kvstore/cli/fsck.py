"""`kvstore fsck`: verify what a stopped server left on disk."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from kvstore.cli.main import COMMANDS, Subparsers
from kvstore.cli.serve import add_config_arguments, config_from
from kvstore.errors import DataError, DataInUse, DataVersion
from kvstore.tiers.nvme_fsck import Report, check

DAMAGED = 3
SHOWN = 20


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("fsck", help=COMMANDS["fsck"].summary)
    add_config_arguments(parser)
    parser.add_argument("--repair", action="store_true", help="drop what is damaged")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def run(args: argparse.Namespace) -> int:
    """0: sound, or repaired. 3: damaged. Otherwise as the server's exit codes."""
    path = Path(config_from(args).nvme.path)
    try:
        report = check(path, repair=args.repair)
    except DataError as error:
        print(f"kvstore: {error}", file=sys.stderr)
        if isinstance(error, DataInUse):
            return os.EX_TEMPFAIL
        return os.EX_DATAERR if isinstance(error, DataVersion) else os.EX_CANTCREAT
    if args.json:
        print(json.dumps({**asdict(report), "sound": report.sound}, indent=2))
    else:
        _show(report)
    return 0 if report.sound or report.repaired else DAMAGED


def _show(report: Report) -> None:
    print(
        f"{report.path}: {report.blocks} blocks ({report.block_bytes / 1e6:,.1f} MB) "
        f"in {report.segments} segments"
    )
    if report.strange_blocks:
        print(f"{report.strange_blocks} blocks are of unknown layouts; a start drops them")
    if report.untold_blocks:
        print(f"{report.untold_blocks} blocks are not in the index; a start finds them")
    if report.quarantined_pages:
        print(f"{report.quarantined_pages} pages are out of use for earlier damage")
    if report.half_summaries:
        print(
            f"{report.half_summaries} segments have one whole copy of their summary left, which "
            "is enough: the power failed, or the other is damaged"
        )
    if report.no_secret and report.blocks:
        print("the secret is gone, with which they were named: nobody finds them again")
    if report.no_index:
        print("there is no index; a start makes it from the segments")
    if report.damaged_index:
        print("the index is damaged; a start makes it again from the segments")
    if report.damaged_layouts:
        print("the layouts are damaged; what is stored in them is lost")
    damage = report.damaged_segments + report.damaged_blocks
    for line in damage[:SHOWN]:
        print(f"damaged: {line}")
    if len(damage) > SHOWN:
        print(f"... and {len(damage) - SHOWN} more (all of them with --json)")
    if report.sound:
        print("sound")
    else:
        print("dropped what is damaged" if report.repaired else "drop it with --repair")
