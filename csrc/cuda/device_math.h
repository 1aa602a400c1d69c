// Elementary functions of the row kernel, accurate relative to their result also near zero: the
// formulas of csrc/vector_math.h, with the hardware's 2^x where nothing cancels. A NaN gives a NaN.
#pragma once

#include "platform.h"

namespace hero {

constexpr float LOG2_E = 1.44269504f;

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

// (e^x - 1 - x) / x^2 for |x| <= 1: its Taylor series. Relative error below 1e-7.
HERO_DEVICE float quadratic_remainder(float x) {
    const float x2 = x * x;
    const float x4 = x2 * x2;
    const float c01 = 1.0f / 2.0f + x * (1.0f / 6.0f);
    const float c23 = 1.0f / 24.0f + x * (1.0f / 120.0f);
    const float c45 = 1.0f / 720.0f + x * (1.0f / 5040.0f);
    const float c67 = 1.0f / 40320.0f + x * (1.0f / 362880.0f);
    const float c8 = 1.0f / 3628800.0f;
    return (c01 + x2 * c23) + x4 * ((c45 + x2 * c67) + x4 * c8);
}

// e^x - 1; infinite above 88.
HERO_DEVICE float exponential_minus_1(float x) {
    const float near = x + x * x * quadratic_remainder(x);
    return magnitude(x) <= 1.0f ? near : exponential(x) - 1.0f;
}

// log(1 + t) for t > -1.
HERO_DEVICE float log_1_plus(float t) {
    // 1 + t = 2^k m with m in [sqrt(1/2), sqrt(2)); where k = 0 the fraction is t itself,
    // unrounded.
    const uint32_t offset = as_bits(1.0f + t) + (0x3f800000u - 0x3f3504f3u);
    const int32_t k = static_cast<int32_t>(offset >> 23) - 127;
    const float m = as_float((offset & 0x7fffffu) + 0x3f3504f3u);
    const float f = k == 0 ? t : m - 1.0f;
    // log(1 + f) = 2 artanh(s), s = f / (2 + f), |s| < 0.172.
    const float s = divide(f, 2.0f + f);
    const float z = s * s;
    const float series =
        (1.0f / 3.0f + z * (1.0f / 5.0f)) + z * z * (1.0f / 7.0f + z * (1.0f / 9.0f));
    return static_cast<float>(k) * 0.693147181f + (2.0f * s + 2.0f * s * z * series);
}

// q - p - p x >= 0: the column's share of KL(p || q) where log q - log p = x.
HERO_DEVICE float kl_term(float p, float q, float x) {
    const float near = p * (x * x) * quadratic_remainder(x);
    return magnitude(x) <= 1.0f ? near : (q - p) - p * x;
}

// log m - log p and log m - log q of the mixture m = beta p + (1 - beta) q, x = log q - log p.
struct LogMixture {
    float from_teacher, from_student;
};
HERO_DEVICE LogMixture log_mixture(float x, float beta) {
    // From the more probable side: there the logarithm's argument is in (-1, 0].
    const bool is_student = x > 0.0f;
    const float weight = is_student ? beta : 1.0f - beta;
    const float to_mixture = log_1_plus(weight * exponential_minus_1(-magnitude(x)));
    return {is_student ? x + to_mixture : to_mixture, is_student ? to_mixture : to_mixture - x};
}

}  // namespace hero
