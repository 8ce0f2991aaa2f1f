"""The kernels of the codec: a GPU does with groups of 32 elements what `codec` does on a
processor, to the bit.

A thread takes a group. What it does is integers, and products, sums and quotients of floats that
are each rounded once, as IEEE 754 says: those with names in `_rn`, which a compiler neither
contracts nor replaces. Subnormal numbers stay what they are.
"""

from __future__ import annotations

from kvstore.types import CODECS

ENCODE_KERNEL = "kvstore_encode"
DECODE_KERNEL = "kvstore_decode"

DTYPES = ("bfloat16", "float16", "float32")

THREADS = 256
"""Of a block of threads: each codes one group at a time."""

MOST_BLOCKS = 64
"""Of threads, as `kernels.MOST_BLOCKS`, for all runs together."""

GROUPS_BYTES = 32
"""Of `kvstore_groups`."""


def kind_of(codec: str, dtype: str) -> int:
    """What the kernels are told."""
    return list(CODECS).index(codec) * len(DTYPES) + DTYPES.index(dtype)


def grid_of(runs: int) -> tuple[int, int]:
    """Blocks of threads: those that share the runs, and those that share each run's groups."""
    beside = min(runs, MOST_BLOCKS)
    return beside, max(1, MOST_BLOCKS // beside)


SOURCE = r"""
struct kvstore_groups {
    unsigned long long raw, scales, codes, count;
};

typedef unsigned int word;
typedef unsigned char byte;

enum { GROUP = 32 };
enum { FP8, INT4 };
enum { BFLOAT16, FLOAT16, FLOAT32 };

#define MAGNITUDE 0x7fffffffu
#define INFINITE 0x7f800000u
#define NOT_A_NUMBER 0x7fc00000u

/* What of a dtype matters here, as bits of float32: see _Range in codec.py. */
template <int DTYPE> struct range {
    static const word most_fp8 = DTYPE == FLOAT16 ? 0x47700000u : 0x7f700000u;
    static const word least = DTYPE == FLOAT16 ? 0x35800000u : 0x00800000u;
    static const word most = DTYPE == FLOAT16 ? 0x46100000u : 0x7e100000u;
};

/* -- sixteen bytes at a time ------------------------------------------------ */

static __device__ __forceinline__ void load_words(word* to, const byte* from, int words)
{
    if ((reinterpret_cast<unsigned long long>(from) & 15) == 0) {
        #pragma unroll
        for (int at = 0; at < words; at += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(from + 4 * at);
            to[at] = four.x;
            to[at + 1] = four.y;
            to[at + 2] = four.z;
            to[at + 3] = four.w;
        }
    } else {
        #pragma unroll
        for (int at = 0; at < words; at++)
            to[at] = word(from[4 * at]) | word(from[4 * at + 1]) << 8
                   | word(from[4 * at + 2]) << 16 | word(from[4 * at + 3]) << 24;
    }
}

static __device__ __forceinline__ void store_words(byte* to, const word* from, int words)
{
    if ((reinterpret_cast<unsigned long long>(to) & 15) == 0) {
        #pragma unroll
        for (int at = 0; at < words; at += 4) {
            uint4 four;
            four.x = from[at];
            four.y = from[at + 1];
            four.z = from[at + 2];
            four.w = from[at + 3];
            *reinterpret_cast<uint4*>(to + 4 * at) = four;
        }
    } else {
        #pragma unroll
        for (int at = 0; at < 4 * words; at++)
            to[at] = byte(from[at / 4] >> (8 * (at % 4)));
    }
}

/* -- elements as float32, and back ------------------------------------------ */

static __device__ __forceinline__ word from_half(word half)
{
    const word sign = (half & 0x8000u) << 16, size = half & 0x7fffu;
    if (size >= 0x7c00u)
        return sign | NOT_A_NUMBER;
    if (size >= 0x0400u)
        return sign | ((size << 13) + 0x38000000u);
    return sign | __float_as_uint(__fmul_rn(float(size), 5.9604644775390625e-8f));
}

static __device__ __forceinline__ word to_half(word bits)
{
    const word sign = bits >> 16 & 0x8000u;
    word size = bits & MAGNITUDE;
    if (size > INFINITE)
        return sign | 0x7e00u;
    if (size >= 0x47800000u)
        return sign | 0x7c00u;
    if (size < 0x38800000u)  /* Of 0.5 the last bit is the least that a half has. */
        return sign | (__float_as_uint(__fadd_rn(__uint_as_float(size), 0.5f)) - 0x3f000000u);
    size += 0xc8000fffu + (size >> 13 & 1);
    return sign | size >> 13;
}

template <int DTYPE>
static __device__ __forceinline__ void load_elements(word* bits, const byte* raw)
{
    if constexpr (DTYPE == FLOAT32) {
        load_words(bits, raw, GROUP);
    } else {
        word pairs[GROUP / 2];
        load_words(pairs, raw, GROUP / 2);
        #pragma unroll
        for (int at = 0; at < GROUP; at++) {
            const word element = pairs[at / 2] >> (16 * (at % 2)) & 0xffffu;
            bits[at] = DTYPE == BFLOAT16 ? element << 16 : from_half(element);
        }
    }
}

template <int DTYPE>
static __device__ __forceinline__ void store_elements(byte* raw, const word* bits)
{
    if constexpr (DTYPE == FLOAT32) {
        store_words(raw, bits, GROUP);
    } else {
        word pairs[GROUP / 2];
        #pragma unroll
        for (int at = 0; at < GROUP; at += 2) {
            const word one = DTYPE == BFLOAT16 ? bits[at] >> 16 : to_half(bits[at]);
            const word other = DTYPE == BFLOAT16 ? bits[at + 1] >> 16 : to_half(bits[at + 1]);
            pairs[at / 2] = one | other << 16;
        }
        store_words(raw, pairs, GROUP / 2);
    }
}

/* What is not finite counts as 0. */
static __device__ __forceinline__ word finite(word bits)
{
    return (bits & MAGNITUDE) >= INFINITE ? 0 : bits;
}

/* -- a group ---------------------------------------------------------------- */

/* Of its sizes; what is not finite has none. */
static __device__ __forceinline__ word largest(const word* bits)
{
    word top = 0;
    #pragma unroll
    for (int at = 0; at < GROUP; at++) {
        const word size = finite(bits[at]) & MAGNITUDE;
        top = size > top ? size : top;
    }
    return top;
}

template <int DTYPE>
static __device__ __forceinline__ word encode_fp8(word* codes, const word* bits)
{
    word top = largest(bits);
    top = top > range<DTYPE>::most_fp8 ? range<DTYPE>::most_fp8 : top;
    int power = int(top >> 23) - (127 + 8) + ((top & 0x7fffffu) > 0x600000u ? 1 : 0);
    power = power < -126 ? -126 : power;
    const float down = __uint_as_float(word(127 - power) << 23);
    #pragma unroll
    for (int at = 0; at < GROUP; at++) {
        word size = finite(bits[at]) & MAGNITUDE;
        size = size > range<DTYPE>::most_fp8 ? range<DTYPE>::most_fp8 : size;
        const float scaled = __fmul_rn(__uint_as_float(size), down);
        const word whole = __float_as_uint(scaled);
        word code;
        if (whole < 0x3c800000u)  /* 2^-6: below, so many times 2^-9. */
            code = __float_as_uint(__fadd_rn(scaled, 16384.0f)) & 15u;
        else
            code = ((whole + 0x7ffffu + (whole >> 20 & 1)) >> 20) - ((127 - 7) << 3);
        code |= bits[at] >> 24 & 0x80u;
        code = (bits[at] & MAGNITUDE) >= INFINITE ? 0x7fu : code;
        codes[at / 4] |= code << (8 * (at % 4));
    }
    return word(power + 127);
}

template <int DTYPE>
static __device__ __forceinline__ word encode_int4(word* codes, const word* bits)
{
    const word top = largest(bits);
    const word seventh = __float_as_uint(__fdiv_rn(__uint_as_float(top), 7.0f));
    word scale = (seventh + 0x7ffffu) & 0xfff80000u;
    scale = scale < range<DTYPE>::least ? range<DTYPE>::least : scale;
    scale = scale > range<DTYPE>::most ? range<DTYPE>::most : scale;
    #pragma unroll
    for (int at = 0; at < GROUP; at++) {
        const float value = __uint_as_float(finite(bits[at]));
        int code = __float2int_rn(__fdiv_rn(value, __uint_as_float(scale)));
        code = code < -7 ? -7 : code > 7 ? 7 : code;
        code = (bits[at] & MAGNITUDE) >= INFINITE ? 8 : code;
        codes[at / 8] |= (word(code) & 15u) << (4 * (at % 8));
    }
    return scale >> 19;
}

static __device__ __forceinline__ void decode_fp8(word* bits, const word* codes, word scale)
{
    /* 2^128 is no number of float32: then twice 2^127. */
    const word factor = scale == 0 ? 0x00400000u : (scale == 255 ? 254u : scale) << 23;
    #pragma unroll
    for (int at = 0; at < GROUP; at++) {
        const word code = codes[at / 4] >> (8 * (at % 4)) & 0xffu;
        const word power = code >> 3 & 15u, mantissa = code & 7u;
        float size = power == 0 ? __fmul_rn(float(mantissa), 0.001953125f)
                                : __uint_as_float((power + (127 - 7)) << 23 | mantissa << 20);
        size = scale == 255 ? __fadd_rn(size, size) : size;
        size = __fmul_rn(size, __uint_as_float(factor));
        const word magnitude = (code & 0x7fu) == 0x7fu ? NOT_A_NUMBER : __float_as_uint(size);
        bits[at] = magnitude | (code & 0x80u) << 24;
    }
}

static __device__ __forceinline__ void decode_int4(word* bits, const word* codes, word scale)
{
    const float factor = __uint_as_float((scale & 0xfffu) << 19);
    #pragma unroll
    for (int at = 0; at < GROUP; at++) {
        const int code = int(codes[at / 8] >> (4 * (at % 8)) & 15u);
        const float value = __fmul_rn(factor, float(code > 7 ? code - 16 : code));
        bits[at] = code == 8 ? NOT_A_NUMBER : __float_as_uint(value);
    }
}

/* -- runs of groups --------------------------------------------------------- */

template <int CODEC, int DTYPE>
static __device__ void encode_groups(const kvstore_groups& run)
{
    const int words = CODEC == FP8 ? GROUP / 4 : GROUP / 8;
    const int raw_bytes = GROUP * (DTYPE == FLOAT32 ? 4 : 2);
    const unsigned long long step = (unsigned long long)gridDim.y * blockDim.x;
    unsigned long long group = (unsigned long long)blockIdx.y * blockDim.x + threadIdx.x;
    for (; group < run.count; group += step) {
        word bits[GROUP], codes[words] = {};
        load_elements<DTYPE>(bits, reinterpret_cast<const byte*>(run.raw + group * raw_bytes));
        if (CODEC == FP8)
            *reinterpret_cast<byte*>(run.scales + group) = byte(encode_fp8<DTYPE>(codes, bits));
        else
            *reinterpret_cast<unsigned short*>(run.scales + 2 * group) =
                (unsigned short)encode_int4<DTYPE>(codes, bits);
        store_words(reinterpret_cast<byte*>(run.codes + group * 4 * words), codes, words);
    }
}

template <int CODEC, int DTYPE>
static __device__ void decode_groups(const kvstore_groups& run)
{
    const int words = CODEC == FP8 ? GROUP / 4 : GROUP / 8;
    const int raw_bytes = GROUP * (DTYPE == FLOAT32 ? 4 : 2);
    const unsigned long long step = (unsigned long long)gridDim.y * blockDim.x;
    unsigned long long group = (unsigned long long)blockIdx.y * blockDim.x + threadIdx.x;
    for (; group < run.count; group += step) {
        word bits[GROUP], codes[words];
        load_words(codes, reinterpret_cast<const byte*>(run.codes + group * 4 * words), words);
        if (CODEC == FP8)
            decode_fp8(bits, codes, *reinterpret_cast<const byte*>(run.scales + group));
        else
            decode_int4(
                bits, codes, *reinterpret_cast<const unsigned short*>(run.scales + 2 * group));
        store_elements<DTYPE>(reinterpret_cast<byte*>(run.raw + group * raw_bytes), bits);
    }
}

#define OF_EACH_KIND(WORK)                                                                        \
    for (word index = blockIdx.x; index < count; index += gridDim.x)                              \
        switch (kind) {                                                                           \
        case 0: WORK<FP8, BFLOAT16>(runs[index]); break;                                          \
        case 1: WORK<FP8, FLOAT16>(runs[index]); break;                                           \
        case 2: WORK<FP8, FLOAT32>(runs[index]); break;                                           \
        case 3: WORK<INT4, BFLOAT16>(runs[index]); break;                                         \
        case 4: WORK<INT4, FLOAT16>(runs[index]); break;                                          \
        case 5: WORK<INT4, FLOAT32>(runs[index]); break;                                          \
        }

extern "C" __global__ void kvstore_encode(const kvstore_groups* runs, word count, word kind)
{
    OF_EACH_KIND(encode_groups)
}

extern "C" __global__ void kvstore_decode(const kvstore_groups* runs, word count, word kind)
{
    OF_EACH_KIND(decode_groups)
}
"""
