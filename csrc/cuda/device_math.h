// Elementary functions of the row kernel for ../formulas.h, with the hardware's 2^x where nothing
// cancels. A NaN gives a NaN.
#pragma once

#include "../constants.h"
#include "ptx.h"

namespace hero {

HERO_DEVICE float magnitude(float x) {
    return fabsf(x);  // costs nothing: a modifier of the instruction that takes it
}
HERO_DEVICE float with_sign(float size, float sign) {
    return as_float((as_bits(size) & 0x7fffffffu) | (as_bits(sign) & 0x80000000u));
}
HERO_DEVICE float choose(bool mask, float yes, float no) {
    return mask ? yes : no;
}
HERO_DEVICE float to_float(uint32_t value) {
    return static_cast<float>(static_cast<int32_t>(value));
}

struct BothExponentials {
    float exponential, minus_1;  // e^x and e^x - 1
};
HERO_DEVICE BothExponentials both_exponentials(float x);
HERO_DEVICE float exponential_minus_1(float x);
// e^x; relative error |x| 2^-24, which counts little where x is far below 0.
HERO_DEVICE float exponential(float x) {
    return exp2_approx(x * LOG2_E);
}

// e^x - 1 and, without cancellation, e^x - 1 - x, for |x| <= CLOSE_LOG_RATIO. Horner's way has the
// fewest instructions; other warps hide that each waits for the one before.
struct NearExponential {
    float minus_1, minus_1_minus_x;
};
HERO_DEVICE NearExponential near_exponential(float x) {
    float sum = REMAINDER_6;
    sum = sum * x + REMAINDER_5;
    sum = sum * x + REMAINDER_4;
    sum = sum * x + REMAINDER_3;
    sum = sum * x + REMAINDER_2;
    sum = sum * x + REMAINDER_1;
    sum = sum * x + REMAINDER_0;
    const float square = x * x;
    return {square * sum + x, square * sum};
}

template <int terms>
HERO_DEVICE float power_series(const float* c, float t) {
    float sum = c[terms - 1];
    HERO_UNROLL
    for (int k = terms - 2; k >= 0; --k) sum = sum * t + c[k];
    return sum;
}

}  // namespace hero

#define HERO_FUNCTION HERO_DEVICE
#include "../formulas.h"

namespace hero {

// 2 sinh(x / 2) / x for |x| <= EVEN_LIMIT, within 8e-8 of itself; t = x^2.
HERO_DEVICE float even_sinh(float t) {
    const float sinh[] = {1.0f, 4.1666612e-2f, 5.20870148e-4f, 3.09182224e-6f, 1.15381944e-8f};
    return power_series<5>(sinh, t);
}

// e^x - 1; infinite above 88.
HERO_DEVICE float exponential_minus_1(float x) {
    return magnitude(x) <= CLOSE_LOG_RATIO ? near_exponential(x).minus_1 : exponential(x) - 1.0f;
}
HERO_DEVICE BothExponentials both_exponentials(float x) {
    return {exponential(x), exponential_minus_1(x)};
}

}  // namespace hero
