// From the stored row in shared memory to fp32 logits and their log ratio, eight columns a thread;
// and back to the stored gradient.
//
// z = cap((raw + bias) * logit_scale) * inv_temperature, cap(z) = softcap * tanh(z / softcap).
#pragma once

#include "device_math.h"
#include "plan.h"

namespace hero {

// Which columns a thread works on: adjacent ones where rows can be read in pieces of 16 bytes, else
// every 32nd, so that the threads of a warp read adjacent ones.
struct Lanes {
    int offset, step;

    HERO_DEVICE explicit Lanes(const Plan& plan)
        : offset(thread_index() % 32 * (plan.vectors ? COLUMNS_PER_THREAD : 1)),
          step(plan.vectors ? 1 : 32) {}
};

// Where eight columns of a thread are.
struct Place {
    char *teacher, *student;  // column 0 of the tile, in its stage
    int in_tile, column;      // the thread's first, within the tile and within the row
    bool inside;              // the warp's columns are all real
};

struct Logits {
    float teacher[COLUMNS_PER_THREAD];    // z_t
    float student[COLUMNS_PER_THREAD];    // z_s
    float log_ratio[COLUMNS_PER_THREAD];  // z_s - z_t
    float slope[COLUMNS_PER_THREAD];      // d z_s / d raw, without its constant factor
    bool plain;  // known to the compiler: all columns are real and the slope is 1
};

// As stored, in fp32.
struct Raw {
    float teacher[COLUMNS_PER_THREAD], student[COLUMNS_PER_THREAD];
};

struct alignas(16) Words {
    uint32_t word[4];
};

HERO_DEVICE float from_half(int32_t dtype, uint32_t bits) {
    return dtype == BFLOAT16 ? as_float(bits << 16) : float_from_half(bits);
}

// Eight adjacent stored numbers as fp32, read in pieces of 16 bytes.
HERO_DEVICE void load_pieces(const char* tile, int32_t dtype, int column, float* out) {
    if (dtype == FLOAT32) {
        const Words* pieces = reinterpret_cast<const Words*>(tile + column * 4);
        const Words first = load_shared(pieces), second = load_shared(pieces + 1);
        HERO_UNROLL
        for (int i = 0; i < COLUMNS_PER_THREAD; ++i)
            out[i] = as_float(i < 4 ? first.word[i] : second.word[i - 4]);
        return;
    }
    const Words piece = load_shared(reinterpret_cast<const Words*>(tile + column * 2));
    if (dtype == BFLOAT16) {
        HERO_UNROLL
        for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
            const uint32_t both = piece.word[i / 2];
            out[i] = as_float(i % 2 ? both & 0xffff0000u : both << 16);
        }
    } else {
        HERO_UNROLL
        for (int i = 0; i < COLUMNS_PER_THREAD; ++i)
            out[i] = float_from_half(piece.word[i / 2] >> i % 2 * 16 & 0xffffu);
    }
}

// Eight stored numbers as fp32. `tile` is where column 0 of the tile lies, `column` the thread's
// first within the tile.
HERO_DEVICE void load_stored(const char* tile, int32_t dtype, int column, const Lanes& lanes,
                             float* out) {
    const bool half = dtype != FLOAT32;
    if (lanes.step == 1) {
        load_pieces(tile, dtype, column, out);
        return;
    }
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const int at = column + i * lanes.step;
        out[i] = half ? from_half(dtype, load_shared(reinterpret_cast<const uint16_t*>(tile) + at))
                      : load_shared(reinterpret_cast<const float*>(tile) + at);
    }
}

// What a row's transform has of its own.
struct Scaling {
    float absolute;  // with delta, 1 where the row's student holds raw logits all the same, else 0
    float inv_temperature;
    float inner;  // before the soft cap
    float log2_inner;
    bool plain;   // the transform is a factor > 0, and the row's gradient is wanted

    HERO_DEVICE Scaling(const RowsProblem& problem, const Lanes& lanes, int row)
        : absolute(problem.delta && problem.absolute_rows && problem.absolute_rows[row] ? 1.0f
                                                                                        : 0.0f),
          inv_temperature(problem.temperatures ? 1.0f / problem.temperatures[row]
                                               : problem.inv_temperature),
          inner(problem.logit_scale * (problem.softcap > 0 ? 1.0f : inv_temperature)),
          log2_inner(inner * LOG2_E),
          plain(lanes.step == 1 && problem.teacher_dtype == FLOAT32 && !problem.teacher_bias &&
                !problem.student_bias && !(problem.softcap > 0) && absolute == 0.0f &&
                inner > 0.0f && problem.row_weights[row] != 0.0f) {}
};

