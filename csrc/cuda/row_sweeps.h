// What each sweep does with eight columns of a thread.
#pragma once

#include "row_sums.h"

namespace hero {

// Sweep 1 over eight columns of a thread. `is_first`: they are the warp's first of the row.
template <bool delta, bool with_log_ratio>
HERO_DEVICE void add_masses(const Logits& z, const Lanes& lanes, int column, bool is_first,
                            bool with_tops, Masses& sums) {
    float top_teacher = z.teacher[0], top_student = z.student[0];
    HERO_UNROLL
    for (int i = 1; i < COLUMNS_PER_THREAD; ++i) {
        top_teacher = fmaxf(top_teacher, z.teacher[i]);  // a NaN shows in the sums
        top_student = fmaxf(top_student, z.student[i]);
    }
    if (is_first) sums.shift = alignment(warp_max(top_teacher), warp_max(top_student));
    if (top_teacher > sums.max_teacher) {
        const float fall = exponential(sums.max_teacher - top_teacher);
        sums.teacher *= fall;
        sums.growth *= fall;
        sums.max_teacher = top_teacher;
        if (with_tops) {
            HERO_UNROLL
            for (int i = COLUMNS_PER_THREAD - 1; i >= 0; --i)
                if (z.teacher[i] == top_teacher) sums.top_teacher = column + i * lanes.step;
        }
    }
    if (top_student > sums.max_student) {
        const float fall = exponential(sums.max_student - top_student);
        sums.student *= fall;
        sums.log_ratio *= fall;
        sums.max_student = top_student;
        if (with_tops) {
            HERO_UNROLL
            for (int i = COLUMNS_PER_THREAD - 1; i >= 0; --i)
                if (z.student[i] == top_student) sums.top_student = column + i * lanes.step;
        }
    }
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const float x =
            lowest(highest(z.log_ratio[i] - sums.shift, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT);
        const float log2_p = (z.teacher[i] - sums.max_teacher) * LOG2_E;
        const float p = exp2_approx(log2_p);
        const float q = exponential(z.student[i] - sums.max_student);
        // p (e^x - 1). Far away e^x may overflow where p underflows: their product by its own 2^x.
        const float log2_far =
            delta ? log2_p + x * LOG2_E : (z.student[i] - (sums.shift + sums.max_teacher)) * LOG2_E;
        const float near = p * (x + x * x * quadratic_remainder(x));
        sums.growth += magnitude(x) <= 1.0f ? near : exp2_approx(lowest(log2_far, 126.0f)) - p;
        sums.teacher += p;
        sums.student += q;
        if (with_log_ratio) sums.log_ratio += q * x;
    }
}

// What turns logits into probabilities.
struct Normaliser {
    float max_teacher, max_student, log_teacher, log_student;  // logarithms of the masses
    float shift, offset;                                       // x = log ratio - shift - offset
    float mean;                                                // of x under p_s; reverse KL only
    bool near;  // the offset comes from the growth: x is accurate relative to itself

    HERO_DEVICE explicit Normaliser(const Masses& sums)
        : max_teacher(sums.max_teacher),
          max_student(sums.max_student),
          log_teacher(logf(sums.teacher)),
          log_student(logf(sums.student)),
          shift(sums.shift) {
        const float growth = sums.growth / sums.teacher;
        // Where the growth is large so is the divergence, and the normalisers serve.
        near = magnitude(growth) < 0.5f;
        offset = near ? log_1_plus(growth)
                      : (max_student - max_teacher - shift) + (log_student - log_teacher);
        mean = sums.log_ratio / sums.student - offset;
    }
};

struct Probabilities {
    float p, q, x, log_p, log_q;
};

template <bool delta>
HERO_DEVICE Probabilities probabilities(const Normaliser& n, float teacher, float student,
                                        float log_ratio) {
    Probabilities of;
    of.x = lowest(highest(log_ratio - n.shift, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT) - n.offset;
    of.log_p = (teacher - n.max_teacher) - n.log_teacher;
    // Through x the student keeps delta's accuracy. Else by what it was normalised with: so p_s
    // sums to 1, and a teacher that is masked alone does not matter.
    const float own = (student - n.max_student) - n.log_student;
    of.log_q = delta && n.near ? of.log_p + of.x : own;
    of.p = exponential(of.log_p);
    of.q = exponential(of.log_q);
    return of;
}

// Sweep 2 over eight columns: adds their share of the divergence; for both KLs turns
// `gradient` into the gradient, but for factors of the row.
template <int divergence, bool delta>
HERO_DEVICE void add_values(const Logits& z, const Normaliser& n, float beta, bool with_entropies,
                            Values& sums, float* gradient) {
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const Probabilities of =
            probabilities<delta>(n, z.teacher[i], z.student[i], z.log_ratio[i]);
        const float p = of.p, q = of.q, x = of.x;
        if (with_entropies) {
            sums.teacher_entropy -= p * of.log_p;
            sums.student_entropy -= q * of.log_q;
        }
        if (divergence == HERO_FORWARD_KL) {
            const float near = p * (x + x * x * quadratic_remainder(x));
            sums.divergence += kl_term(p, q, x);
            gradient[i] = magnitude(x) <= 1.0f ? near : q - p;
        } else if (divergence == HERO_REVERSE_KL) {
            sums.divergence += kl_term(q, p, -x);
            gradient[i] = q * (x - n.mean);
        } else {
            const LogMixture log_m = log_mixture(x, beta);
            const float m = beta * p + (1.0f - beta) * q;
            const float student_term = kl_term(q, m, log_m.from_student);
            sums.student_part += student_term;
            sums.divergence +=
                beta * kl_term(p, m, log_m.from_teacher) + (1.0f - beta) * student_term;
        }
    }
}

// Sweep 3.
template <bool delta>
HERO_DEVICE void jsd_gradient(const Logits& z, const Normaliser& n, float beta, float student_part,
                              float* gradient) {
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const Probabilities of =
            probabilities<delta>(n, z.teacher[i], z.student[i], z.log_ratio[i]);
        gradient[i] = (1.0f - beta) * of.q * (-log_mixture(of.x, beta).from_student - student_part);
    }
}

}  // namespace hero
