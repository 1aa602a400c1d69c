// The formulas of both row kernels, for a float or a vector of them: accurate relative to the
// result, also where it is close to zero. A NaN gives a NaN.
//
// Who includes this file defines HERO_FUNCTION and, for the type T, as_bits, as_float, to_float,
// choose, magnitude, with_sign, divide, exponential, exponential_minus_1, both_exponentials, and
// power_series<terms>(coefficients, t). All of it lives in an unnamed namespace: shared inline functions would let the linker pick the AVX-512
// copy for a machine that has none.
#pragma once

#include "constants.h"

namespace hero {
namespace {

// (e^x - 1 - x) / x^2 for |x| <= CLOSE_LOG_RATIO. In pairs (Estrin): the loops are bound by the
// latency of dependent operations.
template <class T>
HERO_FUNCTION T quadratic_remainder(T x) {
    const T x2 = x * x;
    const T x4 = x2 * x2;
    const T c01 = x * REMAINDER_1 + REMAINDER_0;
    const T c23 = x * REMAINDER_3 + REMAINDER_2;
    const T c46 = x2 * REMAINDER_6 + (x * REMAINDER_5 + REMAINDER_4);
    return (c01 + x2 * c23) + x4 * c46;
}

// log(1 + t) for t > -1, given both t and 1 + t: near t = 0 the one is exact, near -1 the other.
template <class T>
HERO_FUNCTION T log_1_plus(T t, T one_plus_t) {
    // 1 + t = 2^k m with m in [sqrt(1/2), sqrt(2)); where k = 0 the fraction is t itself.
    const auto offset = as_bits(one_plus_t) + (0x3f800000u - 0x3f3504f3u);
    const auto k = (offset >> 23) - 127u;
    const T m = as_float((offset & 0x7fffffu) + 0x3f3504f3u);
    const T f = choose(k == 0u, t, m - 1.0f);
    const T f2 = f * f;
    const T f4 = f2 * f2;
    const T c12 = f * LOGARITHM_2 + LOGARITHM_1;
    const T c34 = f * LOGARITHM_4 + LOGARITHM_3;
    const T c56 = f * LOGARITHM_6 + LOGARITHM_5;
    const T c78 = f * LOGARITHM_8 + LOGARITHM_7;
    const T series = (c12 + f2 * c34) + f4 * (c56 + f2 * c78);
    return to_float(k) * LN_2 + (f + f2 * series);  // f last: it is the result where f is small
}

// F(p, q, x) = q - p - p x >= 0: the column's share of KL(p || q) where log q - log p = x.
template <class T>
HERO_FUNCTION T kl_term(T p, T q, T x) {
    const T near = p * (x * x) * quadratic_remainder(x);
    const T far = (q - p) - p * x;
    return choose(magnitude(x) <= CLOSE_LOG_RATIO, near, far);
}

// The mixture m = beta p + other q of the JSD, other = 1 - beta, whose logarithm is formed from the
// side that gives most of it: from the student's where x exceeds the pivot, log(beta / other). There
// log m - log q is log1p of something at most 1, and cannot cancel against x.
struct Mixture {
    float beta, other, pivot;

    HERO_FUNCTION Mixture(float beta, float other) : beta(beta), other(other) {
        const float log_odds = logf(beta / other);
        pivot = log_odds < -60.0f ? -60.0f : log_odds > 60.0f ? 60.0f : log_odds;
    }
    HERO_FUNCTION bool even() const {
        return beta == 0.5f && other == 0.5f;
    }
};

// log m - log p and log m - log q, x = log q - log p.
template <class T>
struct LogMixture {
    T from_teacher, from_student;
};
template <class T>
HERO_FUNCTION LogMixture<T> log_mixture(T x, const Mixture& mixture) {
    const auto of_student = x > mixture.pivot;
    const auto e = both_exponentials(choose(of_student, -x, x));
    const T beta = T{} + mixture.beta, other = T{} + mixture.other;
    const T near = choose(of_student, other, beta), far = choose(of_student, beta, other);
    const T log_m = log_1_plus(far * e.minus_1, near + far * e.exponential);
    return {choose(of_student, x + log_m, log_m), choose(of_student, log_m, log_m - x)};
}

// The JSD of beta = 1/2 without exponential and logarithm, for |x| <= EVEN_LIMIT. With y = x / 2
//
//   log m - log p = y + log cosh y           log m - log q = -y + log cosh y
//   the column's share of the JSD = m (y tanh y - log cosh y)
//
// where both functions of y are x^2 times a series in x^2: Chebyshev interpolation, in fp32 within
// 2e-7 and 6e-7 of themselves. A teacher with a hint keeps 19 of 20 groups of 64 columns within the
// limit, and 1 of 70 within CLOSE_LOG_RATIO (benchmarks/log_ratios.py).
constexpr float EVEN_LIMIT = 3.5f;

// log cosh y over x^2; t = x^2.
template <class T>
HERO_FUNCTION T even_log_cosh(T t) {
    const float log_cosh[] = {0.125f,          -5.20829204e-3f, 3.47108347e-4f, -2.62263038e-5f,
                              2.0632956e-6f,   -1.55167299e-7f, 9.93059324e-9f, -4.72137551e-10f,
                              1.41209917e-11f, -1.94200233e-13f};
    return power_series<10>(log_cosh, t);
}

// log q - log m; t = x^2.
template <class T>
HERO_FUNCTION T even_bracket(T x, T t) {
    return x * (0.5f - x * even_log_cosh(t));
}

// The column's share over m; t = x^2.
template <class T>
HERO_FUNCTION T even_share(T t) {
    const float share[] = {0.125f,           -1.56249646e-2f, 1.73597177e-3f, -1.8424078e-4f,
                           1.90358987e-5f,   -1.8890629e-6f,  1.71703519e-7f, -1.32661402e-8f,
                           7.98542454e-10f,  -3.39595956e-11f, 8.89915854e-13f, -1.06851478e-14f};
    return t * power_series<12>(share, t);
}

// c tanh(z / c) in place for the teacher's logit and for what is stored of the student; returns the
// slope d z_s / d raw. Of a delta the result is one too, as a product of small factors instead of a
// difference: tanh u - tanh v = sinh(u - v) / (cosh u cosh v).
template <class T>
HERO_FUNCTION T soft_cap(float cap, bool delta, T& teacher, T& stored) {
    const T v = divide(teacher, T{} + cap), d = divide(stored, T{} + cap);
    const T u = delta ? v + d : d;
    const T ev = exponential_minus_1(-2.0f * magnitude(v));
    const T ed = exponential_minus_1(-2.0f * magnitude(d));
    const T fall = exponential(-2.0f * magnitude(u));  // 1 + (e^-2|u| - 1) would cancel
    const T exponent = magnitude(d) - magnitude(u) - magnitude(v);
    const T decay = exponential(choose(exponent > 0.0f, T{}, exponent));
    const T difference = divide(-2.0f * ed * decay, (1.0f + fall) * (2.0f + ev));
    teacher = cap * with_sign(divide(ev, 2.0f + ev), v);
    stored = cap * with_sign(delta ? difference : divide(ed, 2.0f + ed), d);
    return divide(4.0f * fall, (1.0f + fall) * (1.0f + fall));
}

}  // namespace
}  // namespace hero
