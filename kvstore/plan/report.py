"""The plan, step by step: figures by name, and the formula of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvstore.plan.demand import Demand
from kvstore.plan.machine import Engine
from kvstore.plan.sizes import (
    GB,
    Point,
    Sizing,
    Step,
    dram_of,
    knee,
    nvme_of,
    pays_up_to,
)
from kvstore.plan.wear import DAY_S, Wear, wear_of

_NOTHING = "Next to nothing is asked for twice: a cache brings nothing."
_STATED = "stated, or of the trace"


@dataclass(frozen=True, slots=True)
class Figure:
    """`key` names it in JSON, `name` for people."""

    key: str
    name: str
    value: float | str
    unit: str
    formula: str


@dataclass(frozen=True, slots=True)
class Section:
    key: str
    title: str
    figures: list[Figure]
    steps: list[Step] = field(default_factory=list)
    """Of a tier, by size."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Wishes:
    """Sizes that are given, not looked for, and the first token's target."""

    dram_gb: float | None
    nvme_gb: float | None
    first_token_ms: float | None
    write_amplification: float
    block_tokens: int


def make(sizing: Sizing, wishes: Wishes) -> list[Section]:
    """All steps, in order. Raises `BadRequest` where the weights do not fit."""
    sizing.engine.check_fits()
    dram_steps = sizing.dram_steps()
    dram_gb = wishes.dram_gb
    if dram_gb is None:
        dram_gb = _knee(sizing.point(0.0), dram_steps, dram_of)
    nvme_steps = sizing.nvme_steps(dram_gb)
    nvme_gb = wishes.nvme_gb
    if nvme_gb is None:
        nvme_gb = _knee(sizing.point(dram_gb, dram_gb), nvme_steps, nvme_of)
        if nvme_gb <= dram_gb:
            nvme_gb = 0.0
    chosen = sizing.point(dram_gb, nvme_gb)
    wear = wear_of(sizing, chosen, wishes.write_amplification) if nvme_gb else None
    return [
        _kv(sizing.engine, wishes.block_tokens),
        _memory(sizing.engine, sizing.demand),
        _speed(sizing.engine, sizing.demand),
        _links(sizing.engine),
        _demand(sizing),
        _dram(sizing, dram_steps),
        _nvme(sizing, dram_gb, nvme_steps),
        _choice(sizing, chosen, wishes),
        _endurance(sizing, wear, wishes),
        _cost(sizing, chosen, wear),
    ]


def as_json(sections: Sequence[Section]) -> dict[str, Any]:
    """One object a section: its figures by key, the curve of a tier, notes."""
    answer: dict[str, Any] = {}
    for section in sections:
        answer[section.key] = {figure.key: _rounded(figure.value) for figure in section.figures}
        if section.steps:
            answer[section.key]["curve"] = [
                {key: _rounded(value) for key, value in asdict(step.point).items()}
                | {
                    "gpus_a_tb": _rounded(step.gpus_a_tb),
                    "worth_hour": _rounded(step.worth_hour),
                    "cost_hour": _rounded(step.cost_hour),
                }
                for step in section.steps
            ]
        if section.notes:
            answer[section.key]["notes"] = section.notes
    return answer


def _kv(engine: Engine, block_tokens: int) -> Section:
    model = engine.model
    a_layer = str(model.kv_dim) if model.kv_dim else f"2 x {model.kv_heads} x {model.head_dim}"
    layers = model.kv_layers or model.layers
    return Section(
        "kv",
        f"1. The KV of {model.name}",
        [
            Figure(
                "bytes_a_token", "a token", engine.kv_bytes, "B",
                f"{layers} layers x {a_layer} x {engine.kv_dtype_bytes:g} B",
            ),
            Figure(
                "block_mb", f"a block of {block_tokens} tokens",
                engine.kv_bytes * block_tokens / 1e6, "MB", "tokens x bytes a token",
            ),
        ],
    )  # fmt: skip


