// One row, a cluster of blocks: divergence, statistics and gradient. Formulas as in
// csrc/row_kernel.cpp, in sweeps over a row that lies in shared memory:
//
//   sweep 1   maxima, normalisers, log sum p_t exp(delta), and for reverse KL its mean log ratio
//   sweep 2   the divergence, entropies; for both KLs the gradient too
//   sweep 3   the gradient of the JSD, which needs sweep 2's KL(p_s || m)
//
// A row is read from global memory once, as soon as its stages are free: while the last sweep over
// one row runs, the next row comes in behind it. A row that no cluster can hold is read once for
// each sweep, through the same stages.
#pragma once

#include "row_copies.h"

namespace hero {

// The target's logits. They come first: the gradient may overwrite them.
struct Target {
    int64_t id = -1;
    float teacher = 0.0f, student = 0.0f, log_ratio = 0.0f;
};

HERO_DEVICE float load_element(const char* row, int32_t dtype, int64_t column) {
    if (dtype == HERO_FLOAT32) return reinterpret_cast<const float*>(row)[column];
    const uint32_t bits = reinterpret_cast<const uint16_t*>(row)[column];
    return dtype == HERO_BFLOAT16 ? as_float(bits << 16) : float_from_half(bits);
}

template <bool delta>
HERO_DEVICE Target load_target(const RowsProblem& problem, const char* teacher,
                               const char* student, float absolute, int row) {
    Target target;
    if (!problem.target_ids) return target;
    target.id = problem.target_ids[row];
    if (target.id < 0) return target;
    float slope;
    transform<delta>(problem, absolute, inner_factor(problem), static_cast<int>(target.id),
                     load_element(teacher, problem.teacher_dtype, target.id),
                     load_element(student, problem.student_dtype, target.id), target.teacher,
                     target.student, target.log_ratio, slope);
    return target;
}

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
    if (is_first)
        sums.shift = alignment(warp_max(top_teacher), warp_max(top_student));
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
            delta ? log2_p + x * LOG2_E
                  : (z.student[i] - (sums.shift + sums.max_teacher)) * LOG2_E;
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
        offset = near
                     ? log_1_plus(growth)
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
    // Through x the student keeps delta's accuracy. Else by what it was normalised with: so p_s sums
    // to 1, and a teacher that is masked alone does not matter.
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
        const Probabilities of = probabilities<delta>(n, z.teacher[i], z.student[i],
                                                      z.log_ratio[i]);
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
        const Probabilities of = probabilities<delta>(n, z.teacher[i], z.student[i],
                                                      z.log_ratio[i]);
        gradient[i] = (1.0f - beta) * of.q *
                      (-log_mixture(of.x, beta).from_student - student_part);
    }
}

// Calls body(logits, column) for the thread's columns of a slice. `incoming`: tiles are still being
// copied; `release`: this is the last time that they are read.
template <bool delta, class Body>
HERO_DEVICE Position sweep(const RowsProblem& problem, const Plan& plan, const Work& work,
                           Exchange& exchange, const Lanes& lanes, int row, float absolute, Position at,
                           bool incoming, bool release, Body body) {
    const char* memory = shared_memory();
    const int warp = thread_index() / 32;
    const int group = warp * GROUP;
    const int teacher_lead = lead_of(
        row_of(problem.teacher, problem.teacher_dtype, problem.teacher_stride, row));
    const int student_lead = lead_of(
        row_of(problem.student, problem.student_dtype, problem.student_stride, row));
    for (int tile = 0; tile < plan.tiles; ++tile) {
        if (incoming) HERO_SYNC(NO_FULL_WAIT, wait(&exchange.full[at.stage], at.parity));
        const int first = tile * plan.warps * GROUP + group;  // within the slice
        if (first < work.slice_end - work.slice_begin) {
            const int column = work.slice_begin + first + lanes.offset;
            const Logits logits = load_logits<delta>(
                problem, lanes, absolute,
                memory + EXCHANGE_BYTES + at.stage * plan.teacher_stage + teacher_lead,
                memory + plan.student_offset + at.stage * plan.student_stage + student_lead,
                group + lanes.offset, column);
            body(logits, column);
        }
        if (release) {
            sync_warp();
            if (thread_index() % 32 == 0) arrive(&exchange.empty[at.stage]);
        }
        at.advance(plan.stages);
    }
    return at;
}

// What sweep 1 knows of a row: its statistics, but for those of `Values`. Returns the importance
// ratio. `out` is null in all threads but the one that writes.
HERO_DEVICE float row_statistics(const RowsProblem& problem, const Masses& masses,
                                 const Normaliser& n, const Target& target, int row, float* out) {
    const bool has_target = target.id >= 0;
    const float teacher = (target.teacher - n.max_teacher) - n.log_teacher;
    const float x = (target.log_ratio - n.shift) - n.offset;
    const float own = (target.student - n.max_student) - n.log_student;
    const float student = n.near && magnitude(x) < 30.0f ? teacher + x : own;
    float ratio = 1.0f;
    if (has_target && problem.old_logprobs) {
        ratio = expf(student - problem.old_logprobs[row]);
        ratio = problem.is_clip > 0 && ratio > problem.is_clip ? problem.is_clip : ratio;
    }
    if (out) {
        out[HERO_STAT_RATIO] = ratio;
        out[HERO_STAT_STUDENT_LOGPROB] = has_target ? student : 0.0f;
        out[HERO_STAT_TEACHER_LOGPROB] = has_target ? teacher : 0.0f;
        const bool agree = masses.top_teacher == masses.top_student &&
                           masses.top_teacher < problem.vocab_size;
        out[HERO_STAT_TOP1_AGREEMENT] = agree ? 1.0f : 0.0f;
    }
    return ratio;
}

