// What eight columns of a thread add to the sums of each sweep, and their gradient.
//
// Where the whole warp's log ratios are small nothing far is computed, and nothing is chosen between:
// that is most of a row even where the teacher knows what the student does not. See row_near.h
// for those that need neither masks nor selections at all.
#pragma once

#include "row_sums.h"

namespace hero {

// Whether |x| <= EVEN_LIMIT in the eight columns of every lane, and something else holds in every
// lane: then nothing far is computed.
HERO_DEVICE bool all_small(const float* x, bool and_this = true) {
    float largest = magnitude(x[0]);
    HERO_UNROLL
    for (int i = 1; i < COLUMNS_PER_THREAD; ++i) largest = highest(largest, magnitude(x[i]));
    return all_of_warp(largest <= EVEN_LIMIT && and_this);  // false of a NaN
}

// The student's masses and log ratios in near columns (row_near.h), relative to the teacher's
// maximum and the shift.
struct NearMasses {
    float student, log_ratio;
};

HERO_DEVICE void raise_teacher(float top, Masses& sums, NearMasses& near) {
    const float fall = exponential(sums.max_teacher - top);
    sums.teacher *= fall;
    sums.growth *= fall;
    near.student *= fall;
    near.log_ratio *= fall;
    sums.max_teacher = top;
}

// The first of the eight that is equal to `value`.
HERO_DEVICE int first_of(const float* z, float value) {
    int first = 0;
    HERO_UNROLL
    for (int i = COLUMNS_PER_THREAD - 1; i >= 0; --i)
        if (z[i] == value) first = i;
    return first;
}

// Sweep 1 over eight columns of a thread.
template <int divergence, bool delta>
HERO_DEVICE void add_masses(const Logits& z, const Lanes& lanes, int column, bool is_first,
                            bool with_tops, Masses& sums, NearMasses& near) {
    float top_teacher = z.teacher[0], top_student = z.student[0];
    HERO_UNROLL
    for (int i = 1; i < COLUMNS_PER_THREAD; ++i) {
        top_teacher = fmaxf(top_teacher, z.teacher[i]);  // a NaN shows in the sums
        top_student = fmaxf(top_student, z.student[i]);
    }
    if (is_first) sums.shift = alignment(warp_max(top_teacher), warp_max(top_student));
    if (top_teacher > sums.max_teacher) {
        raise_teacher(top_teacher, sums, near);
        if (with_tops) sums.top_teacher = column + first_of(z.teacher, top_teacher) * lanes.step;
    }
    if (top_student > sums.max_student) {
        const float fall = exponential(sums.max_student - top_student);
        const float before = sums.reference;
        if (divergence != FORWARD_KL) {
            HERO_UNROLL
            for (int i = 0; i < COLUMNS_PER_THREAD; ++i)
                if (z.student[i] == top_student) sums.reference = z.log_ratio[i];
        }
        if (divergence == REVERSE_KL) {
            const float apart = shifted(before, sums.shift) - shifted(sums.reference, sums.shift);
            sums.log_ratio = (sums.log_ratio + apart * sums.student) * fall;
        }
        if (divergence == JSD) sums.log_ratio *= fall;
        sums.student *= fall;
        sums.max_student = top_student;
        if (with_tops) sums.top_student = column + first_of(z.student, top_student) * lanes.step;
    }
    const float reference = divergence == JSD ? 0.0f : shifted(sums.reference, sums.shift);
    float small[COLUMNS_PER_THREAD];
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) small[i] = z.log_ratio[i] - sums.shift;
    if (z.plain && all_small(small)) {
        HERO_UNROLL
        for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
            const float x = small[i], log2_p = (z.teacher[i] - sums.max_teacher) * LOG2_E;
            const float p = exp2_approx(log2_p);
            const float q = exponential(z.student[i] - sums.max_student);
            // p (e^x - 1) = p e^(x/2) 2 sinh(x/2)
            sums.growth += exp2_approx(log2_p + x * (0.5f * LOG2_E)) * x * even_sinh(x * x);
            sums.teacher += p;
            sums.student += q;
            if (divergence != FORWARD_KL) sums.log_ratio += q * (x - reference);
        }
        return;
    }
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const float x = shifted(z.log_ratio[i], sums.shift);
        const float log2_p = (z.teacher[i] - sums.max_teacher) * LOG2_E;
        const float p = exp2_approx(log2_p);
        const float q = exponential(z.student[i] - sums.max_student);
        // p (e^x - 1). Far away e^x may overflow where p underflows: their product by its own 2^x.
        const float log2_far =
            delta ? log2_p + x * LOG2_E : (z.student[i] - (sums.shift + sums.max_teacher)) * LOG2_E;
        const float far = exp2_approx(lowest(log2_far, 126.0f)) - p;
        sums.growth += magnitude(x) <= CLOSE_LOG_RATIO ? p * near_exponential(x).minus_1 : far;
        sums.teacher += p;
        sums.student += q;
        if (divergence != FORWARD_KL) sums.log_ratio += q * (x - reference);
    }
}

