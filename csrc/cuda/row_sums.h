// Sums over a row: of a thread's columns, sweep by sweep, then over the warp, the block and the
// cluster. Always the same tree, so the result is the same in every thread and in every run.
#pragma once

#include "row_columns.h"

namespace hero {

constexpr int MAX_SUM_WORDS = 10;

// What sweep 1 knows of some columns. Exponentials are relative to the maxima, log ratios to
// `shift`: x is invariant under a constant, and one that aligns the maxima keeps it small.
struct Masses {
    float max_teacher, max_student;
    float teacher, student;  // sum exp(z - max)
    float growth;     // sum exp(z_t - max) (exp(z_s - z_t - shift) - 1), without cancellation
    float log_ratio;  // sum exp(z_s - max) (z_s - z_t - reference); reverse KL only
    float reference;  // z_s - z_t where z_s is largest: see `Centre`
    float shift;
    int32_t top_teacher, top_student;  // first column that has the maximum
};

// What sweep 2 sums.
struct Values {
    float divergence;
    float centre;  // of the JSD's gradient
    float student_entropy, teacher_entropy;
};

HERO_DEVICE Masses no_masses() {
    const float low = -INFINITY;
    return {low, low, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, INT32_MAX, INT32_MAX};
}
HERO_DEVICE Values no_values() {
    return {0.0f, 0.0f, 0.0f, 0.0f};
}

// The constant that aligns two maxima; 0 where one side is masked or there are no columns.
HERO_DEVICE float alignment(float max_teacher, float max_student) {
    return max_teacher > MASKED && max_student > MASKED ? max_student - max_teacher : 0.0f;
}

// z_s - z_t as x0, with a bound where only one side is masked.
HERO_DEVICE float shifted(float log_ratio, float shift) {
    return lowest(highest(log_ratio - shift, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT);
}

HERO_DEVICE float warp_max(float value) {
    HERO_UNROLL
    for (int mask = 16; mask; mask /= 2) {
        const float other = shuffle_xor(value, mask);
        value = other > value ? other : value;
    }
    return value;
}

HERO_DEVICE float warp_sum(float value) {
    HERO_UNROLL
    for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

HERO_DEVICE int32_t warp_min(int32_t value) {
    HERO_UNROLL
    for (int mask = 16; mask; mask /= 2) {
        const int32_t other = static_cast<int32_t>(shuffle_xor(static_cast<uint32_t>(value), mask));
        value = other < value ? other : value;
    }
    return value;
}

// exp(part - whole); 1 where both are -inf.
HERO_DEVICE float rescale(float part, float whole) {
    return part == whole ? 1.0f : exponential(part - whole);
}

// The lanes' masses together, in every lane.
template <int divergence>
HERO_DEVICE Masses combine(const Masses& mine, bool with_tops) {
    Masses all;
    all.max_teacher = warp_max(mine.max_teacher);
    all.max_student = warp_max(mine.max_student);
    all.shift = alignment(all.max_teacher, all.max_student);
    const float teacher_factor = rescale(mine.max_teacher, all.max_teacher);
    const float student_factor = rescale(mine.max_student, all.max_student);
    const float moved = mine.teacher > 0.0f ? mine.shift - all.shift : 0.0f;
    const float growth =
        mine.growth * exponential(moved) + mine.teacher * exponential_minus_1(moved);
    all.teacher = warp_sum(mine.teacher * teacher_factor);
    all.student = warp_sum(mine.student * student_factor);
    all.growth = warp_sum(growth * teacher_factor);
    all.log_ratio = all.reference = 0.0f;
    if (divergence != FORWARD_KL)
        all.reference = warp_max(mine.max_student == all.max_student ? mine.reference : -INFINITY);
    if (divergence == REVERSE_KL) {
        const float apart = shifted(mine.reference, all.shift) - shifted(all.reference, all.shift);
        all.log_ratio = warp_sum((mine.log_ratio + apart * mine.student) * student_factor);
    }
    all.top_teacher = all.top_student = INT32_MAX;
    if (with_tops) {
        all.top_teacher =
            warp_min(mine.max_teacher == all.max_teacher ? mine.top_teacher : INT32_MAX);
        all.top_student =
            warp_min(mine.max_student == all.max_student ? mine.top_student : INT32_MAX);
    }
    return all;
}

template <int divergence>
HERO_DEVICE Values combine(const Values& mine, bool with_entropies) {
    Values all = no_values();
    all.divergence = warp_sum(mine.divergence);
    if (divergence == JSD) all.centre = warp_sum(mine.centre);
    if (with_entropies) {
        all.student_entropy = warp_sum(mine.student_entropy);
        all.teacher_entropy = warp_sum(mine.teacher_entropy);
    }
    return all;
}

// The start of shared memory. While some threads of a cluster read the sums of one reduction,
// others may be two reductions ahead, if they did not need the one between (reduce_cluster). The
// warps of a block are at most one apart.
struct Exchange {
    Barrier full[MAX_STAGES];   // a stage holds its tile
    Barrier empty[MAX_STAGES];  // all warps are done with a stage
    Barrier arrived[4];         // all blocks have sent their part of a reduction
    uint32_t of_warps[2][MAX_WARPS][MAX_SUM_WORDS];
    uint32_t of_blocks[4][MAX_CLUSTER][MAX_SUM_WORDS];
};
static_assert(sizeof(Exchange) <= EXCHANGE_BYTES, "the plan reserves less than the kernel uses");

template <class T>
union AsWords {
    static constexpr int COUNT = sizeof(T) / 4;
    static_assert(COUNT <= MAX_SUM_WORDS, "no room for them in Exchange");
    T sums;
    uint32_t word[COUNT];
};

template <class T>
HERO_DEVICE T read_sums(const uint32_t* words) {
    AsWords<T> result;
    HERO_UNROLL
    for (int i = 0; i < AsWords<T>::COUNT; ++i) result.word[i] = load_shared(words + i);
    return result.sums;
}

// All threads' sums of a cluster together: in every thread that computes, or with `to_all` false in
// the first warp of the cluster alone; the others get `none`, the neutral element, and go on.
// `merge` does it for the lanes of a warp, `count` numbers the reductions of the kernel. Of two
// reductions in a row one at least is to all.
template <class T, class Merge>
HERO_DEVICE T reduce_cluster(Exchange& exchange, const Plan& plan, int rank, uint32_t count,
                             bool to_all, const T& mine, const T& none, Merge merge) {
    constexpr int WORDS = AsWords<T>::COUNT;
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    auto& of_warps = exchange.of_warps[count % 2];
    auto& of_blocks = exchange.of_blocks[count % 4];
    Barrier* arrived = &exchange.arrived[count % 4];
    AsWords<T> of;
    of.sums = merge(mine);
    if (lane == 0) {
        HERO_UNROLL
        for (int i = 0; i < WORDS; ++i) of_warps[warp][i] = of.word[i];
    }
    sync_threads(32 * plan.warps);
    const bool receives = to_all || rank == 0;
    if (warp == 0) {
        of.sums = merge(lane < plan.warps ? read_sums<T>(of_warps[lane]) : none);
        if (lane < (to_all ? plan.cluster_size : 1)) {
            HERO_UNROLL
            for (int i = 0; i < WORDS; ++i) send_to(&of_blocks[rank][i], lane, of.word[i], arrived);
        }
        if (lane == 0 && receives)
            expect_sent(arrived, static_cast<uint32_t>(4 * WORDS * plan.cluster_size));
    }
    if (!receives || (!to_all && warp != 0)) return none;
    wait_cluster(arrived, count / 4 & 1);
    return merge(lane < plan.cluster_size ? read_sums<T>(of_blocks[lane]) : none);
}

// Sweep 1 over eight columns of a thread. `is_first`: they are the warp's first of the row.
template <int divergence, bool delta>
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
        if (divergence != FORWARD_KL) {
            const float before = sums.reference;
            HERO_UNROLL
            for (int i = 0; i < COLUMNS_PER_THREAD; ++i)
                if (z.student[i] == top_student) sums.reference = z.log_ratio[i];
            const float apart = shifted(before, sums.shift) - shifted(sums.reference, sums.shift);
            sums.log_ratio = (sums.log_ratio + apart * sums.student) * fall;
        }
        sums.student *= fall;
        sums.max_student = top_student;
        if (with_tops) {
            HERO_UNROLL
            for (int i = COLUMNS_PER_THREAD - 1; i >= 0; --i)
                if (z.student[i] == top_student) sums.top_student = column + i * lanes.step;
        }
    }
    const float reference = shifted(sums.reference, sums.shift);
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const float x = shifted(z.log_ratio[i], sums.shift);
        const float log2_p = (z.teacher[i] - sums.max_teacher) * LOG2_E;
        const float p = exp2_approx(log2_p);
        const float q = exponential(z.student[i] - sums.max_student);
        // p (e^x - 1). Far away e^x may overflow where p underflows: their product by its own 2^x.
        const float log2_far =
            delta ? log2_p + x * LOG2_E : (z.student[i] - (sums.shift + sums.max_teacher)) * LOG2_E;
        const float near = p * (x + x * x * quadratic_remainder(x));
        const float far = exp2_approx(lowest(log2_far, 126.0f)) - p;
        sums.growth += magnitude(x) <= CLOSE_LOG_RATIO ? near : far;
        sums.teacher += p;
        sums.student += q;
        if (divergence == REVERSE_KL) sums.log_ratio += q * (x - reference);
    }
}