def _memory(engine: Engine, demand: Demand) -> Section:
    context = demand.prompt_tokens + demand.output_tokens
    notes = []
    if engine.kv_tokens < context:
        notes.append(
            "Not even one request of mean length fits beside the weights; what follows takes one."
        )
    return Section(
        "memory",
        f"2. The memory of {engine.gpus} x {engine.gpu.name}",
        [
            Figure(
                "weights_gb", "weights", engine.weights_gb, "GB",
                f"{engine.model.parameters_billions:g} billion x {engine.weight_bytes:g} B",
            ),
            Figure(
                "kv_space_gb", "left for KV", engine.kv_space_gb, "GB",
                f"{engine.gpus} x ({engine.gpu.memory_gb:g} x {engine.memory_share:g}"
                f" - {engine.reserve_gb:g}) - weights",
            ),
            Figure("kv_tokens", "tokens at a time", engine.kv_tokens, "", "space / bytes a token"),
            Figure(
                "requests", "requests at a time", engine.requests_at_a_time(context), "",
                f"tokens / (prompt {demand.prompt_tokens:.0f} + output {demand.output_tokens:.0f})",
            ),
        ],
        notes=notes,
    )  # fmt: skip


def _speed(engine: Engine, demand: Demand) -> Section:
    prefill, context = engine.prefill, demand.prompt_tokens + demand.output_tokens
    batch = max(1.0, engine.requests_at_a_time(context))
    step_ms = engine.decode_step_ms(batch, context)
    return Section(
        "speed",
        "3. The roofline",
        [
            Figure(
                "prefill_ms", "prefill of a mean prompt", demand.prefill_ms, "ms",
                f"(2 N n + 2 L Hq dh n^2) / ({engine.gpus} x {engine.gpu.bf16_tflops:g} TFLOP/s"
                f" x {engine.mfu:g}), mean over prompts of n tokens",
            ),
            Figure(
                "prefill_tokens_s", "prefill", 1e3 * demand.prompt_tokens / demand.prefill_ms,
                "tokens/s", "prompt / time",
            ),
            Figure(
                "doubling_tokens", "a token costs twice at depth", prefill.doubling_tokens, "",
                f"2 N / (4 L Hq dh), N {engine.model.active:.4g}, L {engine.model.layers},"
                f" Hq {engine.model.query_heads}, dh {engine.model.head_dim}",
            ),
            Figure(
                "decode_step_ms", f"a decode step of {batch:.0f} requests", step_ms, "ms",
                f"max((weights + batch x {context:.0f} tokens x KV) / ({engine.gpus} x"
                f" {engine.gpu.memory_gbps:g} GB/s x {engine.bandwidth_share:g}), 2 N batch /"
                " prefill's arithmetic)",
            ),
            Figure(
                "decode_tokens_s", "decode", 1e3 * batch / step_ms, "tokens/s", "batch / step"
            ),
        ],
    )  # fmt: skip


def _links(engine: Engine) -> Section:
    notes, figures = [], []
    host = f"{engine.gpus} x {engine.gpu.host_gbps:g}, the host link of a GPU"
    drives = f"min({engine.ssds} x {engine.ssd.read_gbps:g}, that of DRAM)"
    for key, name, gbps, formula in (
        ("dram", "DRAM", engine.dram_gbps, host),
        ("nvme", f"NVMe, {engine.ssds} x {engine.ssd.name}", engine.nvme_gbps, drives),
    ):
        kappa = engine.kappa(gbps)
        figures += [
            Figure(f"{key}_gbps", name, gbps, "GB/s", formula),
            Figure(
                f"{key}_kappa", "computing / loading", kappa, "x",
                "prefill of the first token / (bytes a token / bandwidth)",
            ),
        ]  # fmt: skip
        if kappa < 1:
            depth = engine.pays_from_token(gbps)
            notes.append(
                f"From {key.upper() if key == 'dram' else 'NVMe'} a load beats computing only"
                f" beyond token {depth:.0f} of a prompt."
            )
    return Section("links", "4. Load or recompute", figures, notes=notes)