// Raw stored numbers of one column -> z_t, z_s, z_s - z_t and the slope.
template <bool delta>
HERO_DEVICE void transform(const RowsProblem& problem, const Scaling& scaling, int column,
                           float raw_t, float raw_s, float& teacher, float& student,
                           float& log_ratio, float& slope) {
    if (delta) raw_s -= scaling.absolute * raw_t;
    if (problem.teacher_bias) {
        const float bias = problem.teacher_bias[column];
        raw_t += bias;
        // The difference of the biases first: a shared one cancels exactly.
        if (delta) raw_s += (problem.student_bias ? problem.student_bias[column] : 0.0f) - bias;
    }
    if (problem.student_bias && !(delta && problem.teacher_bias))
        raw_s += problem.student_bias[column];
    // A masked column is masked for both, whatever the GEMM made of its delta.
    if (delta) raw_s = raw_t < MASKED ? 0.0f : raw_s;
    raw_t *= scaling.inner;
    raw_s *= scaling.inner;
    slope = 1.0f;
    if (problem.softcap > 0) {
        slope = soft_cap(problem.softcap, delta, raw_t, raw_s);
        raw_t *= scaling.inv_temperature;
        raw_s *= scaling.inv_temperature;
    }
    teacher = highest(raw_t, MASKED);
    student = highest(delta ? teacher + raw_s : raw_s, MASKED);
    log_ratio = delta ? raw_s : student - teacher;
}

// Whether no logit of the warp is masked; with delta that is the teacher's to say.
template <bool delta>
HERO_DEVICE bool none_masked(const Raw& raw) {
    float least = raw.teacher[0];
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i)
        least = lowest(least, delta ? raw.teacher[i] : lowest(raw.teacher[i], raw.student[i]));
    return all_of_warp(least >= MASKED);  // false of a NaN
}

// Raw logits of a plain row, all real and none masked, as what they stand for.
template <bool delta>
HERO_DEVICE Logits plain_logits(const Raw& raw, const Scaling& scaling) {
    Logits logits;
    logits.plain = true;
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const float stored = raw.student[i] * scaling.inner;
        logits.teacher[i] = raw.teacher[i] * scaling.inner;
        logits.student[i] = delta ? logits.teacher[i] + stored : stored;
        logits.log_ratio[i] = delta ? stored : stored - logits.teacher[i];
        logits.slope[i] = 1.0f;
    }
    return logits;
}

// The thread's columns of a tile; those from `vocab_size` on count as masked.
template <bool delta>
HERO_DEVICE Logits load_logits(const RowsProblem& problem, const Lanes& lanes,
                               const Scaling& scaling, const Place& place) {
    Logits logits;
    logits.plain = false;
    load_stored(place.teacher, problem.teacher_dtype, place.in_tile, lanes, logits.teacher);
    load_stored(place.student, problem.student_dtype, place.in_tile, lanes, logits.student);
    const int vocab_size = static_cast<int>(problem.vocab_size);
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const int at = place.column + i * lanes.step;
        if (at < vocab_size) {
            transform<delta>(problem, scaling, at, logits.teacher[i], logits.student[i],
                             logits.teacher[i], logits.student[i], logits.log_ratio[i],
                             logits.slope[i]);
        } else {
            logits.teacher[i] = logits.student[i] = MASKED;
            logits.log_ratio[i] = 0.0f;
            logits.slope[i] = 1.0f;
        }
    }
    return logits;
}

// Writes adjacent columns of a row, all within it, in pieces of 16 bytes.
HERO_DEVICE void store_pieces(int32_t dtype, char* row, int column, const float* values) {
    Words first, second;
    if (dtype == BFLOAT16) {
        HERO_UNROLL
        for (int i = 0; i < 4; ++i)
            first.word[i] = bfloat16x2(values[2 * i], values[2 * i + 1]);
    } else if (dtype == FLOAT16) {
        HERO_UNROLL
        for (int i = 0; i < 4; ++i) first.word[i] = float16x2(values[2 * i], values[2 * i + 1]);
    } else {
        HERO_UNROLL
        for (int i = 0; i < 4; ++i)
            first.word[i] = as_bits(values[i]), second.word[i] = as_bits(values[4 + i]);
    }
    const bool half = dtype != FLOAT32;
    Words* pieces =
        reinterpret_cast<Words*>(row + static_cast<int64_t>(column) * (half ? 2 : 4));
    pieces[0] = first;
    if (!half) pieces[1] = second;
}

HERO_DEVICE uint32_t pack(int32_t dtype, float first, float second) {
    return dtype == BFLOAT16 ? bfloat16x2(first, second) : float16x2(first, second);
}

// Writes the thread's columns of a row that ends with `columns`.
HERO_DEVICE void store_columns(int32_t dtype, char* row, int columns, const Lanes& lanes,
                               int column, const float* values) {
    const bool half = dtype != FLOAT32;
    if (lanes.step == 1 && column <= columns - COLUMNS_PER_THREAD) {
        store_pieces(dtype, row, column, values);
        return;
    }
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const int at = column + i * lanes.step;
        if (at >= columns) continue;
        if (half)
            reinterpret_cast<uint16_t*>(row)[at] =
                static_cast<uint16_t>(pack(dtype, values[i], 0.0f));
        else
            reinterpret_cast<float*>(row)[at] = values[i];
    }
}

}  // namespace hero
