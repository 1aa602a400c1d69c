// Conversion between the storage types and fp32, in integer arithmetic: every compiler vectorises
// it, no half type is needed, and flush-to-zero modes do not touch it.
#pragma once

#include <string.h>

#include "../rows.h"

namespace {

inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_from_bfloat16(uint16_t half) {
    return as_float(static_cast<uint32_t>(half) << 16);
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline uint16_t bfloat16_from_float(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : rounded);
}

inline float float_from_float16(uint16_t half) {
    const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
    const float subnormal = as_float(0x3f000000u | (half & 0x3ffu)) - 0.5f;  // mantissa * 2^-24
    const float normal = as_float(magnitude + (112u << 23));
    const float special = as_float(magnitude | 0x7f800000u);  // infinity and NaN
    const float value = magnitude < (1u << 23)    ? subnormal
                        : magnitude < (31u << 23) ? normal
                                                  : special;
    return as_float(as_bits(value) | static_cast<uint32_t>(half & 0x8000u) << 16);
}

inline uint16_t float16_from_float(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Adding 0.5 leaves the value in units of 2^-24, the spacing of fp16 subnormals, rounded by the
    // hardware.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t half = magnitude >= 0x47800000u  ? special
                          : magnitude < 0x38800000u ? subnormal
                                                    : normal;
    return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

// Reads `count` elements of a row, starting at element `begin`, as fp32.
inline void load(int32_t dtype, const void* row, int64_t begin, int64_t count, float* out) {
    if (dtype == hero::FLOAT32) {
        memcpy(out, static_cast<const float*>(row) + begin, count * sizeof(float));
        return;
    }
    const uint16_t* halves = static_cast<const uint16_t*>(row) + begin;
    if (dtype == hero::BFLOAT16) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[i] = float_from_bfloat16(halves[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[i] = float_from_float16(halves[i]);
    }
}

// Writes `count` fp32 values to a row, starting at element `begin`.
inline void store(int32_t dtype, const float* values, int64_t begin, int64_t count, void* row) {
    if (dtype == hero::FLOAT32) {
        memcpy(static_cast<float*>(row) + begin, values, count * sizeof(float));
        return;
    }
    uint16_t* halves = static_cast<uint16_t*>(row) + begin;
    if (dtype == hero::BFLOAT16) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) halves[i] = bfloat16_from_float(values[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) halves[i] = float16_from_float(values[i]);
    }
}

// Zeroes elements [begin, end) of a row; all storage types write zero as zero bits.
inline void clear(int32_t dtype, int64_t begin, int64_t end, void* row) {
    const int64_t size = dtype == hero::FLOAT32 ? 4 : 2;
    memset(static_cast<char*>(row) + begin * size, 0, (end - begin) * size);
}

}  // namespace
