"""What is left in a store that nobody uses any more."""

from __future__ import annotations

from kvstore.core.lifecycle import State
from kvstore.store import Store
from kvstore.store.vram import Gpu
from tests.simulation.crashing_gpu import CrashingGpu


def held_by_nobody(store: Store) -> list[str]:
    """Claims of clients, all of whom have gone."""
    planner = store._planner
    counts = {
        "sessions": planner.open_sessions,
        "leases": planner.open_leases,
        "reservations": planner.open_reservations,
        "sessions that read on GPUs": len(store._gpus._read),
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


def used_by_nobody(store: Store) -> list[str]:
    """What was kept for them."""
    residency = store._planner.residency
    pools = [residency.dram, *([] if residency.nvme is None else [residency.nvme])]
    pins = sum(replica.pins for pool in pools for replica in pool.replicas())
    left = [f"{pins} pins"] if pins else []
    return left + [each for gpu in store._gpus._gpus for each in _on_gpu(gpu)]


def _on_gpu(gpu: Gpu) -> list[str]:
    mirrors, vram = gpu.mirrors, gpu._arena.vram
    assert isinstance(vram, CrashingGpu)
    counts = {
        "used bytes": mirrors.space.used_bytes,
        "classes": len(list(mirrors.space.classes())),
        "mirrors": len(mirrors.of),
        "mirrors on their way": len(mirrors.replicas()),
        "bytes of shares": sum(share.held_bytes for share in mirrors.shares),
        "open extents": len(gpu._arena._open),
        "copies": len(gpu._arena._copying),
        "rows": len(gpu._table._row_of),
        "bytes of its memory": vram.made_bytes,
        **_of_slots(gpu, vram),
    }
    return [f"{count} {what} on a GPU" for what, count in counts.items() if count]


def _of_slots(gpu: Gpu, vram: CrashingGpu) -> dict[str, int]:
    """What drives are read into, but for what somebody may be writing for ever."""
    if gpu._straight is None:
        return {"bytes of slots": vram.slots_bytes}
    slots = gpu._straight._slots
    # A GPU that is stuck is asked nothing any more.
    stay = len(slots._kept) + (len(slots._idle) if slots._stuck else 0)
    return {
        "bytes of slots": vram.slots_bytes - stay * slots.slot_bytes,
        "bytes of slots that are counted wrongly": abs(vram.slots_bytes - slots.held_bytes),
        "straight reads": slots._users,
    }


def left_in_tiers(store: Store) -> list[str]:
    """Once all blocks are cleared too."""
    residency = store._planner.residency
    left: list[object] = [*residency.dram.replicas()]
    if residency.nvme is not None and residency.nvme_on:
        left += [r for r in residency.nvme.replicas() if r.state is not State.DAMAGED]
    return [repr(each) for each in left]
