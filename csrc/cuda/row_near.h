// Sweeps 1 and 2 over eight columns of a thread that are near: of a plain row, and with small log
// ratios in the whole warp. Taken as they are stored; false is returned for others.
#pragma once

#include "row_terms.h"

namespace hero {

template <bool delta>
HERO_DEVICE float raw_gap(const Raw& raw, int i) {
    return delta ? raw.student[i] : raw.student[i] - raw.teacher[i];
}

// Sweep 1, without the student's exponentials: each is the teacher's and its growth. `is_first`: the
// columns are the warp's first of the row. Not for the reverse KL, nor for the top tokens.
template <int divergence, bool delta>
HERO_DEVICE bool near_masses(const Raw& raw, const Scaling& scaling, bool is_first, Masses& sums,
                             NearMasses& near) {
    float top = raw.teacher[0];
    HERO_UNROLL
    for (int i = 1; i < COLUMNS_PER_THREAD; ++i) top = fmaxf(top, raw.teacher[i]);
    top *= scaling.inner;
    if (is_first) {
        float student = -INFINITY;
        HERO_UNROLL
        for (int i = 0; i < COLUMNS_PER_THREAD; ++i)
            student = fmaxf(student, delta ? raw.teacher[i] + raw.student[i] : raw.student[i]);
        sums.shift = alignment(warp_max(top), warp_max(student * scaling.inner));
    }
    float x[COLUMNS_PER_THREAD];
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i)
        x[i] = raw_gap<delta>(raw, i) * scaling.inner - sums.shift;
    if (!all_small(x, top > MASKED)) return false;
    if (top > sums.max_teacher) raise_teacher(top, sums, near);
    const float below = sums.max_teacher * LOG2_E;
    float teacher = 0.0f, growth = 0.0f;
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const float log2_p = raw.teacher[i] * scaling.log2_inner - below;
        const float p = exp2_approx(log2_p);
        // p (e^x - 1) = p e^(x/2) 2 sinh(x/2)
        const float grown =
            exp2_approx(log2_p + x[i] * (0.5f * LOG2_E)) * (x[i] * even_sinh(x[i] * x[i]));
        teacher += p;
        growth += grown;
        if (divergence == JSD) near.log_ratio += (p + grown) * x[i];
    }
    sums.teacher += teacher;
    sums.growth += growth;
    near.student += teacher + growth;
    return true;
}

// The student's near columns and the others together.
HERO_DEVICE void join(Masses& sums, const NearMasses& near) {
    if (near.student == 0.0f) return;
    const float of_near = sums.max_teacher + sums.shift;
    const float top = highest(sums.max_student, of_near);
    const float factor = exponential(sums.max_student - top), near_factor = exponential(of_near - top);
    sums.student = sums.student * factor + near.student * near_factor;
    sums.log_ratio = sums.log_ratio * factor + near.log_ratio * near_factor;
    sums.max_student = top;
}

// Sums over near columns in sweep 2, times UNIT, and for y = x / 2.
struct NearValues {
    float tanh, log_cosh;  // 4 m y tanh y and m log cosh y, whose difference is the divergence
    float centre, teacher_entropy, student_entropy;

    HERO_DEVICE Values values() const {
        constexpr float nats = LN_2 / UNIT;
        return {(0.25f * tanh - log_cosh) / UNIT, centre / UNIT, student_entropy * nats,
                teacher_entropy * nats};
    }
};

// Sweep 2, for the JSD of beta = 1/2.
template <bool delta>
HERO_DEVICE bool near_values(const Raw& raw, const Scaling& scaling, const Normaliser& n,
                             const Mixture& mixture, const Centre& centre, bool with_entropies,
                             NearValues& sums, Left& left) {
    if (!mixture.even()) return false;
    const float apart = n.shift + n.offset, below = n.log2_teacher - LOG2_UNIT;
    float x[COLUMNS_PER_THREAD];
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i)
        x[i] = raw_gap<delta>(raw, i) * scaling.inner - apart;
    if (!all_small(x)) return false;
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const float t = x[i] * x[i], log_cosh = t * even_log_cosh(t);
        const float log2_p = raw.teacher[i] * scaling.log2_inner - below;
        const float q = exp2_approx(log2_p + x[i] * LOG2_E);
        // sqrt(p q) 2 sinh y = q - p, of which half is m tanh y
        const float rise = exp2_approx(log2_p + x[i] * (0.5f * LOG2_E)) * (x[i] * even_sinh(t));
        sums.tanh += x[i] * rise;
        sums.log_cosh += (q - 0.5f * rise) * log_cosh;
        left.student[i] = q;
        left.bracket[i] = q * ((0.5f * x[i] - log_cosh) - centre.reference);
        sums.centre += left.bracket[i];
    }
    if (with_entropies) {
        HERO_UNROLL
        for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
            const float log2_p =
                highest(raw.teacher[i] * scaling.log2_inner - n.log2_teacher, MASKED);
            sums.teacher_entropy -= exp2_approx(log2_p + LOG2_UNIT) * log2_p;
            sums.student_entropy -= left.student[i] * lowest(log2_p + x[i] * LOG2_E, 0.0f);
        }
    }
    return true;
}

}  // namespace hero
