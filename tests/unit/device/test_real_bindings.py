"""cuda-bindings takes what the code for GPUs gives it, and gives what that takes it for."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kvstore.tiers.nvme_disk import direct_io_works

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of libcuda's and of libcufile's stand-in."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    folder = tmp_path_factory.mktemp("libraries")
    made = []
    for source, name in (("libcuda.c", "libcuda.so.1"), ("libcufile.c", "libcufile.so.0")):
        flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{name}"]
        target = str(folder / name)
        subprocess.run([compiler, *flags, "-o", target, str(HERE / source)], check=True, timeout=60)
        made.append(target)
    return made


def test_the_real_cuda_bindings_do_what_they_are_asked(libraries: list[str]) -> None:
    asked = ["memory_is_shared_by_descriptors", "batches_are_copied"]
    if direct_io_works(Path(tempfile.gettempdir())):
        asked.append("drives_are_read_straight")
    # A process of its own: nobody else is to find a GPU's libraries.
    command = [sys.executable, "-m", "tests.unit.device.real_bindings", *libraries, *asked]
    ran = subprocess.run(
        command, cwd=HERE.parents[2], capture_output=True, text=True, timeout=240, check=False
    )
    assert not ran.returncode, ran.stderr
    assert ran.stdout.split() == asked
