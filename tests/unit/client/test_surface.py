"""The public surface: what is in it, what importing it costs, and that both clients match."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import kvstore
from kvstore.client import aio, sync


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert set(kvstore.__all__) <= set(dir(kvstore))
    with pytest.raises(AttributeError, match="Clint"):
        _ = kvstore.Clint  # type: ignore[attr-defined]


def test_importing_the_package_loads_no_heavy_library() -> None:
    program = (
        "import sys, kvstore, kvstore.types, kvstore.errors;"
        "kvstore.LayoutSpec, kvstore.errors;"
        "print([m for m in ('grpc', 'numpy', 'google.protobuf', 'asyncio', 'xxhash', 'msgspec')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def _shape(kind: type) -> dict[str, list[str]]:
    shapes = {}
    for name, member in vars(kind).items():
        if inspect.isfunction(member) and not name.startswith("_"):
            parameters = inspect.signature(member).parameters.values()
            shapes[name] = [f"{p.name}:{p.kind}:{p.default}" for p in parameters]
        elif isinstance(member, property):
            shapes[name] = ["property"]
    return shapes


def test_the_two_clients_have_the_same_methods_and_arguments() -> None:
    asynchronous = _shape(aio.AsyncClient)
    assert asynchronous.pop("connect") == [
        str("self:POSITIONAL_OR_KEYWORD:" + repr(inspect._empty))
    ]
    assert asynchronous == _shape(sync.Client)
    assert _shape(aio.AsyncLease) == _shape(sync.Lease)
