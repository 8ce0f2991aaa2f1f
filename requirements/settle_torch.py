"""Remove torchvision, torchaudio and torchcodec where they would break torch.

They are compiled for CUDA. Beside a CPU-only torch they break the import of
`transformers` (`operator torchvision::nms does not exist`); beside a CUDA torch
they match and stay. Text models need none of them. The locked requirements do not
name them, so there is something to remove only in an environment that was made in
another way.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

CUDA_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def installed(names: tuple[str, ...]) -> list[str]:
    present = {(dist.metadata["Name"] or "").lower() for dist in metadata.distributions()}
    return [name for name in names if name in present]


def main() -> int:
    companions = installed(CUDA_COMPANIONS)
    if not companions:
        return 0
    import torch

    if torch.version.cuda is not None:
        return 0
    print(f"torch is a CPU-only build: removing {', '.join(companions)}")
    return subprocess.call([sys.executable, "-m", "pip", "uninstall", "--yes", *companions])


if __name__ == "__main__":
    sys.exit(main())