template <int divergence, bool delta>
HERO_DEVICE void compute_rows(const RowsProblem& problem, const Plan& plan, const Work& work,
                              Exchange& exchange) {
    constexpr bool is_jsd = divergence == HERO_JSD;
    constexpr bool is_reverse = divergence == HERO_REVERSE_KL;
    const Lanes lanes(plan);
    const bool with_stats = problem.with_stats;
    const bool resident = HERO_CHOICE(EARLY_RELEASE, plan.resident, 0);
    const bool third = work.sweeps == 3;
    uint32_t reductions = 0;
    Position at;
    for (int row = work.first_row; row < problem.rows; row += work.row_step) {
        const char* teacher =
            row_of(problem.teacher, problem.teacher_dtype, problem.teacher_stride, row);
        const char* student =
            row_of(problem.student, problem.student_dtype, problem.student_stride, row);
        char* grad = const_cast<char*>(
            row_of(problem.grad, problem.grad_dtype, problem.grad_stride, row));
        const bool holds_logits = delta && problem.absolute_rows && problem.absolute_rows[row];
        const float absolute = holds_logits ? 1.0f : 0.0f;
        const Target target = load_target<delta>(problem, teacher, student, absolute, row);
        const Position start = at;

        Masses mine = no_masses();
        bool is_first = true;
        at = sweep<delta>(problem, plan, work, exchange, lanes, row, absolute, at, true, !resident,
                          [&](const Logits& z, int column) {
                              add_masses<delta, is_reverse>(z, lanes, column, is_first, with_stats, mine);
                              is_first = false;
                          });
        const Masses masses = reduce_cluster(
            exchange, plan, work.rank, reductions++, true, mine, no_masses(),
            [&](const Masses& sums) { return combine<is_reverse>(sums, with_stats); });
        const Normaliser n(masses);

        float* out = work.rank == 0 && thread_index() == 0
                         ? problem.stats + static_cast<int64_t>(row) * HERO_NUM_STATS
                         : nullptr;
        const float ratio = row_statistics(problem, masses, n, target, row, out);
        const float weight = problem.row_weights[row];
        const float scale = weight * ratio * problem.logit_scale * problem.inv_temperature;
        // Writes a gradient of the thread's columns: zero in padding, and where the weight is zero
        // even if the row holds NaN.
        const int vocab_size = weight != 0.0f ? static_cast<int>(problem.vocab_size) : 0;
        const auto store = [&](const Logits& z, int column, float* gradient) {
            HERO_UNROLL
            for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
                const bool counts = column + i * lanes.step < vocab_size;
                gradient[i] = counts ? gradient[i] * (z.slope[i] * scale) : 0.0f;
            }
            store_gradient(problem, lanes, grad, column, gradient);
        };

        Values values = no_values();
        const bool last = !resident || !third;
        const Position second = resident ? start : at;
        at = sweep<delta>(problem, plan, work, exchange, lanes, row, absolute, second, !plan.resident, last,
                          [&](const Logits& z, int column) {
                              float gradient[COLUMNS_PER_THREAD];
                              add_values<divergence, delta>(z, n, problem.beta, with_stats, values,
                                                            gradient);
                              if (!is_jsd && problem.grad) store(z, column, gradient);
                          });
        // Without a third sweep the sums are only to be written down.
        values = reduce_cluster(
            exchange, plan, work.rank, reductions++, third, values, no_values(),
            [&](const Values& sums) { return combine<is_jsd>(sums, with_stats); });
        if (is_jsd && third)
            at = sweep<delta>(problem, plan, work, exchange, lanes, row, absolute, resident ? start : at,
                              !plan.resident, true, [&](const Logits& z, int column) {
                                  float gradient[COLUMNS_PER_THREAD];
                                  jsd_gradient<delta>(z, n, problem.beta, values.student_part,
                                                      gradient);
                                  store(z, column, gradient);
                              });

        if (out) {
            out[HERO_STAT_DIVERGENCE] = values.divergence;
            out[HERO_STAT_STUDENT_ENTROPY] = values.student_entropy;
            out[HERO_STAT_TEACHER_ENTROPY] = values.teacher_entropy;
            out[HERO_NUM_STATS - 1] = 0.0f;
            // Garbage behind a mask must not poison the weighted sum.
            if (weight == 0.0f && !(magnitude(values.divergence) < INFINITY))
                for (int i = 0; i < HERO_NUM_STATS; ++i) out[i] = 0.0f;
        }
    }
}

// The whole kernel: `plan.warps` warps compute, one more copies.
template <int divergence, bool delta>
HERO_DEVICE void divergence_rows(const RowsProblem& problem, const Plan& plan) {
    Exchange& exchange = *reinterpret_cast<Exchange*>(shared_memory());
    if (thread_index() == 0) {
        for (int i = 0; i < plan.stages; ++i) {
            init_barrier(&exchange.full[i], COPY_ARRIVALS);
            init_barrier(&exchange.empty[i], plan.warps);
        }
        for (int i = 0; i < 4; ++i) init_barrier(&exchange.arrived[i], 1);
        fence_barriers();
    }
    HERO_SYNC(NO_START_BARRIER, sync_cluster());
    const Work work(problem, plan);
    if (thread_index() < 32 * plan.warps)
        compute_rows<divergence, delta>(problem, plan, work, exchange);
    else
        copy_rows(problem, plan, work, exchange);
    sync_cluster();  // no block leaves while another may still write to it
}

}  // namespace hero
