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

// (e^x - 1 - x) / x^2 for |x| <= CLOSE_LOG_RATIO.
template <class T>
inline T quadratic_remainder(T x) {
    using namespace hero;
    const T x2 = x * x;
    const T x4 = x2 * x2;
    const T c01 = x * REMAINDER_1 + REMAINDER_0;
    const T c23 = x * REMAINDER_3 + REMAINDER_2;
    const T c45 = x * REMAINDER_5 + REMAINDER_4;
    const T c67 = x * REMAINDER_7 + REMAINDER_6;
    const T c8 = x2 * REMAINDER_8 + c67;
    return (c01 + x2 * c23) + x4 * (c45 + x2 * c8);
}

// e^x = power * (1 + rest), power a power of two, |rest| < 0.42. Valid for -88 <= x <= 88; at the low
// end power is 2^-127, whose bits are those of 0.
template <class T>
struct Exponential {
    T power, rest;
};

template <class T>
inline Exponential<T> split_exponential(T x) {
    using namespace hero;
    // Adding 1.5 * 2^23 rounds x/ln 2 to an integer, which then sits in the low bits.
    const float magic = 12582912.0f;
    const T shifted = x * LOG2_E + magic;
    const T n = shifted - magic;
    const T r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    // The remainder's series again; |r| <= 0.35 needs fewer terms.
    const T r2 = r * r;
    const T c01 = r * REMAINDER_1 + REMAINDER_0;
    const T c23 = r * REMAINDER_3 + REMAINDER_2;
    const T c45 = r * REMAINDER_5 + REMAINDER_4;
    const T series = c01 + r2 * (c23 + r2 * c45);
    return {from_words((as_words(shifted) << 23) + 0x3f800000u), r + r2 * series};
}

// e^x and e^x - 1 for x <= 88, each accurate relative to itself; e^x is exactly 0 below -88.
template <class T>
struct BothExponentials {
    T exponential, minus_1;
};
template <class T>
inline BothExponentials<T> both_exponentials(T x) {
    const Exponential<T> e = split_exponential(at_least(x, -88.0f));
    const T fraction = e.power * e.rest;
    return {e.power + fraction, (e.power - 1.0f) + fraction};
}
template <class T>
inline T exponential(T x) {
    return both_exponentials(x).exponential;
}
template <class T>
inline T exponential_minus_1(T x) {
    return both_exponentials(x).minus_1;
}

// log(1 + t) for t > -1, given both t and 1 + t: near t = 0 the one is exact, near -1 the other.
template <class T>
inline T log_1_plus(T t, T one_plus_t) {
    using namespace hero;
    // 1 + t = 2^k * m with m in [sqrt(1/2), sqrt(2)); where k = 0 the fraction is t itself.
    const auto offset = as_words(one_plus_t) + (0x3f800000u - 0x3f3504f3u);
    const auto k = (offset >> 23) - 127u;
    const T m = from_words((offset & 0x7fffffu) + 0x3f3504f3u);
    const T f = choose(k == 0u, t, m - 1.0f);
    // log(1 + f) = 2 artanh(s), s = f / (2 + f), |s| < 0.172.
    const T s = f / (2.0f + f);
    const T z = s * s;
    const T series = (ARTANH_0 + z * ARTANH_1) + z * z * (ARTANH_2 + z * ARTANH_3);
    return to_float(k) * LN_2 + (2.0f * s + 2.0f * s * z * series);
}

}  // namespace
