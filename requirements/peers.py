"""Set up the peers of `kvstore bench local --peers`, each in an environment of its own.

    python requirements/peers.py FOLDER

Run it with the interpreter that the environments are made from. Nothing is installed
outside of FOLDER and no root is needed: libraries that a peer links to and this
machine lacks are taken from Debian packages, which are unpacked there.

Each peer gets FOLDER/NAME/peer.json: either what its processes need in their
environment, or the reason why it could not be set up, which the benchmark repeats. A
peer that cannot be set up does not keep the others from it, and is tried again next time.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
SAID_LINES = 4


class Peer(NamedTuple):
    """`libraries`: sonames that it links to, with Debian's package of each."""

    name: str
    proof: str
    """Python that runs only where the peer does."""
    with_torch: bool = False
    libraries: tuple[tuple[str, str], ...] = ()


PEERS = (
    Peer(
        "mooncake",
        "import mooncake.store",
        libraries=(
            ("libnl-3.so.200", "libnl-3-200"),
            ("libnl-route-3.so.200", "libnl-route-3-200"),
            ("libibverbs.so.1", "libibverbs1"),
            ("libnuma.so.1", "libnuma1"),
        ),
    ),
    Peer(
        "lmcache",
        "import lmcache.v1.multiprocess.http_server, lmcache.v1.multiprocess.transfer_context",
        with_torch=True,
    ),
)


class Unready(Exception):
    """Why a peer cannot be set up."""


def main(folder: Path) -> int:
    told = [set_up(peer, folder / peer.name) for peer in PEERS]
    if all(told):
        (folder / ".ready").touch()
    return 0


def set_up(peer: Peer, home: Path) -> bool:
    print(f"{peer.name}: setting up in {home}", flush=True)
    state: dict[str, object] = {}
    try:
        state["environment"] = install(peer, home)
    except Unready as reason:
        state["reason"] = str(reason)
        print(f"{peer.name}: NOT AVAILABLE: {reason}", flush=True)
    else:
        print(f"{peer.name}: ready", flush=True)
    home.mkdir(parents=True, exist_ok=True)
    (home / "peer.json").write_text(json.dumps(state, indent=2) + "\n")
    return "reason" not in state


def install(peer: Peer, home: Path) -> dict[str, str]:
    """What the peer's processes need in their environment. Raises `Unready`."""
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True, symlinks=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    pip.append("--no-compile")
    wanted = HERE / f"peers-{peer.name}.txt"
    if peer.with_torch:
        run([*pip, "-c", str(wanted), "-r", str(HERE / "torch.txt")])
    run([*pip, "--no-deps", "-r", str(wanted)])
    paths = [*native(peer, home / "native"), *home.glob("lib/python*/site-packages/nvidia/*/lib")]
    environment = {"LD_LIBRARY_PATH": os.pathsep.join(map(str, paths))} if paths else {}
    run([str(python), "-c", peer.proof], environment)
    return environment


def native(peer: Peer, folder: Path) -> list[Path]:
    """Folders with the libraries that the machine lacks. Raises `Unready`."""
    packages = [package for soname, package in peer.libraries if not loads(soname)]
    if not packages:
        return []
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Unready(f"this machine lacks what Debian calls {', '.join(packages)}")
    with tempfile.TemporaryDirectory() as downloads:
        download(packages, Path(downloads))
        for package in Path(downloads).glob("*.deb"):
            run(["dpkg-deb", "-x", str(package), str(folder)])
    return sorted({library.parent.resolve() for library in folder.rglob("lib*.so.*")})


def loads(soname: str) -> bool:
    try:
        ctypes.CDLL(soname)
    except OSError:
        return False
    return True


def download(packages: Sequence[str], folder: Path) -> None:
    """By apt's lists as they are, or else by lists of our own."""
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *packages]
    try:
        run(command, folder=folder)
    except Unready:
        own = [f"Dir::State={folder}/state", f"Dir::Cache={folder}/cache"]
        own.append("Dir::State::status=/var/lib/dpkg/status")
        options = [word for option in own for word in ("-o", option)]
        for part in ("state/lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        run([*command[:4], *options, "update"], folder=folder)
        run([*command[:4], *options, *command[4:]], folder=folder)


def run(
    command: Sequence[str], environment: dict[str, str] | None = None, folder: Path | None = None
) -> None:
    """Raises `Unready` with the end of what the command said."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = [line for line in done.stdout.splitlines() if line.strip()][-SAID_LINES:]
        raise Unready(f"`{' '.join(command[:2])} ...` failed: {' | '.join(said)}")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
