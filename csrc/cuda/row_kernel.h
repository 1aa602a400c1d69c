// One row, a cluster of blocks: divergence, statistics and gradient. Formulas as in
// csrc/cpu/row_kernel.cpp, in sweeps over a row that lies in shared memory:
//
//   sweep 1   maxima, normalisers, log sum p_t exp(delta), and for reverse KL its mean log ratio
//   sweep 2   the divergence, entropies; for both KLs the gradient too
//   sweep 3   the gradient of the JSD, which needs sweep 2's KL(p_s || m)
//
// A row is read from global memory once, as soon as its stages are free: while the last sweep over
// one row runs, the next row comes in behind it. Sweep 2 then leaves in place of the logits what
// sweep 3 needs (`leaves`; logits of 16 bits have no room for it). A row that no cluster can
// hold is read once for each sweep, through the same stages.
#pragma once

#include "row_copies.h"
#include "row_near.h"

namespace hero {

// The target's logits. They come first: the gradient may overwrite them.
struct Target {
    int64_t id = -1;
    float teacher = 0.0f, student = 0.0f, log_ratio = 0.0f;
};

HERO_DEVICE float load_element(const char* row, int32_t dtype, int64_t column) {
    if (dtype == FLOAT32) return reinterpret_cast<const float*>(row)[column];
    return from_half(dtype, reinterpret_cast<const uint16_t*>(row)[column]);
}

template <bool delta>
HERO_DEVICE Target load_target(const RowsProblem& problem, const char* teacher, const char* student,
                               const Scaling& scaling, int row) {
    Target target;
    if (!problem.target_ids) return target;
    target.id = problem.target_ids[row];
    if (target.id >= problem.vocab_size) target.id = -1;  // unchecked on the device: no read there
    if (target.id < 0) return target;
    float slope;
    transform<delta>(problem, scaling, static_cast<int>(target.id),
                     load_element(teacher, problem.teacher_dtype, target.id),
                     load_element(student, problem.student_dtype, target.id), target.teacher,
                     target.student, target.log_ratio, slope);
    return target;
}

// Calls body(place) for the thread's columns of a slice. `incoming`: tiles are still being copied;
// `release`: this is the last time that they are read; `written`: or written.
template <class Body>
HERO_DEVICE Position visit(const RowsProblem& problem, const Plan& plan, const Work& work,
                           Exchange& exchange, const Lanes& lanes, int row, Position at,
                           bool incoming, bool release, bool written, Body body) {
    char* memory = shared_memory();
    const int group = thread_index() / 32 * GROUP;
    char* teacher = memory + EXCHANGE_BYTES + lead_of(teacher_row(problem, row));
    char* student = memory + plan.student_offset + lead_of(student_row(problem, row));
    const int real = static_cast<int>(problem.vocab_size) - GROUP;
    for (int tile = 0; tile < plan.tiles; ++tile) {
        if (incoming) wait(&exchange.full[at.stage], at.parity);
        const int first = tile * plan.warps * GROUP + group;  // within the slice
        if (first < work.slice_end - work.slice_begin) {
            const int begin = work.slice_begin + first;
            body(Place{teacher + at.stage * plan.teacher_stage,
                       student + at.stage * plan.student_stage, group + lanes.offset,
                       begin + lanes.offset, begin <= real});
        }
        if (release) {
            if (written) fence_copies();
            sync_warp();
            if (thread_index() % 32 == 0) arrive(&exchange.empty[at.stage]);
        }
        at.advance(plan.stages);
    }
    return at;
}

// `visit` with the logits: calls near(raw, place), which may return false, and then
// far(logits, place).
template <bool delta, class Near, class Far>
HERO_DEVICE Position sweep(const RowsProblem& problem, const Plan& plan, const Work& work,
                           Exchange& exchange, const Lanes& lanes, int row, const Scaling& scaling,
                           Position at, bool incoming, bool release, Near near, Far far) {
    return visit(problem, plan, work, exchange, lanes, row, at, incoming, release, false,
                 [&](const Place& place) {
                     // The usual case is written for itself: nothing is asked column by column.
                     bool plain = scaling.plain && place.inside;
                     Raw raw;
                     if (plain) {
                         load_pieces(place.teacher, FLOAT32, place.in_tile, raw.teacher);
                         load_pieces(place.student, problem.student_dtype, place.in_tile,
                                     raw.student);
                         if (near(raw, place)) return;
                         plain = none_masked<delta>(raw);
                     }
                     if (plain)
                         far(plain_logits<delta>(raw, scaling), place);
                     else
                         far(load_logits<delta>(problem, lanes, scaling, place), place);
                 });
}

// What sweep 1 knows of a row: its statistics, but for those of `Values`. Returns the importance
// ratio. `out` is null in all threads but the one that writes.
HERO_DEVICE float row_statistics(const RowsProblem& problem, const Masses& masses,
                                 const Normaliser& n, const Target& target, int row, float* out) {
    const bool has_target = target.id >= 0;
    const float teacher = (target.teacher - n.max_teacher) - n.log_teacher;
    const float x = n.x(target.log_ratio);
    const float own = (target.student - n.max_student) - n.log_student;
    // Close to the teacher's it keeps delta's accuracy; beyond, its own sum is as accurate.
    const float student =
        lowest(n.near && magnitude(x) < CLOSE_LOG_RATIO ? teacher + x : own, 0.0f);
    float ratio = 1.0f;
    if (has_target && problem.old_logprobs) {
        ratio = expf(student - problem.old_logprobs[row]);
        ratio = problem.is_clip > 0 && ratio > problem.is_clip ? problem.is_clip : ratio;
    }
    if (out) {
        out[RATIO] = ratio;
        out[LOGPROB_S] = has_target ? student : 0.0f;
        out[LOGPROB_T] = has_target ? lowest(teacher, 0.0f) : 0.0f;
        const bool agree =
            masses.top_teacher == masses.top_student && masses.top_teacher < problem.vocab_size;
        out[TOP1] = agree ? 1.0f : 0.0f;
    }
    return ratio;
}

template <int divergence, bool delta, bool leaves>
HERO_DEVICE void compute_rows(const RowsProblem& problem, const Plan& plan, const Work& work,
                              Exchange& exchange) {
    constexpr bool is_jsd = divergence == JSD;
    const Lanes lanes(plan);
    const Mixture mixture(problem.beta, problem.one_minus_beta);
    const bool with_stats = problem.with_stats;
    // Of an uneven mixture the student's top token is searched: see `Centre`.
    const bool may_be_near =
        divergence != REVERSE_KL && !with_stats && (!is_jsd || mixture.even());
    const bool resident = leaves || plan.resident;
    const bool third = leaves || work.sweeps == 3;
    const int32_t left_dtype = problem.student_dtype == FLOAT32 ? FLOAT32 : FLOAT16;
    uint32_t reductions = 0;
    Position at;
    for (int row = work.first_row; row < problem.rows; row += work.row_step) {
        const char* teacher = teacher_row(problem, row);
        const char* student = student_row(problem, row);
        char* grad =
            const_cast<char*>(row_of(problem.grad, problem.grad_dtype, problem.grad_stride, row));
        const Scaling scaling(problem, lanes, row);
        const Target target = load_target<delta>(problem, teacher, student, scaling, row);
        const Position start = at;

        Masses mine = no_masses();
        NearMasses near_masses_sum = {};
        bool is_first = true;
        at = sweep<delta>(
            problem, plan, work, exchange, lanes, row, scaling, at, true, !resident,
            [&](const Raw& raw, const Place&) {
                if (!may_be_near) return false;
                const bool near =
                    near_masses<divergence, delta>(raw, scaling, is_first, mine, near_masses_sum);
                is_first = is_first && !near;
                return near;
            },
            [&](const Logits& z, const Place& place) {
                add_masses<divergence, delta>(z, lanes, place.column, is_first, with_stats, mine,
                                              near_masses_sum);
                is_first = false;
            });
        join(mine, near_masses_sum);
        const Masses masses = reduce_cluster(
            exchange, plan, work.rank, reductions++, true, mine, no_masses(),
            [&](const Masses& sums) { return combine<divergence>(sums, with_stats); });
        const Normaliser n(masses);
        Centre centre = Centre::of<divergence>(masses, n, mixture);

        float* out = work.rank == 0 && thread_index() == 0
                         ? problem.stats + static_cast<int64_t>(row) * NUM_STATS
                         : nullptr;
        const float ratio = row_statistics(problem, masses, n, target, row, out);
        const float weight = problem.row_weights[row];
        const float scale = weight * ratio * problem.logit_scale * scaling.inv_temperature *
                            (is_jsd ? mixture.other : 1.0f);
        // Writes a gradient of the thread's columns: zero in padding, and where the weight is zero
        // even if the row holds NaN.
        const int columns = static_cast<int>(problem.columns);
        const int vocab_size = weight != 0.0f ? static_cast<int>(problem.vocab_size) : 0;
        const auto store = [&](float* gradient, const Place& place) {
            if (lanes.step == 1 && place.inside && weight != 0.0f) {
                store_pieces(problem.grad_dtype, grad, place.column, gradient);
                return;
            }
            HERO_UNROLL
            for (int i = 0; i < COLUMNS_PER_THREAD; ++i)
                if (place.column + i * lanes.step >= vocab_size) gradient[i] = 0.0f;
            store_columns(problem.grad_dtype, grad, columns, lanes, place.column, gradient);
        };
        const auto scale_and_store = [&](const Logits& z, float* gradient, const Place& place) {
            HERO_UNROLL
            for (int i = 0; i < COLUMNS_PER_THREAD; ++i)
                gradient[i] *= z.plain ? scale : z.slope[i] * scale;
            store(gradient, place);
        };

        Values values = no_values();
        NearValues near_values_sum = {};
        const bool last = !resident || !third;
        const Position second = resident ? start : at;
        at = sweep<delta>(
            problem, plan, work, exchange, lanes, row, scaling, second, !resident, last,
            [&](const Raw& raw, const Place& place) {
                Left left;
                if (!is_jsd || !near_values<delta>(raw, scaling, n, mixture, centre, with_stats,
                                                   near_values_sum, left))
                    return false;
                if (leaves) {
                    store_pieces(FLOAT32, place.teacher, place.in_tile, left.bracket);
                    store_pieces(left_dtype, place.student, place.in_tile, left.student);
                }
                return true;
            },
            [&](const Logits& z, const Place& place) {
                float gradient[COLUMNS_PER_THREAD];
                Left left;
                add_values<divergence, delta>(z, n, mixture, centre, with_stats, values, gradient,
                                              left);
                if (!is_jsd && problem.grad) scale_and_store(z, gradient, place);
                if (leaves) {
                    HERO_UNROLL
                    for (int i = 0; i < COLUMNS_PER_THREAD; ++i) {
                        left.bracket[i] *= z.slope[i];
                        left.student[i] *= z.slope[i];
                    }
                    store_columns(FLOAT32, place.teacher, INT32_MAX, lanes, place.in_tile,
                                  left.bracket);
                    store_columns(left_dtype, place.student, INT32_MAX, lanes, place.in_tile,
                                  left.student);
                }
            });
        if (is_jsd) add(values, near_values_sum.values());
        // Without a third sweep the sums are only to be written down.
        values = reduce_cluster(
            exchange, plan, work.rank, reductions++, third, values, no_values(),
            [&](const Values& sums) { return combine<divergence>(sums, with_stats); });
        if (is_jsd) centre.mean = values.centre;
        if (leaves) {
            const float factor = scale / UNIT;
            at = visit(problem, plan, work, exchange, lanes, row, start, false, true, true,
                       [&](const Place& place) {
                           Left left;
                           load_stored(place.teacher, FLOAT32, place.in_tile, lanes, left.bracket);
                           load_stored(place.student, left_dtype, place.in_tile, lanes,
                                       left.student);
                           HERO_UNROLL
                           for (int i = 0; i < COLUMNS_PER_THREAD; ++i)
                               left.bracket[i] =
                                   (left.bracket[i] - centre.mean * left.student[i]) * factor;
                           store(left.bracket, place);
                       });
        } else if (is_jsd && third) {
            const auto gradient_of = [&](const Logits& z, const Place& place) {
                float gradient[COLUMNS_PER_THREAD];
                jsd_gradient<delta>(z, n, mixture, centre, gradient);
                scale_and_store(z, gradient, place);
            };
            at = sweep<delta>(
                problem, plan, work, exchange, lanes, row, scaling, resident ? start : at, !resident,
                true, [](const Raw&, const Place&) { return false; }, gradient_of);
        }

        if (out) {
            out[DIVERGENCE] = values.divergence;
            out[ENTROPY_S] = values.student_entropy;
            out[ENTROPY_T] = values.teacher_entropy;
            out[NUM_STATS - 1] = 0.0f;
            // Garbage behind a mask must not poison the weighted sum.
            if (weight == 0.0f && !(magnitude(values.divergence) < INFINITY))
                for (int i = 0; i < NUM_STATS; ++i) out[i] = 0.0f;
        }
    }
}

// Whether sweep 2 of the JSD can leave in a row's stages what sweep 3 needs.
inline bool leaves(const RowsProblem& problem, const Plan& plan) {
    return problem.divergence == JSD && problem.grad && plan.resident &&
           problem.teacher_dtype == FLOAT32 &&
           (problem.student_dtype == FLOAT32 || problem.grad_dtype != FLOAT32);
}

// The whole kernel: `plan.warps` warps compute, one more copies.
template <int divergence, bool delta, bool leaves>
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
    sync_cluster();
    const Work work(problem, plan);
    if (thread_index() < 32 * plan.warps)
        compute_rows<divergence, delta, leaves>(problem, plan, work, exchange);
    else
        copy_rows(problem, plan, work, exchange);
    sync_cluster();  // no block leaves while another may still write to it
}

}  // namespace hero
