"""LoRA: nobody gets blocks that were computed with other weights than its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager

from kvstore_connectors.vllm import adapter_files, adapters
from kvstore_connectors.vllm.adapter_files import LoadedAdapters
from kvstore_connectors.vllm.adapters import UNCERTAIN, Adapter, AdapterBook
from kvstore_connectors.vllm.metadata import WorkerReport
from kvstore_connectors.vllm.scheduler import STEPS_WAITED_FOR
from tests.unit.connectors.fakes import BLOCK_TOKENS, FakeRequest, outcome
from tests.unit.connectors.test_scheduler import World

A, B = b"a" * 32, b"b" * 32
HASHES = [bytes([number]) * 32 for number in range(4)]


def lora(number: int = 1, path: str = "/p", name: str = "n") -> LoRARequest:
    return LoRARequest(name, number, path)


# -- what the scheduler makes of it ----------------------------------------------


def test_keys_of_one_prompt_are_others_for_every_weights() -> None:
    every = [HASHES, *(Adapter(1, "/p", identity).keys(HASHES) for identity in (A, B))]
    assert len({key for keys in every for key in keys}) == 3 * len(HASHES)
    assert Adapter(2, "/q", A).keys(HASHES) == every[1]
    assert {len(key) for key in every[1]} == {32}


def test_an_adapter_is_known_when_all_workers_told_the_same() -> None:
    book = AdapterBook(workers=2)
    assert book.find(lora()) is None
    book.heard({1: {0: A}})
    assert book.find(lora()) is None
    book.heard({1: {1: A}, 2: {0: A, 1: B}})
    assert book.find(lora()) == Adapter(1, "/p", A)
    assert book.find(lora(2, "/q")) is None


def test_what_ranks_tell_in_one_step_comes_together() -> None:
    one = WorkerReport(adapters={1: {0: A}, 2: {0: A}})
    other = WorkerReport(adapters={1: {1: B}, 3: {1: A}})
    assert one.aggregate(other).adapters == {1: {0: A, 1: B}, 2: {0: A}, 3: {1: A}}
    assert one.adapters == {1: {0: A}, 2: {0: A}}


@pytest.mark.parametrize("second", [B, UNCERTAIN])
def test_a_name_that_had_other_weights_is_never_trusted_again(second: bytes) -> None:
    """vLLM's own cache may have blocks of both."""
    book = AdapterBook(workers=1)
    book.heard({1: {0: A}, 2: {0: A}})
    assert book.find(lora()) and book.find(lora(2, "/q"))
    for identity in (second, A):
        book.heard({1: {0: identity}})
        assert book.find(lora()) is None
    book.heard({3: {0: A}})
    assert book.find(lora(3)) is None, "nor under another number"
    assert book.find(lora(2, "/q")), "others are not concerned"
    assert book.find(lora(3, "/r")), "nor is the name with another path"


def test_what_is_remembered_of_adapters_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MAX_ADAPTERS", 2)
    book = AdapterBook(workers=1)
    for number in (1, 2, 3):
        book.heard({number: {0: A}})
        assert (book.find(lora(number, f"/{number}")) is None) == (number == 3)
    assert book.find(lora(1, "/1")) is None, "its worker's word was forgotten"
    book.heard({1: {0: B}})
    assert book.find(lora(1, "/1")) is None, "what it had first was not"


def told(world: World, number: int = 1, identity: bytes = A) -> None:
    report = WorkerReport(adapters={number: {0: identity}})
    world.side.update_connector_output(outcome(kv_connector_worker_meta=report))


def arrive(world: World, seed: int = 0) -> FakeRequest:
    tokens = [seed * 1000 + index for index in range(4 * BLOCK_TOKENS + 1)]
    request = FakeRequest(tokens, lora_request=lora())
    world.side.on_new_request(request)
    return request


