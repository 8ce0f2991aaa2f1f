"""Blocks in fewer bytes, with loss: fp8 or int4 elements, and a scale for each 32 of them.

A block is an array of floats of its layout's `dtype`, cut into groups of `GROUP`. Coded it
is the scales of all groups, then the codes of all elements, little-endian:

    fp8    a byte a group: 127 + k, for a scale of 2^k; a byte an element: e4m3 without
           infinities. k is the least for which the group's largest value is not above 448.
    int4   two bytes a group: the scale's exponent and 4 bits of mantissa, as the bits
           30..19 of a float32; half a byte an element, the even one low: -7..7 in two's
           complement. The scale is a seventh of the largest value, rounded up.

*Bounds.* Of a finite x in a group whose largest is m: fp8 is off by |x| / 16 at most, or by
m / 229376 or 2^-136 where that is more; int4 by 17 / 224 of m, or by 2^-21 for float16 and
2^-127 otherwise where that is more. What is not finite comes back as NaN.

*Once is always.* Scales are such that a product of scale and code is a number of each dtype,
so nothing is rounded on the way back, and to code again what comes back changes nothing. A
block that is read up and written again is no worse for it.

*Exactly so.* Every step is one that IEEE 754 defines to the bit, so the same block comes back
everywhere, from a GPU's kernels too (`coding_kernels`); its checksum can be told.

The work is done in parts that a processor's cache holds. Coming back is a look into a table:
scale and code of a group's element are 16 bits together.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.types import CODECS, GROUP, element_bytes

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint32]

_PART = 1 << 15
"""Elements at a time."""
_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_INFINITE = np.uint32(0x7F80_0000)
_FP8_NAN = 0x7F
_INT4_NAN = 8


class _Range(NamedTuple):
    """What of a dtype matters here. `most_fp8`: the largest number of 4 significant bits;
    larger ones count as that. Of int4 scales: `least` keeps 5 significant bits, seven times
    `most` is a number."""

    most_fp8: float
    least: float
    most: float


_NARROW = _Range(1.875 * 2.0**15, 2.0**-20, 1.125 * 2.0**13)
_WIDE = _Range(1.875 * 2.0**127, 2.0**-126, 1.125 * 2.0**125)
_RANGES = {"float16": _NARROW, "bfloat16": _WIDE, "float32": _WIDE}


def encode(codec: str, dtype: str, block: memoryview, into: memoryview) -> None:
    """Code all of `block`; `into` has `types.coded_bytes` of it."""
    elements = len(block) // element_bytes(dtype)
    scales, codes = _split(codec, elements, into)
    raw = np.frombuffer(block, _unsigned(dtype))
    encode_part = _encode_fp8 if codec == "fp8" else _encode_int4
    for start in range(0, elements, _PART):
        stop = min(start + _PART, elements)
        values = _floats(raw[start:stop], dtype).reshape(-1, GROUP)
        part_scales, part_codes = encode_part(values, _RANGES[dtype])
        scales[start // GROUP : stop // GROUP] = part_scales
        per = elements // len(codes)
        codes[start // per : stop // per] = part_codes.ravel()


def decode(codec: str, dtype: str, coded: memoryview, into: memoryview) -> None:
    """The inverse, as far as there is one; fills all of `into`."""
    elements = len(into) // element_bytes(dtype)
    scales, codes = _split(codec, elements, coded)
    out = np.frombuffer(into, _unsigned(dtype))
    table = _table(codec, dtype)
    per = elements // len(codes)
    for start in range(0, elements, _PART):
        stop = min(start + _PART, elements)
        part = codes[start // per : stop // per]
        group_scales = scales[start // GROUP : stop // GROUP].astype(np.uint16)
        if codec == "fp8":
            index = (group_scales << np.uint16(8))[:, None] | part.reshape(-1, GROUP)
        else:
            nibbles = np.empty((len(part), 2), np.uint16)
            nibbles[:, 0] = part & 15
            nibbles[:, 1] = part >> 4
            index = (group_scales << np.uint16(4))[:, None] | nibbles.reshape(-1, GROUP)
        # Any index is one of the table, and "clip" writes where it is told to.
        np.take(table, index.ravel(), out=out[start:stop], mode="clip")


def _split(codec: str, elements: int, coded: memoryview) -> tuple[Any, Any]:
    """The scales and the codes in coded bytes, as arrays over them."""
    kind = np.dtype("u1" if codec == "fp8" else "<u2")
    groups = elements // GROUP
    nbytes = elements * CODECS[codec] // 8
    scales = np.frombuffer(coded, kind, groups)
    return scales, np.frombuffer(coded, np.uint8, nbytes, offset=groups * kind.itemsize)


def _unsigned(dtype: str) -> npt.DTypeLike:
    return f"<u{element_bytes(dtype)}"


def _floats(raw: npt.NDArray[Any], dtype: str) -> Floats:
    if dtype == "float16":
        return raw.view("<f2").astype(np.float32)
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view(np.float32)


def _encode_fp8(values: Floats, known: _Range) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    bits = values.view(np.uint32)
    size, broken = _finite(bits & _MAGNITUDE)
    np.minimum(size, _bits_of(known.most_fp8), out=size)
    top = size.max(axis=1)
    # 448 is 1.75 * 2^8.
    power = (top >> np.uint32(23)).astype(np.int32) - (127 + 8)
    power += (top & np.uint32(0x7F_FFFF)) > np.uint32(0x60_0000)
    np.maximum(power, -126, out=power)
    scale_down = ((127 - power).astype(np.uint32) << np.uint32(23)).view(np.float32)
    scaled = size.view(np.float32) * scale_down[:, None]
    whole = scaled.view(np.uint32)
    # To three bits of mantissa, halves to even; the exponent's bias from 127 to 7.
    codes = whole >> np.uint32(20)
    codes &= np.uint32(1)
    codes += whole
    codes += np.uint32(0x7_FFFF)
    codes >>= np.uint32(20)
    codes -= np.uint32((127 - 7) << 3)
    # Below 2^-6 it is so many times 2^-9. Added to 2^14, of which that is the last bit, it
    # is rounded to it.
    least = (scaled + np.float32(2.0**14)).view(np.uint32) & np.uint32(0xF)
    codes = np.where(whole < _bits_of(2.0**-6), least, codes)
    codes |= (bits >> np.uint32(24)) & np.uint32(0x80)
    if broken is not None:
        codes[broken] = _FP8_NAN
    return (power + 127).astype(np.uint8), codes.astype(np.uint8)


def _encode_int4(values: Floats, known: _Range) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    size, broken = _finite(values.view(np.uint32) & _MAGNITUDE)
    seventh = size.max(axis=1).view(np.float32) / np.float32(7)
    # Up to five significant bits.
    rounded = (seventh.view(np.uint32) + np.uint32(0x7_FFFF)) & np.uint32(0xFFF8_0000)
    rounded = np.clip(rounded, _bits_of(known.least), _bits_of(known.most))
    finite = values if broken is None else np.where(broken, np.float32(0), values)
    scaled = finite / rounded.view(np.float32)[:, None]
    np.rint(scaled, out=scaled)
    np.maximum(scaled, np.float32(-7), out=scaled)
    np.minimum(scaled, np.float32(7), out=scaled)
    codes = scaled.astype(np.int8).view(np.uint8)
    if broken is not None:
        codes[broken] = _INT4_NAN
    # Two bytes, the first one low, to one.
    pairs = codes.view("<u2")
    packed = (pairs & np.uint16(0xF)) | ((pairs >> np.uint16(4)) & np.uint16(0xF0))
    return (rounded >> np.uint32(19)).astype(np.uint16), packed.astype(np.uint8)


def _finite(size: Bits) -> tuple[Bits, npt.NDArray[np.bool_] | None]:
    """Magnitudes, of which what is not finite counts as 0, and where that was."""
    broken = size >= _INFINITE
    if not broken.any():
        return size, None
    size[broken] = 0
    return size, broken


def _bits_of(number: float) -> np.uint32:
    return np.float32(number).view(np.uint32)


@cache
def _table(codec: str, dtype: str) -> npt.NDArray[Any]:
    """What each pair of scale and code stands for, in the bits of the dtype."""
    table: npt.NDArray[Any]
    index = np.arange(1 << 16)
    with np.errstate(over="ignore", invalid="ignore"):
        if codec == "fp8":
            values = np.ldexp(_fp8_values()[index & 0xFF], (index >> 8) - 127)
        else:
            scales = ((index >> 4).astype(np.uint32) << np.uint32(19)).view(np.float32)
            nibbles = index & 15
            signed = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float64)
            signed[nibbles == _INT4_NAN] = np.nan
            values = scales.astype(np.float64) * signed
        if dtype == "float16":
            table = values.astype("<f2").view("<u2")
        else:
            table = values.astype(np.float32).view(np.uint32)
    # Of no number that is coded anything is cut off here.
    return (table >> np.uint32(16)).astype("<u2") if dtype == "bfloat16" else table


def _fp8_values() -> npt.NDArray[np.float64]:
    code = np.arange(256)
    power, mantissa = (code >> 3) & 15, code & 7
    values = np.where(power == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * np.ldexp(1.0, power - 7))
    values[(code & 0x7F) == _FP8_NAN] = np.nan
    return np.where(code & 0x80, -values, values)
