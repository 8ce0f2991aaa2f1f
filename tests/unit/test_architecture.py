"""Imports point one way, and what must never be loaded or called is not there.

    types, errors, config, clock <- core <- store <- server
    local <- device <- tiers <- store
    core: links <- places <- foresight, calls <- planner
    connectors see only the client, device, local, types and errors

Read from the source, so that a forbidden import inside a function is found too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {
    "kvstore": ROOT / "kvstore",
    "kvstore_server": ROOT / "server" / "kvstore_server",
    "kvstore_connectors": ROOT / "connectors" / "kvstore_connectors",
    "kvstore_benchmarks": ROOT / "benchmarks" / "kvstore_benchmarks",
}

BASE = (
    "kvstore.types",
    "kvstore.errors",
    "kvstore.naming",
    "kvstore.config",
    "kvstore.config_keys",
    "kvstore.clock",
    "kvstore.drive",
    "kvstore.machine",
    "kvstore.nearest",
    "kvstore.parts",
)

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "kvstore.errors": (),
    "kvstore.types": ("kvstore.errors",),
    "kvstore.naming": ("kvstore.types",),
    "kvstore.clock": (),
    "kvstore.drive": (),
    "kvstore.units": ("kvstore.errors",),
    "kvstore.nearest": (),
    "kvstore.parts": ("kvstore.errors", "kvstore.nearest"),
    "kvstore.machine": ("kvstore.errors",),
    "kvstore.config_keys": ("kvstore.errors", "kvstore.types", "kvstore.units"),
    "kvstore.config": (
        "kvstore.config_keys",
        "kvstore.errors",
        "kvstore.machine",
        "kvstore.nearest",
        "kvstore.parts",
        "kvstore.types",
        "kvstore.units",
    ),
    "kvstore.core": (*BASE, "kvstore.core"),
    "kvstore.device": (*BASE, "kvstore.device", "kvstore.local"),
    "kvstore.local": (*BASE, "kvstore.local"),
    "kvstore.tiers": (*BASE, "kvstore.device", "kvstore.local", "kvstore.tiers"),
    "kvstore.listing": (*BASE, "kvstore.local"),
    "kvstore.store": (
        *BASE,
        "kvstore.core",
        "kvstore.device",
        "kvstore.listing",
        "kvstore.local",
        "kvstore.store",
        "kvstore.tiers",
    ),
    "kvstore.sim": (*BASE, "kvstore.core", "kvstore.sim"),
    "kvstore.plan": (*BASE, "kvstore.core", "kvstore.plan", "kvstore.sim"),
    "kvstore.metrics": (*BASE, "kvstore.store"),
    "kvstore.wire": ("kvstore.errors", "kvstore.types", "kvstore.wire"),
    "kvstore.client": (*BASE, "kvstore.client", "kvstore.local", "kvstore.wire"),
    "kvstore_server.__main__": ("kvstore.cli.serve",),
    "kvstore_server": (
        *BASE,
        "kvstore.core",
        "kvstore.local",
        "kvstore.metrics",
        "kvstore.store",
        "kvstore.tiers",
        "kvstore.wire",
        "kvstore_server",
    ),
    "kvstore_connectors": (
        "kvstore.client",
        "kvstore.device",
        "kvstore.local",
        "kvstore.types",
        "kvstore.errors",
        "kvstore_connectors",
    ),
}
"""The first entry that a module's name begins with binds it. Modules under none
(the command, the benchmarks) sit on top and may import everything."""

CORE_ROOMS_ARE_CLOSED_TO = {
    "kvstore.core.links": ("places", "foresight", "calls"),
    "kvstore.core.places": ("foresight", "calls"),
    "kvstore.core.foresight": ("calls",),
    "kvstore.core.calls": ("foresight",),
}
"""Which other rooms of the core a room does not know."""

GPU_LIBRARIES = {"cupy", "torch", "cuda", "vllm", "transformers"}
GPU_ALLOWED = (
    "kvstore.device.cuda",
    "kvstore.device.cufile",
    "kvstore_connectors.vllm",
    "kvstore_benchmarks.end_to_end",
    "kvstore_benchmarks.gpu",
    "kvstore_benchmarks.serving",
    "kvstore_benchmarks.peers.lmcache",
)

CLIENT_LIBRARIES = {"grpc", "google", "msgspec", "numpy", "typing_extensions", "xxhash"}
"""What the distribution requires without any extra."""
CLIENT_SIDE = ("kvstore.client", "kvstore.local", "kvstore.types", "kvstore.errors", "kvstore.wire")

UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}
UNSAFE_ATTRIBUTES = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load")}

ENVIRONMENT_READERS = (
    "kvstore.config",
    "kvstore_connectors.vllm",
    "kvstore_benchmarks.end_to_end",
    "kvstore_benchmarks.serving",
    "kvstore_benchmarks.pipe",
)


class Import(NamedTuple):
    module: str
    """The module that imports."""
    target: str
    line: int


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(), str(path))
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@cache
def imports() -> tuple[Import, ...]:
    """Every import of every module; `from a import b` where a.b is a module counts as a.b."""
    return tuple(
        Import(module, target, line)
        for module, tree in modules().items()
        for target, line in _targets(tree)
    )


def _targets(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in modules() else node.module), node.lineno


def test_the_rules_meet_real_modules() -> None:
    """A rule about a package that was renamed would forbid nothing."""
    for package in ("kvstore.core", "kvstore.client", "kvstore.tiers", "kvstore_connectors.vllm"):
        assert any(within(name, package) for name in modules()), package
    assert len(imports()) > 300


def test_imports_point_one_way() -> None:
    wrong = []
    for module, target, line in imports():
        rule = next((name for name in MAY_IMPORT if within(module, name)), None)
        ours = within(target, *SOURCES)
        if rule and ours and not within(target, *MAY_IMPORT[rule]):
            wrong.append(f"{module}:{line} imports {target}")
    assert not wrong


@pytest.mark.parametrize("room", CORE_ROOMS_ARE_CLOSED_TO)
def test_rooms_of_the_core_know_those_below_only(room: str) -> None:
    above = [f"kvstore.core.{name}" for name in (*CORE_ROOMS_ARE_CLOSED_TO[room], "planner")]
    assert any(within(module, room) for module in modules())
    wrong = [
        f"{module}:{line} imports {target}"
        for module, target, line in imports()
        if within(module, room) and within(target, *above)
    ]
    assert not wrong


def test_the_core_does_no_io() -> None:
    """The simulator and the server run this same code: it gets time and events as arguments."""
    forbidden = {"asyncio", "threading", "socket", "os", "time", "random", "subprocess", "logging"}
    allowed = (sys.stdlib_module_names | {"kvstore"}) - forbidden
    wrong = [
        f"{module}:{line} imports {target}"
        for module, target, line in imports()
        if within(module, "kvstore.core") and target.partition(".")[0] not in allowed
    ]
    assert not wrong


def test_gpu_libraries_stay_behind_the_device() -> None:
    wrong = [
        f"{module}:{line} imports {target}"
        for module, target, line in imports()
        if target.partition(".")[0] in GPU_LIBRARIES and not within(module, *GPU_ALLOWED)
    ]
    assert not wrong


def test_a_client_needs_no_extra() -> None:
    wrong = [
        f"{module}:{line} imports {target}"
        for module, target, line in imports()
        if within(module, *CLIENT_SIDE)
        and not within(target, "kvstore")
        and target.partition(".")[0] not in sys.stdlib_module_names | CLIENT_LIBRARIES
    ]
    assert not wrong


def test_nothing_runs_code_from_data() -> None:
    wrong = [
        f"{module}:{line} imports {target}"
        for module, target, line in imports()
        if target.partition(".")[0] in UNSAFE_MODULES
    ]
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            if isinstance(function, ast.Name) and function.id in UNSAFE_NAMES:
                wrong.append(f"{module}:{node.lineno} calls {function.id}")
            if (
                isinstance(function, ast.Attribute)
                and isinstance(function.value, ast.Name)
                and (function.value.id, function.attr) in UNSAFE_ATTRIBUTES
            ):
                wrong.append(f"{module}:{node.lineno} calls {function.value.id}.{function.attr}")
    assert not wrong


def test_the_environment_is_read_in_one_place() -> None:
    wrong = [
        f"{module}:{node.lineno}"
        for module, tree in modules().items()
        if not within(module, *ENVIRONMENT_READERS)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and node.attr in {"environ", "getenv", "putenv"}
    ]
    assert not wrong


def test_every_module_says_what_it_is_for() -> None:
    """Generated code aside."""
    silent = [
        module
        for module, tree in modules().items()
        if tree.body and not within(module, "kvstore.wire.v1") and not ast.get_docstring(tree)
    ]
    assert not silent


PUBLIC = {
    "AsyncClient",
    "AsyncLease",
    "ChainPresence",
    "ChainQuery",
    "Client",
    "CommitAnswer",
    "CommitOutcome",
    "Hints",
    "Layout",
    "LayoutSpec",
    "Lease",
    "LeaseGrant",
    "PutOutcome",
    "Refusal",
    "Retention",
    "Reuse",
    "Segment",
    "ServerInfo",
    "SessionState",
    "SlotGrant",
    "StoreStats",
    "ensure_server",
    "errors",
}


def test_the_public_surface_is_deliberate() -> None:
    """A name added here is a promise to keep; one removed breaks somebody."""
    import kvstore

    assert set(kvstore.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(kvstore, name) is not None


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import kvstore.device.cuda", ("cupy", "cuda", "torch")),
        ("import kvstore", ("grpc", "numpy", "kvstore.client", "kvstore.core")),
        ("import kvstore; kvstore.Client", ("kvstore.core", "kvstore.store", "lmdb", "torch")),
        ("import kvstore_server.__main__", ("vllm", "torch", "transformers")),
        ("import kvstore.cli.main", ("vllm", "torch", "kvstore_benchmarks")),
    ],
)
def test_loading_one_part_leaves_the_others_out(statement: str, absent: tuple[str, ...]) -> None:
    code = f"{statement}\nimport sys\nprint([n for n in {absent!r} if n in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert shown.stdout.strip() == "[]"
