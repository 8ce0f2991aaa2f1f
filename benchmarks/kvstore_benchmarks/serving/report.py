"""The figures of `kvstore bench serve`, as one object and as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from kvstore_benchmarks.end_to_end.watch import Hits
from kvstore_benchmarks.figures import finite, median, ratio, seconds_text
from kvstore_benchmarks.serving import sides
from kvstore_benchmarks.serving.hooks import IDLE
from kvstore_benchmarks.serving.load import Met

if TYPE_CHECKING:
    from kvstore_benchmarks.serving.bench import Measured, Turn

FIGURES: dict[str, tuple[str, Callable[[Met], float]]] = {
    "requests_per_s": ("requests/s", lambda met: met.requests_per_s),
    "tokens_per_s": ("answered tokens/s", lambda met: met.tokens_per_s),
    "first_token_s": ("first token, p50", lambda met: met.first_token()),
    "first_token_mean_s": ("first token, mean", lambda met: met.first_token_mean),
    "first_token_p99_s": ("first token, p99", lambda met: met.first_token(99)),
    "between_tokens_s": ("between tokens, p50", lambda met: met.between_tokens()),
    "between_tokens_p99_s": ("between tokens, p99", lambda met: met.between_tokens(99)),
}

NO_HITS = "no hits"
AIM = 1.02
"""At most so much of plain vLLM's where nothing is found: times, and the inverse of rates."""

AIMED = ("requests_per_s", "first_token_s", "between_tokens_s")


def figures_of(measured: Measured) -> dict[str, Any]:
    """Medians over the rounds, and of the ratios within a round."""
    figures: dict[str, Any] = {
        "text": measured.workload.text,
        "rounds": len(measured.without),
        "failed": sum(turn.met.failed for turn in [*measured.without, *measured.with_store]),
        "measures": {},
    }
    for name, (_, take) in FIGURES.items():
        without = [take(turn.met) for turn in measured.without]
        with_store = [take(turn.met) for turn in measured.with_store]
        ratios = [ratio(ours, alone) for ours, alone in zip(with_store, without, strict=True)]
        figures["measures"][name] = {
            "without": finite(median(without)),
            "with": finite(median(with_store)),
            "ratio": finite(median(ratios)),
            "ratios": [finite(one) for one in ratios],
        }
    figures["hits"] = _hits(measured.with_store)
    figures["own_cache_without"] = _hits(measured.without)["own_cache"]
    return figures


def _hits(turns: Sequence[Turn]) -> dict[str, Any]:
    vllm, store = sides.Sources(), Hits(0, 0)
    for turn in turns:
        vllm = vllm.plus(turn.sources)
        store = Hits(store.dram + turn.hits.dram, store.nvme + turn.hits.nvme)
    return sides.as_json(vllm, store)


def cost(figures: dict[str, Any], name: str) -> float | None:
    """What the store costs: above 1 is worse, of rates as of times."""
    taken: float | None = figures["measures"][name]["ratio"]
    if not taken:
        return None
    return finite(1 / taken) if name.endswith("_per_s") else taken


def faults(figures: dict[str, Any]) -> list[str]:
    """What makes the figures worthless; nothing about how fast they are."""
    found = []
    for name, one in figures["workloads"].items():
        if one["failed"]:
            found.append(f"{name}: {one['failed']} requests failed")
        if not one["hits"]["plausible"]:
            vllm, store = one["hits"]["vllm_tokens"], one["hits"]["store_tokens"]
            found.append(f"{name}: vLLM loaded {vllm} tokens, the store handed out {store}")
    return found


def show(figures: dict[str, Any], console: Console) -> None:
    for name, one in figures["workloads"].items():
        console.print(_measures(name, one, figures["clients"]))
    console.print(_sources(figures))
    console.print(_hooks(figures["hooks"]))


def _measures(name: str, one: dict[str, Any], clients: int) -> Table:
    who = "" if name == "trace" else f", {clients} clients"
    table = Table(title=f"{name}: {one['text']}{who}; medians of {one['rounds']}")
    for heading in ("", "without", "with the store", "ratio", "least", "most", "aim, at most"):
        table.add_column(heading, justify="right" if heading else "left")
    for key, (text, _) in FIGURES.items():
        taken = one["measures"][key]
        ratios = [each for each in taken["ratios"] if each is not None]
        aim = f"cost {AIM}x" if name == NO_HITS and key in AIMED else ""
        table.add_row(
            text,
            _value(key, taken["without"]),
            _value(key, taken["with"]),
            f"{taken['ratio'] or 0:.2f}x",
            f"{min(ratios, default=0):.2f}x",
            f"{max(ratios, default=0):.2f}x",
            aim,
        )
    return table


def _value(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if key.endswith("_per_s") else seconds_text(value)


def _sources(figures: dict[str, Any]) -> Table:
    table = Table(title="Where the tokens of the prompts came from, with the store")
    ours = ("the store: DRAM", "NVMe", "of it not needed", "equal")
    headings = ("workload", "vLLM's own cache", "DRAM", "NVMe", *ours)
    for heading in headings:
        table.add_column(heading, justify="right" if heading != "workload" else "left")
    for name, one in figures["workloads"].items():
        hits = one["hits"]
        table.add_row(
            name,
            _share(hits["own_cache"]),
            _share(hits["vllm"]["host"]),
            _share(hits["vllm"]["disk"]),
            _share(hits["store"]["host"]),
            _share(hits["store"]["disk"]),
            _share(hits["unneeded"]),
            "yes" if hits["equal"] else "NO",
        )
    return table


def _hooks(hooks: dict[str, Any]) -> Table:
    table = Table(
        title=f"The connector's hooks on the engine's thread, us a request of"
        f" {hooks['tokens']} tokens; medians of {hooks['rounds']}"
    )
    for heading in ("", "missed", "found"):
        table.add_column(heading, justify="right" if heading else "left")
    miss, hit = hooks["miss"], hooks["hit"]
    for name, us in miss["hooks_us"].items():
        if name != IDLE:
            table.add_row(name, f"{us:.1f}", f"{hit['hooks_us'][name]:.1f}")
    table.add_section()
    totals = f"{miss['total_us']:.1f}", f"{hit['total_us']:.1f}"
    table.add_row(f"together, aim {hooks['most_us']} at most", *totals)
    both = (miss, hit)
    table.add_row(f"[dim]{IDLE}", *(f"[dim]{each['hooks_us'][IDLE]:.1f}" for each in both))
    table.add_row(
        "[dim]on the clock on the wall", *(f"[dim]{each['wall_us']:.1f}" for each in both)
    )
    return table


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
