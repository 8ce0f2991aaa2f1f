"""`vllm-router` in front of a prefill and a decode vLLM.

It asks the prefill vLLM for one token, with `{"do_remote_decode": true, ...}` in
`kv_transfer_params`, and then the decode vLLM for the answer, with whatever the first one
answered there. That is its `--kv-connector nixl`, the default; `mooncake` does the same in
the same order, but asks the prefill vLLM for Mooncake's bootstrap server first.
"""

from __future__ import annotations

from pathlib import Path

from kvstore.errors import ConfigError
from kvstore_benchmarks.serving.instance import HOST, Child, Instance, free_port

ENVIRONMENT = Path(".venv-router")


def program_in(environment: Path) -> Path:
    """Raises `ConfigError` where it is not installed."""
    program = environment / "bin" / "vllm-router"
    if not program.exists():
        raise ConfigError(
            f"vllm-router is not installed in {environment}; `make demo-pd` installs it,"
            " --router DIR names another environment"
        )
    return program


class Router(Child):
    """A context manager; `environment` is where `make demo-pd` installed it."""

    def __init__(self, environment: Path, prefill: Instance, decode: Instance) -> None:
        """Raises `ConfigError` where it is not installed."""
        program = program_in(environment)
        port = free_port()
        command = [str(program), "--vllm-pd-disaggregation", "--host", HOST, "--port", str(port)]
        command += ["--prefill", prefill.url, "--decode", decode.url]
        command += ["--prometheus-port", str(free_port()), "--log-level", "warning"]
        super().__init__("router", command, {}, port)
