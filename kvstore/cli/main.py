"""Finds the subcommand, runs it, and turns its errors into one line and a code."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

from kvstore import __version__
from kvstore.cli.output import NOBODY_READS, finish, give_up, nobody_reads
from kvstore.errors import ConfigError, KVStoreError, Unavailable


class Command(NamedTuple):
    """A subcommand: the module that has it, and its line in `kvstore --help`."""

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "serve": Command("kvstore.cli.serve", "run the server"),
    "check-config": Command("kvstore.cli.check_config", "print the effective configuration"),
    "status": Command("kvstore.cli.status", "show what a running server holds and does"),
    "flush": Command("kvstore.cli.flush", "write what is only in DRAM to NVMe"),
    "clear": Command("kvstore.cli.clear", "forget every block of the caller's tenant"),
    "fsck": Command("kvstore.cli.fsck", "verify the data directory of a stopped server"),
    "bench": Command("kvstore.cli.bench", "measure this machine and the store on it"),
    "simulate": Command("kvstore.cli.simulate", "replay a trace under each eviction policy"),
    "plan": Command("kvstore.cli.plan", "size the tiers for a workload"),
    "demo": Command("kvstore.cli.demo", "run a small model with and without the store"),
}


_TELLING = {
    errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    errno.ENOSPC, errno.EROFS,
}  # fmt: skip
"""Errors of a disk or of a limit, which mean the same wherever they come up."""


class Subparsers(Protocol):
    """What `argparse.ArgumentParser.add_subparsers` returns, as far as it is used."""

    def add_parser(self, name: str, **kwargs: Any) -> argparse.ArgumentParser: ...


class CommandModule(Protocol):
    def add_parser(self, subparsers: Subparsers) -> argparse.ArgumentParser: ...
    def run(self, args: argparse.Namespace) -> int: ...


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, that names the nearest flag of a wrong one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            command = self._chosen(parsed)
            flags = [each for action in command._actions for each in action.option_strings]
            near = difflib.get_close_matches(flag, flags, n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (`{command.prog} --help` has all)"
            self.exit(2, f"{command.prog}: unknown argument {flag}{hint}\n")
        return parsed

    def _chosen(self, parsed: argparse.Namespace) -> argparse.ArgumentParser:
        """Of the command that was given, not of all."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                below = action.choices.get(getattr(parsed, action.dest))
                return below._chosen(parsed) if isinstance(below, Parser) else self
        return self


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        try:
            code = _run(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as exits:
            if exits.code:
                give_up()
            else:
                finish()  # `--help`
            raise
        finish()
        return code
    except KVStoreError as error:
        print(f"kvstore: {error}", file=sys.stderr)
        give_up()
        return _exit_code(error)
    except KeyboardInterrupt:
        give_up()
        return 128 + signal.SIGINT
    except OSError as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            give_up()
            return NOBODY_READS
        if not _is_telling(error):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"kvstore: {where}{error.strerror or error}", file=sys.stderr)
        give_up()
        return 1


def _run(argv: list[str]) -> int:
    name = next((word for word in argv if not word.startswith("-")), None)
    if name not in COMMANDS:
        _usage(argv, name)
    module: CommandModule = importlib.import_module(COMMANDS[name].module)
    parser = Parser(prog="kvstore")
    subparsers = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    module.add_parser(subparsers)
    return module.run(parser.parse_args(argv))


def _is_telling(error: OSError) -> bool:
    """Whether its words are enough. Of a connection that broke, a time that ran out or a
    descriptor that was none, only the traceback says whose it was."""
    if error.filename is not None or isinstance(error, socket.gaierror):
        return True
    return error.errno in _TELLING


def _exit_code(error: KVStoreError) -> int:
    if isinstance(error, ConfigError):
        return os.EX_CONFIG
    return os.EX_UNAVAILABLE if isinstance(error, Unavailable) else 1


def _usage(argv: Sequence[str], name: str | None) -> NoReturn:
    """Answer a command line without a known command, and exit."""
    parser = Parser(prog="kvstore", description="A tiered store for the KV cache of LLMs.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (_, summary) in COMMANDS.items():
        subparsers.add_parser(command, help=summary)
    if name is not None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unknown command {name}{hint}")
    parser.parse_args(list(argv) or ["--help"])
    parser.error("a command is needed")
