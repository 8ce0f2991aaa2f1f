"""What a user may put into `kv_connector_extra_config`.

    endpoint            Unix socket of a running server. Left out: the connector
                        finds this user's server, or starts one.
    server_args         Arguments for the server the connector starts, a list of
                        strings. Of no effect on one that is running already.
    acquire_timeout_ms  How long a request may wait for its blocks to come up from
                        slower tiers before it is computed instead.
    recompute           "when_sooner": blocks of slower tiers that the engine computes
                        sooner than they would come up are computed; "never": they are
                        loaded, which leaves the engine to others.
    handover_timeout_ms How long a request that another vLLM computes the prompt of
                        waits when no more of its blocks come.
    load_failure        What becomes of a request whose load fails: "recompute", or
                        "fail", which ends it with an error.
    codec               "fp8" or "int4": blocks are kept with fewer bits, of an engine on a
                        GPU everywhere, of others in slower tiers, and come back less
                        exactly; "none".
    untested_gpu        Whether to serve a KV cache on a GPU, which has not been tried
                        on one yet.

Whether blocks are stored, loaded or both follows `kv_role`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvstore.errors import ConfigError
from kvstore.types import CODECS

_MAX_TIMEOUT_MS = 60_000
_RECOMPUTE = ("when_sooner", "never")
_LOAD_FAILURES = ("recompute", "fail")
_NO_CODEC = "none"


@dataclass(frozen=True, slots=True)
class ConnectorConfig:
    """Parsed and checked. `endpoint` is a file path, or None for the default server."""

    endpoint: str | None = None
    server_args: tuple[str, ...] = ()
    acquire_timeout_ms: int = 1000
    recompute: str = "when_sooner"
    handover_timeout_ms: int = 2000
    load_failure: str = "recompute"
    codec: str = ""
    untested_gpu: bool = False

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> ConnectorConfig:
        """Raises `ConfigError`, which names the key and the nearest right one."""
        known = [field.name for field in fields(cls)]
        for key in extra:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise ConfigError(f"kv_connector_extra_config: unknown key {key!r}; {hint}")
        config = cls(
            endpoint=_socket_path(extra.get("endpoint")),
            server_args=_arguments(extra.get("server_args", ())),
            acquire_timeout_ms=_milliseconds(extra, "acquire_timeout_ms", 1000),
            recompute=_choice(extra, "recompute", _RECOMPUTE),
            handover_timeout_ms=_milliseconds(extra, "handover_timeout_ms", 2000),
            load_failure=_choice(extra, "load_failure", _LOAD_FAILURES),
            codec=_choice(extra, "codec", (_NO_CODEC, *CODECS)).replace(_NO_CODEC, ""),
            untested_gpu=_flag(extra, "untested_gpu"),
        )
        if config.endpoint is not None and config.server_args:
            raise ConfigError(
                "kv_connector_extra_config: 'server_args' are for a server that the connector"
                " starts; with 'endpoint' it starts none"
            )
        return config


def _socket_path(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ConfigError("kv_connector_extra_config: 'endpoint' must be a string")
    path = value.removeprefix("unix://")
    if not path.startswith("/"):
        raise ConfigError(
            "kv_connector_extra_config: 'endpoint' must be the absolute path of a server's Unix"
            f" socket (with or without unix://), not {value!r}: the connector needs a server on"
            " its own host, whose memory it can share"
        )
    return path


def _arguments(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ConfigError("kv_connector_extra_config: 'server_args' must be a list of strings")
    return tuple(value)


def _choice(extra: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    value = extra.get(key, choices[0])
    if value not in choices:
        raise ConfigError(
            f"kv_connector_extra_config: {key!r} must be {' or '.join(map(repr, choices))},"
            f" not {value!r}"
        )
    return str(value)


def _flag(extra: Mapping[str, Any], key: str) -> bool:
    value = extra.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(
            f"kv_connector_extra_config: {key!r} must be true or false, not {value!r}"
        )
    return value


def _milliseconds(extra: Mapping[str, Any], key: str, default: int) -> int:
    value = extra.get(key, default)
    # bool is an int to isinstance.
    if type(value) is not int or not 1 <= value <= _MAX_TIMEOUT_MS:
        raise ConfigError(
            f"kv_connector_extra_config: {key!r} must be a whole number from 1 to"
            f" {_MAX_TIMEOUT_MS}, not {value!r}"
        )
    return value
