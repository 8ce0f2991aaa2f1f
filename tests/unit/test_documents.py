"""What the documents name is there: pages, files, commands and their flags, metrics, keys."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kvstore.cli.main import COMMANDS, Parser
from kvstore.config_keys import KEYS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"))
    if path.name != "CHANGELOG.md"
)
TOP = ("kvstore", "server", "connectors", "benchmarks", "tests", "docs", "examples", "proto")
CODE = re.compile(r"```.*?```|`[^`\n]+`|^(?: {4}[^\n]*\n)+", re.DOTALL | re.MULTILINE)
METRIC = re.compile(r"\b(?:vllm:)?kvstore_[a-z_]*[a-z]\b(?!\*|\.|/|_)")


def each_document() -> pytest.MarkDecorator:
    names = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
    return pytest.mark.parametrize("document", DOCUMENTS, ids=names)


def code_of(document: Path) -> Iterator[str]:
    """What is set as code, its lines that go on in one."""
    for match in CODE.finditer(document.read_text()):
        yield re.sub(r"\\\n\s*", " ", match.group())


@cache
def anchors_of(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@cache
def sources() -> str:
    """All of what is installed, as one text."""
    folders = ("kvstore", "server", "connectors", "benchmarks")
    files = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return "\n".join(path.read_text() for path in files)


@cache
def tracked() -> frozenset[str]:
    """Names of files, wherever they are."""
    return frozenset(path.name for folder in TOP for path in (ROOT / folder).rglob("*.*"))


@cache
def flags_of(command: str) -> frozenset[str]:
    """Of a command and of what is below it, as "bench local"."""
    name, _, below = command.partition(" ")
    parser = Parser(prog="kvstore")
    subparsers = parser.add_subparsers(parser_class=Parser)
    own: argparse.ArgumentParser = importlib.import_module(COMMANDS[name].module).add_parser(
        subparsers
    )
    flags = {flag for action in own._actions for flag in action.option_strings}
    for action in own._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each, parser_below in action.choices.items():
                if below in ("", each):
                    flags |= {f for a in parser_below._actions for f in a.option_strings}
    return frozenset(flags)


@each_document()
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        page = (document.parent / name).resolve() if name else document
        assert page.exists(), target
        if anchor and page.suffix == ".md":
            assert anchor in anchors_of(page), target


@each_document()
def test_every_file_that_is_named_is_there(document: Path) -> None:
    for code in code_of(document):
        for name in re.findall(rf"(?<![\w/.<-])(?:{'|'.join(TOP)})/[\w/.-]*\w", code):
            assert (ROOT / name).exists() or (document.parent / name).exists(), name
        for name in re.findall(r"\btest_\w+\.py\b", code):
            assert name in tracked(), name


@each_document()
def test_every_command_has_the_flags_it_is_shown_with(document: Path) -> None:
    for code in code_of(document):
        for command, rest in re.findall(r"\bkvstore ([a-z-]+)\b([^\n`|;#&]*)", code):
            if command not in COMMANDS:
                continue
            below = re.match(r" ([a-z]+)\b", rest)
            name = f"{command} {below.group(1)}" if command == "bench" and below else command
            missing = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) - flags_of(name)
            assert not missing, f"kvstore {name}: {missing}"


@each_document()
def test_every_target_of_make_is_one(document: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for code in code_of(document):
        for target in re.findall(r"\bmake ([a-z][a-z-]+)", code):
            assert target in targets, target


@each_document()
def test_every_module_that_is_run_is_there(document: Path) -> None:
    for code in code_of(document):
        for module in re.findall(r"python3? -m ((?:kvstore|tests)[\w.]*)", code):
            assert importlib.util.find_spec(module) is not None, module


@each_document()
def test_every_metric_is_one(document: Path) -> None:
    for code in code_of(document):
        for metric in METRIC.findall(code):
            name = metric.removeprefix("vllm:").removesuffix("_total")
            if metric.startswith("vllm:"):
                name = name.removeprefix("kvstore_")
            short = name.removeprefix("kvstore_vram_")
            assert name in sources() or f'"{short}"' in sources(), metric


@each_document()
def test_every_key_and_variable_of_the_configuration_is_one(document: Path) -> None:
    sections = {name.partition(".")[0] for name in KEYS}
    variables = {key.env for key in KEYS.values()} | {"KVSTORE_CONFIG", "KVSTORE_SECTION_KEY"}
    considered = document.parent.name == "decisions"
    for code in code_of(document):
        if not considered and not code.startswith("```"):
            for key in re.findall(rf"(?<![\w.])(?:{'|'.join(sections)})\.[a-z_]+\b(?!\.|\()", code):
                assert key in KEYS or key.endswith((".py", ".md", ".sock")), key
        for variable in re.findall(r"\bKVSTORE_[A-Z_]+\b", code):
            assert variable in variables or variable in sources(), variable
