"""What a codec gives back is within its bounds, for every float there is, and stays what it is
when it is coded again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore.device import codec
from kvstore.errors import BadRequest
from kvstore.types import CODECS, GROUP, LayoutSpec, coded_bytes

DTYPES = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
LEAST_OFF = {
    ("fp8", "bfloat16"): 2.0**-136, ("fp8", "float16"): 0.0, ("fp8", "float32"): 2.0**-136,
    ("int4", "bfloat16"): 2.0**-127, ("int4", "float16"): 2.0**-21, ("int4", "float32"): 2.0**-127,
}  # fmt: skip


def as_floats(raw: Any, dtype: str) -> Any:
    """[group, element], exact."""
    if dtype == "bfloat16":
        raw = raw.astype(np.uint32) << 16
    kind = np.float16 if dtype == "float16" else np.float32
    with np.errstate(invalid="ignore"):
        return raw.view(kind).astype(np.float64).reshape(-1, GROUP)


def as_raw(values: Any, dtype: str) -> Any:
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16 if dtype == "float16" else np.float32).view(DTYPES[dtype])


def round_trip(name: str, dtype: str, raw: Any) -> Any:
    coded = bytearray(coded_bytes(name, dtype, raw.nbytes))
    back = np.zeros_like(raw)
    codec.encode(name, dtype, memoryview(raw).cast("B"), memoryview(coded))
    codec.decode(name, dtype, memoryview(coded), memoryview(back).cast("B"))
    return back


def samples(dtype: str) -> dict[str, Any]:
    random = np.random.default_rng(0)
    every = np.arange(1 << 16, dtype=np.uint16)
    if dtype == "float32":
        every = random.integers(0, 1 << 32, 1 << 16, np.uint32)
    groups = 2048
    sizes = np.exp2(random.integers(-24, 12, (groups, 1)).astype(np.float64))
    normal = as_raw(random.normal(size=(groups, GROUP)) * sizes, dtype).ravel()
    # A few large elements in a group, as some channels of keys are.
    uneven = random.normal(size=(groups, GROUP))
    uneven[:, 3] *= 100
    return {
        "every bit pattern": every,
        "every bit pattern, mixed": random.permutation(every),
        "normal": normal,
        "uneven": as_raw(uneven, dtype).ravel(),
        "nothing": np.zeros(GROUP, DTYPES[dtype]),
        "more than a part": np.resize(normal, codec._PART + 3 * GROUP),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_what_comes_back_is_within_the_bounds(name: str, dtype: str) -> None:
    for what, raw in samples(dtype).items():
        was, now = (as_floats(each, dtype) for each in (raw, round_trip(name, dtype, raw)))
        finite = np.isfinite(was)
        assert np.isnan(now[~finite]).all(), what
        size = np.where(finite, np.abs(was), 0)
        most = size.max(axis=1, keepdims=True)
        bound = np.broadcast_to(most * 17 / 224, was.shape)
        if name == "fp8":
            bound = np.maximum(size / 16, most / 229376)
        bound = np.maximum(bound, LEAST_OFF[name, dtype])
        off = np.abs(np.where(finite, now - np.where(finite, was, 0), 0))
        assert (off <= bound * (1 + 2.0**-20)).all(), what


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CODECS)
def test_what_comes_back_stays_what_it_is(name: str, dtype: str) -> None:
    """A block that is read up and written again must not fade."""
    for what, raw in samples(dtype).items():
        once = round_trip(name, dtype, raw)
        assert round_trip(name, dtype, once).tobytes() == once.tobytes(), what


def test_the_codes_are_those_of_the_formats() -> None:
    values = np.zeros(GROUP)
    values[:8] = [448, -448, 1, 1.0625, 0.0009765625, -0.0, 17, 19]
    coded = bytearray(coded_bytes("fp8", "float32", 4 * GROUP))
    raw = as_raw(values, "float32")
    codec.encode("fp8", "float32", memoryview(raw).cast("B"), memoryview(coded))
    assert coded[0] == 127
    # e4m3: halves go to even; the least code is 2^-9, of which a half is 0.
    assert list(coded[1:9]) == [0x7E, 0xFE, 0x38, 0x38, 0x00, 0x80, 0x58, 0x5A]
    values[:8] = [7, -7, 1, 0.5, 1.5, -1, np.nan, 2.4]
    raw = as_raw(values, "float32")
    coded = bytearray(coded_bytes("int4", "float32", 4 * GROUP))
    codec.encode("int4", "float32", memoryview(raw).cast("B"), memoryview(coded))
    assert list(coded[:6]) == [0xF0, 0x07, 0x97, 0x01, 0xF2, 0x28]


@pytest.mark.parametrize(
    ("name", "dtype", "part"),
    [("fp8", "bfloat16", 33 / 64), ("int4", "bfloat16", 18 / 64), ("int4", "float32", 18 / 128)],
)
def test_a_layout_says_what_a_block_takes(name: str, dtype: str, part: float) -> None:
    spec = LayoutSpec("m", dtype, 16, 1 << 20, codec=name)
    assert spec.stored_bytes == part * (1 << 20)
    assert LayoutSpec("m", dtype, 16, 1 << 20).stored_bytes == 1 << 20


def test_blocks_that_share_bytes_agree_on_the_codec() -> None:
    exact = LayoutSpec("m", "bfloat16", 16, 4096)
    ids = {exact.layout_id} | {
        LayoutSpec("m", "bfloat16", 16, 4096, codec=name).layout_id for name in CODECS
    }
    assert len(ids) == 1 + len(CODECS)
    assert exact.layout_id.hex() == "4f7cd370613feedaa1052a82967d3de3"


@pytest.mark.parametrize(
    ("dtype", "nbytes", "name"),
    [("bfloat16", 4096, "fp9"), ("fp8_e4m3", 4096, "fp8"), ("bfloat16", 4098, "int4")],
)
def test_a_codec_that_does_not_fit_is_refused(dtype: str, nbytes: int, name: str) -> None:
    with pytest.raises(BadRequest):
        LayoutSpec("m", dtype, 16, nbytes, codec=name)
