"""The committed wire code is what protoc makes of proto/ today."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOC_PYTHON = ROOT / ".venv-wire" / "bin" / "python"
PROTOS = sorted((ROOT / "proto").rglob("*.proto"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with freshly generated code."""
    if not PROTOC_PYTHON.exists():
        pytest.fail("the environment of the generator is missing: run `make wire-tools`")
    folder = tmp_path_factory.mktemp("generated")
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    command = [PROTOC_PYTHON, "-m", "grpc_tools.protoc", "-I", ROOT / "proto", *outputs, *PROTOS]
    subprocess.run(command, check=True, timeout=60)
    return folder


def test_generated_code_is_current(generated: Path) -> None:
    fresh = {path.relative_to(generated): path.read_text() for path in generated.rglob("*.py*")}
    assert fresh
    stale = [
        str(path)
        for path, text in fresh.items()
        if not (ROOT / path).exists() or (ROOT / path).read_text() != text
    ]
    assert not stale, "run `make proto` and commit what it writes"


def test_no_generated_file_has_lost_its_source(generated: Path) -> None:
    committed = {path.relative_to(ROOT) for path in (ROOT / "kvstore/wire/v1").glob("*_pb2*")}
    made = {path.relative_to(generated) for path in generated.rglob("*_pb2*")}
    assert committed == made


def test_generated_code_imports_on_the_oldest_protobuf_allowed() -> None:
    """protobuf refuses code from a newer generator than itself."""
    text = (ROOT / "kvstore/wire/v1/kvstore_pb2.py").read_text()
    assert "# Protobuf Python Version: 6." in text
