"""What a machine is made of, and the models that run on it.

`parts.toml` has the names; a file of the same form adds others, and a model may be read
from the `config.json` that it comes with. `kvstore plan` reckons with the parts, and a
server can be told to be no faster than some of them (`tiers.modelled`).
"""

from __future__ import annotations

import json
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from kvstore.errors import BadRequest
from kvstore.nearest import nearest

Positive = Annotated[float, Meta(gt=0, le=1e9)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Peaks; `host_gbps` is what one direction of its host link achieves."""

    name: str
    memory_gb: Positive
    memory_gbps: Positive
    bf16_tflops: Positive
    host_gbps: Positive
    source: str = ""


class Ssd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`drive_writes_a_day`: what the maker warrants, for `warranty_years`. `read_us`,
    `write_us`: the latency of a request that is alone; `depth`: requests at a time."""

    name: str
    capacity_gb: Positive
    read_gbps: Positive
    write_gbps: Positive
    drive_writes_a_day: Positive
    warranty_years: Positive = 5.0
    read_us: Positive = 80.0
    write_us: Positive = 15.0
    depth: Count = 80
    source: str = ""

    @property
    def endurance_bytes(self) -> float:
        """May be written to one drive in its life."""
        return self.drive_writes_a_day * self.capacity_gb * 1e9 * self.warranty_years * 365


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A transformer. `kv_layers`: those that keep KV for every token."""

    name: str
    parameters_billions: Positive
    layers: Count
    query_heads: Count
    kv_heads: Count
    head_dim: Count
    active_billions: Positive | None = None
    kv_dim: Count | None = None
    kv_layers: Count | None = None
    source: str = ""

    @property
    def active(self) -> float:
        """Parameters that one token passes through."""
        return (self.active_billions or self.parameters_billions) * 1e9

    def kv_bytes(self, kv_dtype_bytes: float) -> float:
        """Of one token."""
        a_layer = self.kv_dim or 2 * self.kv_heads * self.head_dim
        return (self.kv_layers or self.layers) * a_layer * kv_dtype_bytes


class Parts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    gpu: dict[str, Gpu] = {}
    ssd: dict[str, Ssd] = {}
    model: dict[str, Model] = {}


def load_parts(more: Path | None = None) -> Parts:
    """The parts by name, those of the file `more` over our own. Raises `BadRequest`."""
    own = _own_parts()
    if more is None:
        return own
    theirs = _read(more)
    return Parts(own.gpu | theirs.gpu, own.ssd | theirs.ssd, own.model | theirs.model)


def find(kind: str, name: str, parts: dict[str, Any]) -> Any:
    """The part of that name. Raises `BadRequest` with the nearest."""
    if name not in parts:
        raise BadRequest(f"no {kind} {name!r} ({', '.join(parts)}){nearest(name, parts)}")
    return parts[name]


def find_model(name: str, parts: Parts, parameters_billions: float | None = None) -> Model:
    """By name, or from a `config.json` or the folder it is in; that does not tell how
    many parameters there are, so they are estimated unless given. Raises `BadRequest`."""
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if path.suffix == ".json" and path.exists():
        return _from_config(path, parameters_billions)
    if parameters_billions is not None:
        raise BadRequest(f"parameters are said of a config.json's model, and {name!r} is none")
    model: Model = find("model", name, parts.model)
    return model


MODELLED = "modelled:"
SSD_SUFFIX = "-nvme"
"""Of an SSD's name in a device's, where it stands beside a GPU's."""


class Device(NamedTuple):
    """Hardware that a server is to be no faster than."""

    ssd: Ssd
    gpu: Gpu | None

    def __str__(self) -> str:
        return " and ".join(part.name for part in (self.gpu, self.ssd) if part is not None)


def find_device(text: str) -> Device:
    """`modelled:SSD-nvme` or `modelled:GPU+SSD-nvme`. Raises `BadRequest` with the nearest
    right name."""
    if not text.startswith(MODELLED):
        raise BadRequest(f"{text!r} does not begin with {MODELLED!r}")
    parts = _own_parts()
    ssds = {name + SSD_SUFFIX: ssd for name, ssd in parts.ssd.items()}
    *before, last = text.removeprefix(MODELLED).split("+")
    ssd: Ssd = find("SSD", last, ssds)
    if len(before) > 1:
        raise BadRequest(f"{text!r} names more than one GPU and one SSD")
    return Device(ssd, find("GPU", before[0], parts.gpu) if before else None)


@cache
def _own_parts() -> Parts:
    return _read(Path(__file__).with_name("parts.toml"))


def _read(path: Path) -> Parts:
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Parts)
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path}: {error}") from error
    except msgspec.ValidationError as error:
        raise BadRequest(f"{path}: {error}") from error


def _from_config(path: Path, parameters_billions: float | None) -> Model:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BadRequest(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise BadRequest(f"{path}: not a model's config.json")
    # Multimodal models keep their language model's in a part of its own.
    config = config.get("text_config", config)

    def number(*names: str) -> int | None:
        for name in names:
            value = config.get(name)
            if type(value) is int and value > 0:
                return value
        return None

    layers = number("num_hidden_layers", "n_layer")
    heads = number("num_attention_heads", "n_head")
    hidden = number("hidden_size", "n_embd")
    if layers is None or heads is None or hidden is None:
        raise BadRequest(f"{path}: it does not tell layers, attention heads and hidden size")
    head_dim = number("head_dim") or hidden // heads
    kv_heads = number("num_key_value_heads") or heads
    latent = number("kv_lora_rank")
    if latent is not None:
        head_dim = (number("qk_nope_head_dim") or 128) + (number("qk_rope_head_dim") or 64)
        latent += number("qk_rope_head_dim") or 0
    if parameters_billions is None:
        mlp = number("intermediate_size", "n_inner") or 4 * hidden
        experts = number("num_experts", "num_local_experts", "n_routed_experts")
        if experts is not None:
            raise BadRequest(f"{path}: say how large a mixture of experts is (--parameters)")
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        vocabulary = 2 * (number("vocab_size") or 0) * hidden
        parameters_billions = (layers * (attention + 3 * hidden * mlp) + vocabulary) / 1e9
    return Model(
        name=str(config.get("_name_or_path") or path.parent.name or path),
        parameters_billions=parameters_billions,
        layers=layers,
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kv_dim=latent,
        source=str(path),
    )