// What turns logits into probabilities.
struct Normaliser {
    float max_teacher, max_student, log_teacher, log_student;  // logarithms of the masses
    float log2_teacher;                                        // of the mass without a maximum
    float shift, offset;                                       // x = x0 - offset
    bool near;  // the offset comes from the growth: x is accurate relative to itself

    HERO_DEVICE explicit Normaliser(const Masses& sums)
        : max_teacher(sums.max_teacher),
          max_student(sums.max_student),
          log_teacher(logf(sums.teacher)),
          log_student(logf(sums.student)),
          log2_teacher((max_teacher + log_teacher) * LOG2_E),
          shift(sums.shift) {
        const float growth = sums.growth / sums.teacher;
        // Where the growth is large so is the divergence, and the normalisers serve.
        near = magnitude(growth) < NEAR_GROWTH;
        offset = near ? log_1_plus(growth, 1.0f + growth)
                      : (max_student - max_teacher - shift) + (log_student - log_teacher);
        if (!(max_teacher > MASKED && max_student > MASKED)) {
            near = false;
            offset = log_student = NAN;
        }
    }
    HERO_DEVICE float x(float log_ratio) const {
        return shifted(log_ratio, shift) - offset;
    }
};

struct Probabilities {
    float p, q, x, log_p, log_q;
};

template <bool delta>
HERO_DEVICE Probabilities probabilities(const Normaliser& n, float teacher, float student,
                                        float log_ratio) {
    Probabilities of;
    of.x = n.x(log_ratio);
    of.log_p = (teacher - n.max_teacher) - n.log_teacher;
    // Through x the student keeps delta's accuracy. Else by what it was normalised with: so p_s
    // sums to 1, and a teacher that is masked alone does not matter.
    const float own = (student - n.max_student) - n.log_student;
    of.log_q = lowest(delta && n.near ? of.log_p + of.x : own, 0.0f);
    of.p = exponential(of.log_p);
    of.q = exponential(of.log_q);
    return of;
}

// The gradient's bracket: x, or log q - log m of the JSD.
template <int divergence>
HERO_DEVICE float bracket(float x, const Mixture& mixture) {
    if (divergence != JSD) return x;
    return mixture.even() && magnitude(x) <= EVEN_LIMIT ? even_bracket(x, x * x)
                                                        : -log_mixture(x, mixture).from_student;
}

// A bracket that is subtracted from all, which cancels in the gradient: that at the student's top
// token, or, of an even mixture, whose near columns are not searched, at the student's mean log
// ratio. Where the student is
// confident, bracket and centre of its top token are nearly the same large number, and their
// difference is its gradient; so both are formed as small numbers.
struct Centre {
    float reference, mean;  // mean: under p_s, of bracket - reference

    template <int divergence>
    HERO_DEVICE static Centre of(const Masses& sums, const Normaliser& n, const Mixture& mixture) {
        const float mean = sums.log_ratio / sums.student;
        if (divergence != JSD) return {n.x(sums.reference), mean};
        const float x = mixture.even() ? mean - n.offset : n.x(sums.reference);
        return {bracket<divergence>(x, mixture), 0.0f};
    }
};

// p and log p of a probability, given how far its logit lies below the maximum.
struct Probability {
    float p, log_p;

    HERO_DEVICE Probability(float below, float log_mass)
        : p(exp2_approx(below * LOG2_E - log_mass * LOG2_E)), log_p(below - log_mass) {}
};