def _demand(sizing: Sizing) -> Section:
    demand, engine = sizing.demand, sizing.engine
    context = demand.prompt_tokens + demand.output_tokens
    batch = max(1.0, engine.requests_at_a_time(context))
    decode_ms = demand.output_tokens * engine.decode_step_ms(batch, context) / batch
    return Section(
        "demand",
        "5. The workload",
        [
            Figure("source", "from", demand.source, "", ""),
            Figure(
                "requests_per_s", "requests", demand.requests_per_s, "/s",
                "stated, or requests / time of the trace",
            ),
            Figure("prompt_tokens", "prompt, mean", demand.prompt_tokens, "tokens", _STATED),
            Figure("output_tokens", "output, mean", demand.output_tokens, "tokens", _STATED),
            Figure(
                "most_hits", "hits if all were kept", demand.curve[-1].token_hits, "of tokens",
                demand.hits_formula,
            ),
            Figure(
                "most_gb", "all that is of use", sizing.most_gb, "GB",
                "tokens of the least size with these hits x bytes a token",
            ),
            Figure(
                "gpus_prefill", "GPUs for prefill", sizing.gpus(demand.prefill_ms), "",
                f"requests/s x prefill x {engine.gpus} / {sizing.utilisation:g} busy",
            ),
            Figure(
                "gpus_decode", "GPUs for decode", sizing.gpus(decode_ms), "",
                f"requests/s x output x step / batch x {engine.gpus} / {sizing.utilisation:g} busy",
            ),
        ],
        notes=list(demand.notes),
    )  # fmt: skip


def _dram(sizing: Sizing, steps: list[Step]) -> Section:
    if not steps:
        return Section("dram", "6. DRAM", [], notes=[_NOTHING])
    return Section(
        "dram",
        "6. DRAM, by size",
        [
            Figure(
                "knee_gb", "knee", _knee(sizing.point(0.0), steps, dram_of), "GB",
                "farthest above the line from nothing to all",
            ),
            Figure(
                "pays_up_to_gb", "pays for itself up to", pays_up_to(steps, dram_of), "GB",
                "the last step worth its price",
            ),
        ],
        steps,
    )  # fmt: skip


def _nvme(sizing: Sizing, dram_gb: float, steps: list[Step]) -> Section:
    if not steps:
        why = "DRAM holds all that is of use." if sizing.most_gb else _NOTHING
        return Section("nvme", "7. NVMe", [], notes=[why])
    notes = []
    if not sizing.nvme_helps(dram_gb, sizing.most_gb):
        notes.append("These drives load slower than the GPUs compute: NVMe brings nothing.")
    room_gb = sizing.engine.ssds * sizing.engine.ssd.capacity_gb
    if room_gb < sizing.most_gb:
        notes.append(f"The drives have {room_gb:.0f} GB; larger sizes need more of them.")
    start = sizing.point(dram_gb, dram_gb)
    return Section(
        "nvme",
        f"7. NVMe behind {dram_gb:.0f} GB of DRAM, by size",
        [
            Figure(
                "knee_gb", "knee", _knee(start, steps, nvme_of), "GB",
                "farthest above the line from DRAM's size to all",
            ),
            Figure(
                "pays_up_to_gb", "pays for itself up to", pays_up_to(steps, nvme_of), "GB",
                "the last step worth its price",
            ),
        ],
        steps,
        notes,
    )  # fmt: skip


def _choice(sizing: Sizing, chosen: Point, wishes: Wishes) -> Section:
    none_ms, notes = sizing.demand.prefill_ms, []
    if 0 < chosen.nvme_gb <= chosen.dram_gb:
        notes.append("NVMe holds what DRAM holds, too: no larger than DRAM it brings nothing.")
    target = wishes.first_token_ms
    if target is not None:
        best = sizing.point(sizing.most_gb)
        if chosen.first_token_ms <= target:
            notes.append(f"The target of {target:g} ms to the first token is reached.")
        elif best.first_token_ms <= target:
            notes.append(
                f"The target of {target:g} ms needs more DRAM:"
                f" {_least_dram(sizing, target):.0f} GB alone reach it."
            )
        else:
            notes.append(
                f"No size reaches {target:g} ms: with everything in DRAM it is"
                f" {best.first_token_ms:.0f} ms. Faster prefill is needed."
            )
    return Section(
        "choice",
        "8. These tiers",
        [
            Figure("dram_gb", "DRAM", chosen.dram_gb, "GB", _whence(wishes.dram_gb)),
            Figure("nvme_gb", "NVMe", chosen.nvme_gb, "GB", _whence(wishes.nvme_gb)),
            Figure("token_hits", "hits", chosen.token_hits, "of tokens", "both tiers"),
            Figure(
                "hits_dram", "hits in DRAM", chosen.hits_dram, "of tokens", "those of DRAM alone"
            ),
            Figure("saved", "prefill saved", chosen.saved, "", "time of the hits / time of all"),
            Figure(
                "first_token_ms", "first token, mean", chosen.first_token_ms, "ms",
                f"prefill of the rest + loads; {none_ms:.0f} ms without",
            ),
            Figure(
                "gpus_saved", "GPUs saved", chosen.gpus_saved, "",
                f"requests/s x time saved x {sizing.engine.gpus} / {sizing.utilisation:g} busy",
            ),
        ],
        notes=notes,
    )  # fmt: skip


