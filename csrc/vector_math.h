// Elementary functions without branches or tables, written so that a compiler turns a loop over
// them into vector code. Errors are a few units in the last place *of the result*, also where the
// result is close to zero: the divergences are sums of such small results. A NaN argument gives a
// NaN.
//
// Everything lives in an unnamed namespace: this header is compiled once for each instruction set,
// and shared inline functions would let the linker pick the AVX-512 copy for a machine that has
// none.
#pragma once

#include "storage.h"

namespace {

// Clamps that let a NaN through (fminf and fmaxf would swallow it).
inline float at_least(float x, float low) {
    return x < low ? low : x;
}
inline float at_most(float x, float high) {
    return x > high ? high : x;
}
inline float magnitude(float x) {
    return as_float(as_bits(x) & 0x7fffffffu);
}
inline float with_sign(float size, float sign) {
    return as_float((as_bits(size) & 0x7fffffffu) | (as_bits(sign) & 0x80000000u));
}

// Polynomials are evaluated in pairs (Estrin): the loops are bound by the latency of dependent
// operations.

// (e^x - 1 - x) / x^2 for |x| <= 1: its Taylor series, sum of x^k / (k+2)!. Relative error below
// 1e-7.
inline float quadratic_remainder(float x) {
    const float x2 = x * x;
    const float x4 = x2 * x2;
    const float c01 = 1.0f / 2.0f + x * (1.0f / 6.0f);
    const float c23 = 1.0f / 24.0f + x * (1.0f / 120.0f);
    const float c45 = 1.0f / 720.0f + x * (1.0f / 5040.0f);
    const float c67 = 1.0f / 40320.0f + x * (1.0f / 362880.0f);
    const float c8 = 1.0f / 3628800.0f;
    return (c01 + x2 * c23) + x4 * ((c45 + x2 * c67) + x4 * c8);
}

// e^x = power * (1 + rest), power a power of two, |rest| < 0.42. Valid for -87 <= x <= 88.
struct Exponential {
    float power, rest;
};

inline Exponential split_exponential(float x) {
    // Adding 1.5 * 2^23 rounds x/ln 2 to an integer, which then sits in the low bits.
    const float magic = 12582912.0f;
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    // ln 2 in two parts: n times the first is exact.
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    // The remainder's series again; |r| <= 0.35 needs fewer terms.
    const float r2 = r * r;
    const float c01 = 1.0f / 2.0f + r * (1.0f / 6.0f);
    const float c23 = 1.0f / 24.0f + r * (1.0f / 120.0f);
    const float c45 = 1.0f / 720.0f + r * (1.0f / 5040.0f);
    const float series = c01 + r2 * (c23 + r2 * c45);
    return {as_float((as_bits(shifted) << 23) + 0x3f800000u), r + r2 * series};
}

// e^x for x <= 88; exactly 0 below -87.
inline float exponential(float x) {
    const Exponential e = split_exponential(at_least(x, -87.0f));
    return x < -87.0f ? 0.0f : e.power + e.power * e.rest;
}

// e^x - 1 for x <= 88.
inline float exponential_minus_1(float x) {
    const Exponential e = split_exponential(at_least(x, -87.0f));
    return (e.power - 1.0f) + e.power * e.rest;
}

// log(1 + t) for -1 < t <= 0.
inline float log_1_plus(float t) {
    // 1 + t = 2^k * m with m in [sqrt(1/2), sqrt(2)); where k = 0 the fraction is t itself,
    // unrounded.
    const float u = 1.0f + t;
    const uint32_t offset = as_bits(u) + (0x3f800000u - 0x3f3504f3u);
    const int32_t k = static_cast<int32_t>(offset >> 23) - 127;
    const float m = as_float((offset & 0x7fffffu) + 0x3f3504f3u);
    const float f = k == 0 ? t : m - 1.0f;
    // log(1 + f) = 2 artanh(s), s = f / (2 + f), |s| < 0.172.
    const float s = f / (2.0f + f);
    const float z = s * s;
    const float series =
        (1.0f / 3.0f + z * (1.0f / 5.0f)) + z * z * (1.0f / 7.0f + z * (1.0f / 9.0f));
    return static_cast<float>(k) * 0.693147181f + (2.0f * s + 2.0f * s * z * series);
}

}  // namespace
