"""Others' policies, looked at before they are used: a server should not find out when its
first tier is full, and somebody who writes one wants to hear what it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import Any

from kvstore.core.policies.base import EvictionPolicy
from kvstore.errors import ConfigError

OWED = ("insert", "touch", "remove", "candidates", "__len__")
"""What `EvictionPolicy` has no answer of its own to."""
KNOWN = ("by_chain", "use", "hint", "miss", "insert_all", "touch_run", "worth")


class PolicyError(ConfigError):
    """A policy cannot be loaded, or does not do what `EvictionPolicy` says."""


def load(declared: EntryPoint) -> Callable[[], EvictionPolicy]:
    """What makes the policy that a distribution declares. Raises `PolicyError`."""
    policy = f"policy {declared.name!r} ({declared.value})"
    try:
        make: Any = declared.load()
    except (ImportError, AttributeError) as error:
        raise PolicyError(f"{policy} cannot be loaded: {error}") from error
    try:
        made: Any = make()
    except TypeError as error:
        raise PolicyError(f"{policy} cannot be made without arguments: {error}") from error
    lacking = [name for name in OWED if not _has_own(made, name)]
    lacking += [name for name in KNOWN if not hasattr(made, name)]
    if lacking:
        raise PolicyError(
            f"{policy} has no {', '.join(lacking)}; deriving from"
            " kvstore.core.policies.base.EvictionPolicy gives what is not owed"
        )
    if not isinstance(made.candidates(), Iterator):
        raise PolicyError(f"{policy}: candidates() gives no iterator")
    return make  # type: ignore[no-any-return]


def _has_own(made: object, name: str) -> bool:
    found = getattr(type(made), name, None)
    return found is not None and found is not getattr(EvictionPolicy, name, None)