// What turns logits into probabilities.
struct Normaliser {
    float max_teacher, max_student, log_teacher, log_student;  // logarithms of the masses
    float shift, offset;                                       // x = x0 - offset
    bool near;  // the offset comes from the growth: x is accurate relative to itself

    HERO_DEVICE explicit Normaliser(const Masses& sums)
        : max_teacher(sums.max_teacher),
          max_student(sums.max_student),
          log_teacher(logf(sums.teacher)),
          log_student(logf(sums.student)),
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
    return divergence == JSD ? -log_mixture(x, mixture).from_student : x;
}

// The bracket at the student's top token, which is subtracted from all: it cancels in the gradient.
// Where the student is confident, bracket and centre of this token are nearly the same large number,
// and their difference is its gradient; so both are formed as small numbers.
struct Centre {
    float reference, mean;  // mean: under p_s, of bracket - reference

    template <int divergence>
    HERO_DEVICE static Centre of(const Masses& sums, const Normaliser& n, const Mixture& mixture) {
        return {bracket<divergence>(n.x(sums.reference), mixture), sums.log_ratio / sums.student};
    }
};

// Sweep 2 over eight columns: adds their share of the divergence; for both KLs fills `gradient`, but
// for factors of the row.
template <int divergence, bool delta>
HERO_DEVICE void add_values(const Logits& z, const Normaliser& n, const Mixture& mixture,
                            const Centre& centre, bool with_entropies, Values& sums,
                            float* gradient) {
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
            const float near = p * (x + x * x * quadratic_remainder(x));
            sums.divergence += kl_term(p, q, x);
            gradient[i] = magnitude(x) <= CLOSE_LOG_RATIO ? near : q - p;
        } else if (divergence == REVERSE_KL) {
            sums.divergence += kl_term(q, p, -x);
            gradient[i] = q * ((x - centre.reference) - centre.mean);
        } else {
            const LogMixture<float> log_m = log_mixture(x, mixture);
            const float m = mixture.beta * p + mixture.other * q;
            sums.centre += q * (-log_m.from_student - centre.reference);
            sums.divergence += mixture.beta * kl_term(p, m, log_m.from_teacher) +
                               mixture.other * kl_term(q, m, log_m.from_student);
        }
    }
}

// Sweep 3.
template <bool delta>
HERO_DEVICE void jsd_gradient(const Logits& z, const Normaliser& n, const Mixture& mixture,
                              const Centre& centre, float* gradient) {
    HERO_UNROLL
    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
        const Probabilities of =
            probabilities<delta>(n, z.teacher[i], z.student[i], z.log_ratio[i]);
        gradient[i] = of.q * ((bracket<JSD>(of.x, mixture) - centre.reference) - centre.mean);
    }
}

}  // namespace hero
