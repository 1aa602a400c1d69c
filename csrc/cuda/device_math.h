// Elementary functions of the row kernel, accurate relative to their result also near zero: the
// formulas of csrc/cpu/vector_math.h, with the hardware's 2^x where nothing cancels. A NaN gives a NaN.
#pragma once

#include "../constants.h"
#include "ptx.h"

namespace hero {

HERO_DEVICE float magnitude(float x) {
    return as_float(as_bits(x) & 0x7fffffffu);
}
HERO_DEVICE float with_sign(float size, float sign) {
    return as_float((as_bits(size) & 0x7fffffffu) | (as_bits(sign) & 0x80000000u));
}

// e^x; relative error |x| 2^-24, which counts little where x is far below 0.
HERO_DEVICE float exponential(float x) {
    return exp2_approx(x * LOG2_E);
}

// (e^x - 1 - x) / x^2 for |x| <= CLOSE_LOG_RATIO.
HERO_DEVICE float quadratic_remainder(float x) {
    const float x2 = x * x;
    const float x4 = x2 * x2;
    const float c01 = REMAINDER_0 + x * REMAINDER_1;
    const float c23 = REMAINDER_2 + x * REMAINDER_3;
    const float c45 = REMAINDER_4 + x * REMAINDER_5;
    const float c67 = REMAINDER_6 + x * REMAINDER_7;
    return (c01 + x2 * c23) + x4 * ((c45 + x2 * c67) + x4 * REMAINDER_8);
}

// e^x - 1; infinite above 88.
HERO_DEVICE float exponential_minus_1(float x) {
    const float near = x + x * x * quadratic_remainder(x);
    return magnitude(x) <= CLOSE_LOG_RATIO ? near : exponential(x) - 1.0f;
}

// log(1 + t) for t > -1, given both t and 1 + t: near t = 0 the one is exact, near -1 the other.
HERO_DEVICE float log_1_plus(float t, float one_plus_t) {
    // 1 + t = 2^k m with m in [sqrt(1/2), sqrt(2)); where k = 0 the fraction is t itself.
    const uint32_t offset = as_bits(one_plus_t) + (0x3f800000u - 0x3f3504f3u);
    const int32_t k = static_cast<int32_t>(offset >> 23) - 127;
    const float m = as_float((offset & 0x7fffffu) + 0x3f3504f3u);
    const float f = k == 0 ? t : m - 1.0f;
    // log(1 + f) = 2 artanh(s), s = f / (2 + f), |s| < 0.172.
    const float s = divide(f, 2.0f + f);
    const float z = s * s;
    const float series = (ARTANH_0 + z * ARTANH_1) + z * z * (ARTANH_2 + z * ARTANH_3);
    return static_cast<float>(k) * LN_2 + (2.0f * s + 2.0f * s * z * series);
}

// q - p - p x >= 0: the column's share of KL(p || q) where log q - log p = x.
HERO_DEVICE float kl_term(float p, float q, float x) {
    const float near = p * (x * x) * quadratic_remainder(x);
    return magnitude(x) <= CLOSE_LOG_RATIO ? near : (q - p) - p * x;
}

// The mixture m = beta p + (1 - beta) q, whose logarithm is formed from the side that gives most of
// it: from the student's where x exceeds the pivot, log(beta / (1 - beta)). There log m - log q is
// log1p of something at most 1, and cannot cancel against x.
struct Mixture {
    float beta, other, pivot;

    HERO_DEVICE Mixture(float beta, float one_minus_beta)
        : beta(beta),
          other(one_minus_beta),
          pivot(lowest(highest(logf(beta / one_minus_beta), -60.0f), 60.0f)) {}
};

// log m - log p and log m - log q, x = log q - log p.
struct LogMixture {
    float from_teacher, from_student;
};
HERO_DEVICE LogMixture log_mixture(float x, const Mixture& mixture) {
    const bool of_student = x > mixture.pivot;
    const float y = of_student ? -x : x;
    const float near = of_student ? mixture.other : mixture.beta;
    const float far = of_student ? mixture.beta : mixture.other;
    const float log_m = log_1_plus(far * exponential_minus_1(y), near + far * exponential(y));
    return {of_student ? x + log_m : log_m, of_student ? log_m : log_m - x};
}

}  // namespace hero