def test_a_known_adapter_is_loaded_and_stored_under_keys_of_its_own() -> None:
    world = World()
    told(world)
    request = arrive(world)
    assert world.match(request) == (None, False)
    (ticket,) = world.queue.tickets
    keys = Adapter(1, "/p", A).keys(request.block_hashes)
    assert ticket.wanted.keys[BLOCK_TOKENS] == keys[:4]
    world.queue.answer(ticket, 2)
    assert world.match(request) == (2 * BLOCK_TOKENS, True)
    world.alloc(request, 2 * BLOCK_TOKENS, [1, 2, 3, 4, 5])
    meta = world.meta()
    assert meta.adapters == {request.request_id: Adapter(1, "/p", A)}
    world.side.update_connector_output(outcome(finished_recving={request.request_id}))
    request.num_computed_tokens = 2 * BLOCK_TOKENS
    meta = world.compute(request, 2 * BLOCK_TOKENS + 1, [1, 2, 3, 4, 5])
    (job,) = meta.stores
    assert (job.keys, job.parents) == (keys[2:4], keys[1:3])
    assert meta.adapters == {request.request_id: Adapter(1, "/p", A)}
    world.report(job.job_id)
    world.finish(request)
    assert world.quiet()


def test_what_was_loaded_already_is_waited_for_and_nothing_else_is() -> None:
    world = World()
    first, second = arrive(world, seed=1), arrive(world, seed=2)
    for _ in range(STEPS_WAITED_FOR):
        assert world.match(first) == (None, False)
        world.meta()
    assert world.match(first) == (0, False)
    assert not world.queue.tickets
    told(world)
    assert world.match(second) == (None, False)
    assert world.queue.tickets, "told in time"


def test_a_prompt_computed_before_its_adapter_was_known_is_stored_later() -> None:
    world = World(loads=False)
    request = arrive(world)
    assert world.match(request) == (0, False)
    blocks = [1, 2, 3, 4, 5]
    assert world.compute(request, 4 * BLOCK_TOKENS + 1, blocks).stores == []
    told(world)
    meta = world.compute(request, 1, blocks)
    (job,) = meta.stores
    assert job.keys == Adapter(1, "/p", A).keys(request.block_hashes)
    assert job.block_ids == blocks[:4] and meta.adapters
    assert not world.queue.tickets


def test_a_reset_forgets_prompts_of_which_nothing_is_known() -> None:
    world = World(loads=False)
    request = arrive(world)
    world.match(request)
    world.compute(request, 4 * BLOCK_TOKENS + 1, [1, 2, 3, 4, 5])
    world.side.reset()
    told(world)
    assert world.compute(request, 1, [1, 2, 3, 4, 5]).stores == []
    world.finish(request)
    assert world.quiet()


def test_requests_with_unknown_adapters_leave_nothing() -> None:
    world = World()
    requests = [arrive(world, seed=seed) for seed in range(4)]
    world.match(requests[1])
    world.meta()
    for request in requests:
        world.finish(request)
    assert world.quiet()


# -- what workers tell -----------------------------------------------------------