// Sweep 2 of the JSD leaves in the stage what sweep 3 makes the gradient of, as `Left` in place of
// the logits: p_s (bracket - reference) in fp32 where the teacher's was, p_s where the student's was,
// in fp16 if that has 16 bits. Both times UNIT, with which fp16 reaches down to 2^-39.
constexpr float LOG2_UNIT = 15.0f, UNIT = 32768.0f;
struct Left {
    float bracket[COLUMNS_PER_THREAD], student[COLUMNS_PER_THREAD];
};

// Sweep 2 over eight columns: adds their share of the divergence; for both KLs fills `gradient`, but
// for factors of the row, for the JSD `left`.
template <int divergence, bool delta>
HERO_DEVICE void add_values(const Logits& z, const Normaliser& n, const Mixture& mixture,
                            const Centre& centre, bool with_entropies, Values& sums,
                            float* gradient, Left& left) {
    float x[COLUMNS_PER_THREAD];
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) x[i] = z.log_ratio[i] - n.shift - n.offset;
    if (divergence != JSD && z.plain && all_small(x)) {
        HERO_UNROLL
        for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
            const Probability of_t(z.teacher[i] - n.max_teacher, n.log_teacher);
            const Probability of_s(z.student[i] - n.max_student, n.log_student);
            const float p = of_t.p, q = of_s.p;
            if (divergence == FORWARD_KL) {
                const NearExponential e = near_exponential(x[i]);
                const bool close = magnitude(x[i]) <= CLOSE_LOG_RATIO;
                sums.divergence += close ? p * e.minus_1_minus_x : (q - p) - p * x[i];
                gradient[i] = close ? p * e.minus_1 : q - p;
            } else {
                sums.divergence += kl_term(q, p, -x[i]);
                gradient[i] = q * ((x[i] - centre.reference) - centre.mean);
            }
            if (with_entropies) {
                sums.teacher_entropy -= p * of_t.log_p;
                sums.student_entropy -= q * lowest(of_s.log_p, 0.0f);
            }
        }
        return;
    }
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const Probabilities of =
            probabilities<delta>(n, z.teacher[i], z.student[i], z.log_ratio[i]);
        const float p = of.p, q = of.q, x = of.x;
        if (with_entropies) {
            sums.teacher_entropy -= p * of.log_p;
            sums.student_entropy -= q * of.log_q;
        }
        if (divergence == FORWARD_KL) {
            sums.divergence += kl_term(p, q, x);
            gradient[i] = magnitude(x) <= CLOSE_LOG_RATIO ? p * near_exponential(x).minus_1 : q - p;
        } else if (divergence == REVERSE_KL) {
            sums.divergence += kl_term(q, p, -x);
            gradient[i] = q * ((x - centre.reference) - centre.mean);
        } else {
            const LogMixture<float> log_m = log_mixture(x, mixture);
            const float m = mixture.beta * p + mixture.other * q;
            left.student[i] = q * UNIT;
            left.bracket[i] = left.student[i] * (-log_m.from_student - centre.reference);
            sums.centre += q * (-log_m.from_student - centre.reference);
            sums.divergence += mixture.beta * kl_term(p, m, log_m.from_teacher) +
                               mixture.other * kl_term(q, m, log_m.from_student);
        }
    }
}

// Sweep 3 where sweep 2 has left nothing. Small and large ratios as there, so that the gradient sums
// to zero.
template <bool delta>
HERO_DEVICE void jsd_gradient(const Logits& z, const Normaliser& n, const Mixture& mixture,
                              const Centre& centre, float* gradient) {
    float x[COLUMNS_PER_THREAD];
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) x[i] = z.log_ratio[i] - n.shift - n.offset;
    if (z.plain && mixture.even() && all_small(x)) {
        HERO_UNROLL
        for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
            const Probability of_s(z.student[i] - n.max_student, n.log_student);
            const float bracket = even_bracket(x[i], x[i] * x[i]);
            gradient[i] = of_s.p * ((bracket - centre.reference) - centre.mean);
        }
        return;
    }
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const Probabilities of =
            probabilities<delta>(n, z.teacher[i], z.student[i], z.log_ratio[i]);
        const float bracket = -log_mixture(of.x, mixture).from_student;
        gradient[i] = of.q * ((bracket - centre.reference) - centre.mean);
    }
}

}  // namespace hero
