"""The kernels that take checksums: XXH3-64 of bytes in a GPU's memory, with the default secret and
no seed, after its specification (xxHash, doc/xxhash_spec.md, 0.2.0, "for large inputs").

XXH3 goes through its input in rounds of 1 KiB. What a round adds to its eight accumulators is a
sum over its words that the accumulators have no part in; only after it are they scrambled. So one
kernel takes the sums of all rounds side by side, which is where the bytes are read, and another,
eight threads of it, goes from round to round over a sixteenth as many. What is left, to merge
eight words, is the host's (`merged`). No thread waits for another: two launches in one stream do.

Up to `SHORT` bytes XXH3 is another function, and the host's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

SUMS_KERNEL = "kvstore_checksum_sums"
CHAIN_KERNEL = "kvstore_checksum_chain"

SHORT = 240
LANES = 8
"""Accumulators, and threads of the second kernel."""
RESULT_BYTES = 8 * LANES

THREADS = 256
"""Of a block of threads: four go through one round."""
MOST_BLOCKS = 32
"""Of threads: of 2 MiB each round at once."""

_ROUND = 1024
_THREADS_A_ROUND = 4

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME64 = (
    0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)  # fmt: skip
_MIX = 0x165667919E3779F9
_LOWER = (1 << 64) - 1


def _words(first: int, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}Q", _SECRET, first)


SECRET = _words(0, 24)
LAST_SECRET = _words(len(_SECRET) - 71, LANES)
"""For the last 64 bytes."""
START = (
    _PRIME32[2], _PRIME64[0], _PRIME64[1], _PRIME64[2], _PRIME64[3], _PRIME32[1], _PRIME64[4],
    _PRIME32[0],
)  # fmt: skip
_MERGE_SECRET = _words(11, LANES)


def sums_bytes(nbytes: int) -> int:
    """What the first kernel writes of so many bytes, at most."""
    return (nbytes // _ROUND + 1) * 8 * LANES


def grid_of(nbytes: int) -> int:
    """Blocks of threads of the first kernel."""
    a_block = _ROUND * THREADS // _THREADS_A_ROUND
    return max(1, min(MOST_BLOCKS, -(-nbytes // a_block)))


def merged(accumulators: Sequence[int], nbytes: int) -> int:
    """The checksum of so many bytes, more than `SHORT`, of the accumulators that they led to."""
    result = nbytes * _PRIME64[0]
    for one in range(0, LANES, 2):
        factors = (accumulators[at] ^ _MERGE_SECRET[at] for at in (one, one + 1))
        product = next(factors) * next(factors)
        result += (product & _LOWER) ^ (product >> 64)
    result &= _LOWER
    result = (result ^ (result >> 37)) * _MIX & _LOWER
    return result ^ (result >> 32)


def _table(words: Sequence[int]) -> str:
    return ", ".join(f"{word:#x}ull" for word in words)


SOURCE = (
    f"""
typedef unsigned long long u64;

static __device__ const u64 SECRET[24] = {{{_table(SECRET)}}};
static __device__ const u64 LAST_SECRET[8] = {{{_table(LAST_SECRET)}}};
static __device__ const u64 START[8] = {{{_table(START)}}};
#define PRIME {_PRIME32[0]:#x}ull
"""
    r"""
enum { STRIPES = 16, ROUND = 1024, DEEP = 8 };

struct pair { u64 one, other; };

/* Two words of a stripe, at a multiple of 16 bytes. */
static __device__ __forceinline__ pair load_pair(const unsigned char* from)
{
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    pair words;
    words.one = u64(four.x) | u64(four.y) << 32;
    words.other = u64(four.z) | u64(four.w) << 32;
    return words;
}

/* Anywhere. */
static __device__ __forceinline__ u64 load_word(const unsigned char* from)
{
    u64 word = 0;
    #pragma unroll
    for (int at = 0; at < 8; at++)
        word |= u64(from[at]) << (8 * at);
    return word;
}

static __device__ __forceinline__ u64 product(u64 word, u64 secret)
{
    const u64 keyed = word ^ secret;
    return u64((unsigned int)keyed) * u64((unsigned int)(keyed >> 32));
}

/* Each word's product is its own accumulator's, the word itself its neighbour's. */
static __device__ __forceinline__ void add(pair& sums, const pair& words, u64 one, u64 other)
{
    sums.one += product(words.one, one) + words.other;
    sums.other += product(words.other, other) + words.one;
}

/* Rows of eight: what each round adds, and last what follows the last round. `from` is at a
   multiple of 16 bytes, `nbytes` are more than 240. */
extern "C" __global__ void kvstore_checksum_sums(const unsigned char* from, u64 nbytes, u64* rows)
{
    const u64 first = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    const u64 step = u64(gridDim.x) * blockDim.x / 4;
    const int lane = 2 * int(first % 4);
    u64 secret[STRIPES + 1];
    #pragma unroll
    for (int at = 0; at <= STRIPES; at++)
        secret[at] = SECRET[lane + at];
    for (u64 row = first / 4; row <= (nbytes - 1) / ROUND; row += step) {
        const unsigned char* mine = from + row * ROUND + 8 * lane;
        const u64 left = nbytes - row * ROUND;
        pair sums = {0, 0};
        if (left > ROUND) {
            pair words[STRIPES];
            #pragma unroll
            for (int stripe = 0; stripe < STRIPES; stripe++)
                words[stripe] = load_pair(mine + 64 * stripe);
            #pragma unroll
            for (int stripe = 0; stripe < STRIPES; stripe++)
                add(sums, words[stripe], secret[stripe], secret[stripe + 1]);
        } else {
            for (int stripe = 0; stripe < int((left - 1) / 64); stripe++)
                add(sums, load_pair(mine + 64 * stripe),
                    SECRET[lane + stripe], SECRET[lane + stripe + 1]);
            const unsigned char* last = from + nbytes - 64 + 8 * lane;
            pair words;
            words.one = load_word(last);
            words.other = load_word(last + 8);
            add(sums, words, LAST_SECRET[lane], LAST_SECRET[lane + 1]);
        }
        rows[8 * row + lane] = sums.one;
        rows[8 * row + lane + 1] = sums.other;
    }
}

static __device__ __forceinline__ u64 scrambled(u64 word, u64 secret)
{
    return (word ^ word >> 47 ^ secret) * PRIME;
}

/* Eight threads, an accumulator each. The next rows are read while these are gone through. */
extern "C" __global__ void kvstore_checksum_chain(const u64* rows, u64 nbytes, u64* to)
{
    const unsigned int lane = threadIdx.x;
    const u64 rounds = (nbytes - 1) / ROUND, secret = SECRET[STRIPES + lane];
    u64 word = START[lane], first = 0, next[DEEP];
    #pragma unroll
    for (int at = 0; at < DEEP; at++)
        next[at] = u64(at) <= rounds ? rows[8 * at + lane] : 0;
    for (; first + DEEP <= rounds; first += DEEP) {
        u64 now[DEEP];
        #pragma unroll
        for (int at = 0; at < DEEP; at++) {
            const u64 row = first + DEEP + at;
            now[at] = next[at];
            next[at] = row <= rounds ? rows[8 * row + lane] : 0;
        }
        #pragma unroll
        for (int at = 0; at < DEEP; at++)
            word = scrambled(word + now[at], secret);
    }
    #pragma unroll
    for (int at = 0; at < DEEP; at++)
        if (first + at < rounds)
            word = scrambled(word + next[at], secret);
        else if (first + at == rounds)
            word += next[at];
    to[lane] = word;
}
"""
)