class Manager:
    """vLLM's, as far as it is watched: it loads what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: set[int] = set()
        self.while_loading: Callable[[], object] = lambda: None

        def load(manager: object, request: LoRARequest) -> str:
            self.while_loading()
            self.loaded.add(request.lora_int_id)
            name: str = request.lora_name
            return name

        monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", load)
        monkeypatch.setattr(WorkerLoRAManager, "list_adapters", lambda manager: self.loaded)
        self._vllm: Any = object.__new__(WorkerLoRAManager)

    def load(self, request: LoRARequest) -> None:
        assert self._vllm._load_adapter(request) == request.lora_name


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Manager:
    return Manager(monkeypatch)


@pytest.fixture
def loaded(manager: Manager) -> Iterator[LoadedAdapters]:
    loaded = LoadedAdapters("bfloat16")
    yield loaded
    loaded.close()


def write(path: Path, weights: bytes = b"weights", config: str = "{}") -> str:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(config)
    (path / "adapter_model.safetensors").write_bytes(weights)
    return str(path)


def news(loaded: LoadedAdapters) -> dict[int, bytes]:
    deadline = time.monotonic() + 30
    while not (found := loaded.take_news()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found


def identity(manager: Manager, loaded: LoadedAdapters, path: str, number: int = 1) -> bytes:
    """What is told in the end."""
    manager.load(lora(number, path))
    found = news(loaded)[number]
    return found or news(loaded)[number]


def test_the_identity_is_the_content_whatever_else_is_equal(
    manager: Manager, loaded: LoadedAdapters, tmp_path: Path
) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    first = identity(manager, loaded, write(path))
    times = [(each, os.stat(each)) for each in path.iterdir()]
    changed = identity(manager, loaded, write(path, b"WEIGHTS"))
    for each, status in times:
        os.utime(each, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed_back_in_time = identity(manager, loaded, str(path))
    configured = identity(manager, loaded, write(path, config='{"r": 2}'))
    assert len({first, changed, configured}) == 3
    assert changed_back_in_time == changed
    assert identity(manager, loaded, write(other), number=2) == first
    with_other_settings = LoadedAdapters("float32")
    assert identity(manager, with_other_settings, str(other)) != first
    with_other_settings.close()


def test_files_are_read_once_for_each_version(
    manager: Manager, loaded: LoadedAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a")
    first = identity(manager, loaded, path)
    monkeypatch.setattr(LoadedAdapters, "_read", None)
    manager.load(lora(1, path))
    manager.load(lora(2, path))
    assert loaded.take_news() == {1: first, 2: first}


def test_files_that_change_while_they_are_loaded_or_read_are_uncertain(
    manager: Manager, loaded: LoadedAdapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a")
    manager.while_loading = lambda: write(tmp_path / "a", b"others")
    manager.load(lora(1, path))
    assert news(loaded) == {1: UNCERTAIN}
    manager.while_loading = lambda: None
    read = LoadedAdapters._read

    def read_late(*args: Any) -> None:
        write(tmp_path / "a", b"others still")
        read(*args)

    monkeypatch.setattr(LoadedAdapters, "_read", read_late)
    manager.load(lora(2, path))
    assert news(loaded) == {2: UNCERTAIN}


@pytest.mark.parametrize("what", ["a hub's name", "no weights", "no config"])
def test_what_is_not_in_known_files_is_uncertain(
    manager: Manager, loaded: LoadedAdapters, tmp_path: Path, what: str
) -> None:
    path = write(tmp_path / "a")
    if what == "no weights":
        (tmp_path / "a/adapter_model.safetensors").unlink()
    if what == "no config":
        (tmp_path / "a/adapter_config.json").unlink()
    manager.load(lora(1, "org/name" if what == "a hub's name" else path))
    assert news(loaded) == {1: UNCERTAIN}


def test_a_worker_computes_with_what_it_has_loaded_not_with_what_is_there(
    manager: Manager, loaded: LoadedAdapters, tmp_path: Path
) -> None:
    path = write(tmp_path / "a")
    adapter = Adapter(1, path, identity(manager, loaded, path))
    assert loaded.has(adapter)
    assert not loaded.has(adapter._replace(identity=B))
    assert not loaded.has(adapter._replace(number=2))
    write(tmp_path / "a", b"WEIGHTS")
    assert loaded.has(adapter), "it is not loaded again before it was let go of"
    manager.loaded.clear()
    assert not loaded.has(adapter), "what it would load now is something else"
    manager.load(lora(1, path))
    assert news(loaded)[1] == UNCERTAIN, "told at once, before it is read"
    assert not loaded.has(adapter)


def test_a_vllm_that_loads_in_another_way_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(WorkerLoRAManager, "_load_adapter")
    told: list[str] = []
    monkeypatch.setattr(adapter_files.logger, "warning", told.append)
    LoadedAdapters("bfloat16").close()
    assert len(told) == 1
