"""What vLLM folds into its block hashes, which are our keys: nobody gets another's blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from kvstore.errors import ConfigError
from kvstore_connectors.vllm.config import ConnectorConfig
from kvstore_connectors.vllm.connector import _check
from tests.unit.connectors.fakes import BLOCK_TOKENS
from tests.unit.connectors.test_scheduler import World

TOKENS = list(range(4 * BLOCK_TOKENS + 1))


def image(identifier: str, offset: int = BLOCK_TOKENS) -> Any:
    place = PlaceholderRange(offset=offset, length=2)
    return [MultiModalFeatureSpec(None, "image", identifier, place)]


def keys_of(**facts: Any) -> list[bytes]:
    """The keys that a request with these facts asks the store for."""
    init_none_hash(sha256)
    request = Request(
        "r", TOKENS, SamplingParams(max_tokens=1), None,
        block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256), **facts,
    )  # fmt: skip
    world = World()
    world.side.on_new_request(request)
    world.side.get_num_new_matched_tokens(request, 0)
    (ticket,) = world.queue.tickets
    return ticket.wanted.keys[BLOCK_TOKENS]


def test_equal_prompts_have_equal_keys() -> None:
    assert keys_of() == keys_of()
    assert keys_of(cache_salt="a") == keys_of(cache_salt="a")


@pytest.mark.parametrize(
    "facts",
    [
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"mm_features": image("one", offset=0)},
        {"mm_features": image("two", offset=0)},
        {"mm_features": image("one", offset=1)},
        {"prompt_embeds": torch.zeros(len(TOKENS), 2)},
    ],
    ids=str,
)
def test_whatever_sets_prompts_apart_sets_all_their_keys_apart(facts: dict[str, Any]) -> None:
    others: list[dict[str, Any]] = [
        {}, {"cache_salt": "c"}, {"mm_features": image("three", offset=0)},
    ]  # fmt: skip
    for other in others:
        assert not set(keys_of(**facts)) & set(keys_of(**other))


def test_an_image_sets_apart_what_follows_it_and_nothing_before() -> None:
    one, two = keys_of(mm_features=image("one")), keys_of(mm_features=image("two"))
    assert one[0] == two[0]
    assert not set(one[1:]) & set(two[1:])


@pytest.mark.parametrize("algorithm", ["xxhash", "xxhash_cbor", "builtin"])
def test_hashes_that_can_be_made_to_collide_are_refused(algorithm: str) -> None:
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(prefix_caching_hash_algo=algorithm),
        device_config=SimpleNamespace(device_type="cpu"),
    )
    with pytest.raises(ConfigError, match="sha256"):
        _check(config, ConnectorConfig())
    config.cache_config.prefix_caching_hash_algo = "sha256"
    _check(config, ConnectorConfig())


def test_a_gpu_is_served_only_where_somebody_said_so() -> None:
    """Nobody has seen it work."""
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"),
        device_config=SimpleNamespace(device_type="cuda"),
    )
    with pytest.raises(ConfigError, match="untested_gpu"):
        _check(config, ConnectorConfig())
    _check(config, ConnectorConfig(untested_gpu=True))
