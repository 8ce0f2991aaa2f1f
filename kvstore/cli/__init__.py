"""The `kvstore` command.

One module a subcommand, with `add_parser(subparsers)` and `run(args) -> int`.
`COMMANDS` names them; a module is imported only to parse or run its command, so
`kvstore status` loads neither the engine nor a benchmark.
"""

from __future__ import annotations

from kvstore.cli.main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
