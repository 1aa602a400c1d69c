// Elementary functions without branches or tables, of one float or of a vector of them (simd.h).
// Errors are a few units in the last place *of the result*, also where the result is close to zero:
// the divergences are sums of such small results. A NaN argument gives a NaN.
//
// Everything lives in an unnamed namespace: this header is compiled once for each instruction set,
// and shared inline functions would let the linker pick the AVX-512 copy for a machine that has
// none.
#pragma once

#include "simd.h"
#include "storage.h"

namespace {

// A constant in every lane.
template <class T>
inline T all(float value) {
    return T{} + value;
}

// Clamps that let a NaN through (fminf and fmaxf would swallow it).
template <class T>
inline T at_least(T x, float low) {
    return choose(x < low, all<T>(low), x);
}
template <class T>
inline T at_most(T x, float high) {
    return choose(x > high, all<T>(high), x);
}
template <class T>
inline T magnitude(T x) {
    return from_words(as_words(x) & 0x7fffffffu);
}
template <class T>
inline T with_sign(T size, T sign) {
    return from_words((as_words(size) & 0x7fffffffu) | (as_words(sign) & 0x80000000u));
}

// Polynomials are evaluated in pairs (Estrin): the loops are bound by the latency of dependent
// operations.

// (e^x - 1 - x) / x^2 for |x| <= 1: its Taylor series, sum of x^k / (k+2)!. Relative error below
// 1e-7.
template <class T>
inline T quadratic_remainder(T x) {
    const T x2 = x * x;
    const T x4 = x2 * x2;
    const T c01 = x * (1.0f / 6.0f) + 1.0f / 2.0f;
    const T c23 = x * (1.0f / 120.0f) + 1.0f / 24.0f;
    const T c45 = x * (1.0f / 5040.0f) + 1.0f / 720.0f;
    const T c67 = x * (1.0f / 362880.0f) + 1.0f / 40320.0f;
    const T c8 = x2 * (1.0f / 3628800.0f) + c67;
    return (c01 + x2 * c23) + x4 * (c45 + x2 * c8);
}

// e^x = power * (1 + rest), power a power of two, |rest| < 0.42. Valid for -87 <= x <= 88.
template <class T>
struct Exponential {
    T power, rest;
};

template <class T>
inline Exponential<T> split_exponential(T x) {
    // Adding 1.5 * 2^23 rounds x/ln 2 to an integer, which then sits in the low bits.
    const float magic = 12582912.0f;
    const T shifted = x * 1.44269504f + magic;
    const T n = shifted - magic;
    // ln 2 in two parts: n times the first is exact.
    const T r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    // The remainder's series again; |r| <= 0.35 needs fewer terms.
    const T r2 = r * r;
    const T c01 = r * (1.0f / 6.0f) + 1.0f / 2.0f;
    const T c23 = r * (1.0f / 120.0f) + 1.0f / 24.0f;
    const T c45 = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
    const T series = c01 + r2 * (c23 + r2 * c45);
    return {from_words((as_words(shifted) << 23) + 0x3f800000u), r + r2 * series};
}

// e^x for x <= 88; exactly 0 below -87.
template <class T>
inline T exponential(T x) {
    const Exponential<T> e = split_exponential(at_least(x, -87.0f));
    return choose(x < -87.0f, all<T>(0.0f), e.power + e.power * e.rest);
}

// e^x - 1 for x <= 88.
template <class T>
inline T exponential_minus_1(T x) {
    const Exponential<T> e = split_exponential(at_least(x, -87.0f));
    return (e.power - 1.0f) + e.power * e.rest;
}

// log(1 + t) for -1 < t <= 0.
template <class T>
inline T log_1_plus(T t) {
    // 1 + t = 2^k * m with m in [sqrt(1/2), sqrt(2)); where k = 0 the fraction is t itself,
    // unrounded.
    const auto offset = as_words(1.0f + t) + (0x3f800000u - 0x3f3504f3u);
    const auto k = (offset >> 23) - 127u;
    const T m = from_words((offset & 0x7fffffu) + 0x3f3504f3u);
    const T f = choose(k == 0u, t, m - 1.0f);
    // log(1 + f) = 2 artanh(s), s = f / (2 + f), |s| < 0.172.
    const T s = f / (2.0f + f);
    const T z = s * s;
    const T series =
        (1.0f / 3.0f + z * (1.0f / 5.0f)) + z * z * (1.0f / 7.0f + z * (1.0f / 9.0f));
    return to_float(k) * 0.693147181f + (2.0f * s + 2.0f * s * z * series);
}

}  // namespace
