// Sums over a row: of a thread's columns, sweep by sweep, then over the warp, the block and the
// cluster. Always the same tree, so the result is the same in every thread and in every run.
#pragma once

#include "row_columns.h"

namespace hero {

constexpr int MAX_SUM_WORDS = 10;

// What sweep 1 knows of some columns. Exponentials are relative to the maxima, log ratios to
// `shift`: x is invariant under a constant, and one that aligns the maxima keeps it small.
struct Masses {
    float max_teacher, max_student;  // the second may be larger, if the top tokens are not wanted
    float teacher, student;          // sum exp(z - max)
    float growth;     // sum exp(z_t - max) (exp(z_s - z_t - shift) - 1), without cancellation
    // sum exp(z_s - max) (z_s - z_t - reference), for the JSD (... - shift); not for the forward KL
    float log_ratio;
    float reference;  // z_s - z_t where z_s is largest, see `Centre`
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
HERO_DEVICE void add(Values& sums, const Values& more) {
    sums.divergence += more.divergence;
    sums.centre += more.centre;
    sums.student_entropy += more.student_entropy;
    sums.teacher_entropy += more.teacher_entropy;
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
    if (divergence == JSD)
        all.log_ratio = warp_sum((mine.log_ratio + moved * mine.student) * student_factor);
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

}  // namespace hero