def _endurance(sizing: Sizing, wear: Wear | None, wishes: Wishes) -> Section:
    if wear is None:
        return Section("endurance", "9. The drives' life", [], notes=["There is no NVMe tier."])
    engine, ssd, notes = sizing.engine, sizing.engine.ssd, []
    if wear.drives > engine.ssds:
        notes.append(
            f"This size takes {wear.drives} drives; loads are those of {engine.ssds} (--ssds)."
        )
    if wear.drive_writes_a_day > ssd.drive_writes_a_day:
        part = 100 * ssd.drive_writes_a_day / wear.drive_writes_a_day
        notes.append(
            f"More than the drives are warranted for: write {part:.2g} % of new blocks at most"
            " (nvme.endurance, a budget of bytes a day; what hits that leaves is seen with"
            " `kvstore simulate --tiers`), or take drives for more writes."
        )
    if wear.bytes_a_day / DAY_S / GB > 0.5 * wear.drives * ssd.write_gbps:
        notes.append("Writing alone keeps the drives more than half busy.")
    return Section(
        "endurance",
        f"9. The life of {wear.drives} drive{'s' if wear.drives > 1 else ''}",
        [
            Figure(
                "written_tb_a_day", "written", wear.bytes_a_day / 1e12, "TB/day",
                "requests/s x prompt x (1 - hits) x bytes a token"
                f" x {wishes.write_amplification:g} written for one",
            ),
            Figure(
                "drive_writes_a_day", "drive writes", wear.drive_writes_a_day, "/day",
                f"written / ({wear.drives} x {ssd.capacity_gb:g} GB);"
                f" warranted: {ssd.drive_writes_a_day:g}",
            ),
            Figure(
                "years", "life", wear.years, "years",
                f"{ssd.drive_writes_a_day:g} / drive writes x {ssd.warranty_years:g} years",
            ),
        ],
        notes=notes,
    )  # fmt: skip


def _cost(sizing: Sizing, chosen: Point, wear: Wear | None) -> Section:
    prices, notes = sizing.prices, []
    dram = prices.an_hour(chosen.dram_gb, prices.dram_gb)
    nvme = wear.hour if wear else 0.0
    gpus = chosen.gpus_saved * prices.gpu_hour
    by_nvme = gpus - sizing.point(chosen.dram_gb).gpus_saved * prices.gpu_hour
    if by_nvme < nvme:
        notes.append(
            f"NVMe saves {by_nvme:.2g} an hour of this and costs {nvme:.2g}: it pays where less is"
            " written, or not at all (--nvme 0)."
        )
    return Section(
        "cost",
        "10. What it costs and saves",
        [
            Figure(
                "dram_hour", "DRAM", dram, "an hour",
                f"{prices.dram_gb:g} a GB over {prices.years:g} years",
            ),
            Figure(
                "nvme_hour", "NVMe", nvme, "an hour",
                f"{prices.nvme_gb:g} a GB over {prices.years:g} years, or the drives over their"
                " life, if that is more",
            ),
            Figure(
                "gpus_hour", "GPUs saved", gpus, "an hour", f"{prices.gpu_hour:g} a GPU and hour"
            ),
            Figure("net_hour", "net", gpus - dram - nvme, "an hour", "saved - cost"),
        ],
        notes=notes,
    )  # fmt: skip


def _whence(given: float | None) -> str:
    return "knee" if given is None else "given"


def _knee(start: Point, steps: Sequence[Step], size: Any) -> float:
    points = [start, *(step.point for step in steps)]
    return knee([size(point) for point in points], [point.gpus_saved for point in points])


def _least_dram(sizing: Sizing, target_ms: float) -> float:
    """By halves: the first token only comes sooner with more DRAM."""
    low, high = 0.0, sizing.most_gb
    for _ in range(40):
        middle = (low + high) / 2
        if sizing.point(middle).first_token_ms <= target_ms:
            high = middle
        else:
            low = middle
    return high


def _rounded(value: float | str) -> float | str | None:
    if isinstance(value, str):
        return value
    return None if value == float("inf") else float(f"{value:.6g}")
