// Elementary functions for formulas.h without branches or tables, of one float or of a vector of them
// (simd.h). Errors are a few units in the last place of the result. A NaN argument gives a NaN.
#pragma once

#include "../constants.h"
#include "simd.h"

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
    return as_float(as_bits(x) & 0x7fffffffu);
}
template <class T>
inline T with_sign(T size, T sign) {
    return as_float((as_bits(size) & 0x7fffffffu) | (as_bits(sign) & 0x80000000u));
}

template <class T>
inline T divide(T a, T b) {
    return a / b;
}
template <class T>
struct BothExponentials {
    T exponential, minus_1;
};

// e^x and e^x - 1 for x <= 88, each accurate relative to itself; e^x is exactly 0 below -88.
template <class T>
inline BothExponentials<T> both_exponentials(T x) {
    using namespace hero;
    x = at_least(x, -88.0f);
    // Adding 1.5 * 2^23 rounds x/ln 2 to an integer, which then sits in the low bits.
    const float magic = 12582912.0f;
    const T shifted = x * LOG2_E + magic;
    const T n = shifted - magic;
    const T r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    // Taylor's series of e^r - 1; |r| <= 0.35.
    const T r2 = r * r;
    const T c01 = r * (1.0f / 6.0f) + 1.0f / 2.0f;
    const T c23 = r * (1.0f / 120.0f) + 1.0f / 24.0f;
    const T c45 = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
    const T series = c01 + r2 * (c23 + r2 * c45);
    // 2^n from its bits; at the low end these are -127 + 127 = 0, the bits of 0.
    const T power = as_float((as_bits(shifted) << 23) + 0x3f800000u);
    const T fraction = power * (r + r2 * series);
    return {power + fraction, (power - 1.0f) + fraction};
}
template <class T>
inline T exponential(T x) {
    return both_exponentials(x).exponential;
}
template <class T>
inline T exponential_minus_1(T x) {
    return both_exponentials(x).minus_1;
}


// The sum of c[k] t^k, at most 12 terms, in pairs as in formulas.h.
template <int terms, class T>
inline T power_series(const float* c, T t) {
    static_assert(terms > 8 && terms % 2 == 0 && terms <= 12, "what is summed here");
    const T t2 = t * t, t4 = t2 * t2;
    const auto two = [c, t](int k) { return c[k] + t * c[k + 1]; };
    T last = two(8);
    if (terms == 12) last += t2 * two(10);
    return (two(0) + t2 * two(2)) + t4 * ((two(4) + t2 * two(6)) + t4 * last);
}

}  // namespace

#define HERO_FUNCTION inline
#include "../formulas.h"
