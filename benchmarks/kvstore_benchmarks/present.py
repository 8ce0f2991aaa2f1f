"""How a measurement with pictures and a table ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kvstore_benchmarks.progress import Progress, progress

if TYPE_CHECKING:
    from kvstore_benchmarks.plots import Plots

Figures = dict[str, Any]


def present(
    measure: Callable[[Progress], Figures],
    draw: Callable[[Plots, Figures], None],
    show: Callable[[Figures, Console], None],
    *,
    as_object: bool,
    plots: Path | None,
) -> Figures:
    """Measure, draw into `plots` if that is a folder, and print. Raises `NoPlots` before
    anything is measured."""
    pictures = None
    if plots is not None:
        from kvstore_benchmarks.plots import Plots

        pictures = Plots(plots)
    with progress() as step:
        figures = measure(step)
    if pictures is not None:
        draw(pictures, figures)
    if as_object:
        print(json.dumps(figures, indent=2))
    else:
        show(figures, Console())
    return figures
