// A vector of floats as wide as the instruction set this file is compiled for, by the vector
// extensions of GCC and Clang: the loops of the row kernel are vector code by construction, not by
// the grace of an auto-vectoriser.
//
// Arithmetic and comparisons are lane by lane; `mask ? a : b` selects by the result of a comparison.
#pragma once

#include <stdint.h>
#include <string.h>

#include "storage.h"

#if defined(__AVX512F__)
#define HERO_LANES 16
#elif defined(__AVX__)
#define HERO_LANES 8
#else
#define HERO_LANES 4
#endif

namespace {

typedef float Floats __attribute__((vector_size(4 * HERO_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * HERO_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * HERO_LANES)));

// Columns a pass may read and write beyond the end of a row: scratch rows are padded to it.
constexpr int64_t LANES = HERO_LANES;

inline Floats load_floats(const float* memory) {
    Floats value;
    memcpy(&value, memory, sizeof value);
    return value;
}

inline void store_floats(float* memory, Floats value) {
    memcpy(memory, &value, sizeof value);
}

inline float sum_of(Floats value) {
    float total = 0;
    for (int i = 0; i < HERO_LANES; ++i) total += value[i];
    return total;
}

// Whether some lane is not 0.
inline bool any(Ints mask) {
    int32_t found = 0;
    for (int i = 0; i < HERO_LANES; ++i) found |= mask[i];
    return found != 0;
}

// The same for one float (storage.h) and for a vector of them, so that formulas are written once.
inline Words as_bits(Floats value) {
    return (Words)value;
}
inline Floats as_float(Words bits) {
    return (Floats)bits;
}
inline float to_float(uint32_t value) {
    return static_cast<float>(static_cast<int32_t>(value));
}
inline Floats to_float(Words value) {
    return __builtin_convertvector((Ints)value, Floats);
}
inline float choose(bool mask, float yes, float no) {
    return mask ? yes : no;
}
inline Floats choose(Ints mask, Floats yes, Floats no) {
    return mask ? yes : no;
}

}  // namespace
