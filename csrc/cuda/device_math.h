// Elementary functions of the row kernel for ../formulas.h, with the hardware's 2^x where nothing
// cancels. A NaN gives a NaN.
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

}  // namespace hero

#define HERO_FUNCTION HERO_DEVICE
#include "../formulas.h"

namespace hero {

// e^x - 1; infinite above 88.
HERO_DEVICE float exponential_minus_1(float x) {
    const float near = x + x * x * quadratic_remainder(x);
    return magnitude(x) <= CLOSE_LOG_RATIO ? near : exponential(x) - 1.0f;
}
HERO_DEVICE BothExponentials both_exponentials(float x) {
    return {exponential(x), exponential_minus_1(x)};
}

}  // namespace hero
