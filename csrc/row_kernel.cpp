// One row: divergence, statistics and gradient. Compiled once for each instruction set (setup.py),
// with HERO_ROW_FUNCTION naming the result; divergence_rows.cpp chooses among them at run time.
//
// Per column, with p = p_t, q = p_s and x = log q - log p = delta - log1p(sum p expm1 delta):
//
//   forward KL  sum F(p, q, x)                                 gradient q - p
//   reverse KL  sum F(q, p, -x)                                gradient q (x - KL)
//   JSD         sum b F(p, m, l) + (1-b) F(q, m, l - x)        gradient (1-b) q (x - l - K)
//               m = b p + (1-b) q,  l = log m - log p,  K = KL(q || m)
//
// F(p, q, x) = q - p - p x = p (expm1 x - x) >= 0 is the column's share of KL(p || q) when log q -
// log p = x. All values are sums of it, so they cannot come out negative, and they keep their
// relative accuracy for arbitrarily small divergences as long as delta does: nothing large cancels.
// The general case only differs in forming delta = z_s - z_t, which is exact in fp32 where the two
// are close.
//
// Sums run in fp32 within a block of columns and in fp64 across blocks; the order depends on the
// shape alone.

#include <math.h>

#include "row_logits.h"
#include "rows_problem.h"
#include "storage.h"
#include "vector_math.h"

namespace {

constexpr float LOG_RATIO_LIMIT = 1e4f;  // |x| where only one side is masked
constexpr float WIDE_LOG_RATIO = 30.0f;  // above it p e^x is formed by its own exponential

struct Sums {
    double teacher = 0, student = 0;          // sum exp(z - max)
    double difference = 0;                    // student - teacher, summed without cancellation
    double teacher_log = 0, student_log = 0;  // sum exp(z - max) (z - max), for the entropies
};

// F(p, q, x).
inline Floats kl_term(Floats p, Floats q, Floats x) {
    const Floats near = p * (x * x) * quadratic_remainder(x);
    const Floats far = (q - p) - p * x;
    return choose(magnitude(x) <= 1.0f, near, far);
}

// Pass 2: logits -> unnormalised probabilities. `wide`: some log ratio exceeds WIDE_LOG_RATIO.
template <bool wide, bool entropies>
Sums exponentiate(const Row& row, const Extremes& top, float shift, int64_t size) {
    Sums sums;
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
        const int64_t end = size - begin < BLOCK ? size : begin + BLOCK;
        Floats sum_p = {}, sum_q = {}, sum_difference = {}, sum_log_p = {}, sum_log_q = {};
        for (int64_t i = begin; i < end; i += LANES) {
            const Floats a = load_floats(row.teacher + i) - top.teacher;
            const Floats x = at_most(
                at_least(load_floats(row.log_ratio + i) - shift, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT);
            const Floats p = exponential(a);
            Floats difference = p * exponential_minus_1(wide ? at_most(x, WIDE_LOG_RATIO) : x);
            if (wide || entropies) {
                const Floats b = load_floats(row.student + i) - top.student;
                if (wide)
                    difference = choose(x > WIDE_LOG_RATIO, exponential(b) - p, difference);
                if (entropies) {
                    sum_log_p += p * a;
                    sum_log_q += (p + difference) * b;
                }
            }
            const Floats q = p + difference;
            store_floats(row.teacher + i, p);
            store_floats(row.student + i, q);
            store_floats(row.log_ratio + i, x);
            sum_p += p;
            sum_q += q;
            sum_difference += difference;
        }
        sums.teacher += sum_of(sum_p);
        sums.student += sum_of(sum_q);
        sums.difference += sum_of(sum_difference);
        sums.teacher_log += sum_of(sum_log_p);
        sums.student_log += sum_of(sum_log_q);
    }
    return sums;
}

Sums exponentiate(const Row& row, const Extremes& top, float shift, int64_t size, bool entropies) {
    if (top.log_ratio - shift > WIDE_LOG_RATIO)
        return entropies ? exponentiate<true, true>(row, top, shift, size)
                         : exponentiate<true, false>(row, top, shift, size);
    return entropies ? exponentiate<false, true>(row, top, shift, size)
                     : exponentiate<false, false>(row, top, shift, size);
}

// What turns pass 2's numbers into probabilities and x.
struct Normaliser {
    float inv_teacher, inv_student;  // factors
    float offset;                    // subtracted
};

struct Value {
    double divergence = 0;
    double mean = 0;  // K: what the gradient's bracket is centred by
};

// Pass 3: the divergence. Leaves in log_ratio the gradient's bracket, or for forward KL q - p.
template <int divergence>
Value accumulate(const Row& row, const Normaliser& n, float beta, int64_t size) {
    Value value;
    const float other = 1.0f - beta;
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
        const int64_t end = size - begin < BLOCK ? size : begin + BLOCK;
        Floats sum = {}, mean = {};
        for (int64_t i = begin; i < end; i += LANES) {
            const Floats p = load_floats(row.teacher + i) * n.inv_teacher;
            const Floats q = load_floats(row.student + i) * n.inv_student;
            const Floats x = load_floats(row.log_ratio + i) - n.offset;
            Floats left;
            if (divergence == HERO_FORWARD_KL) {
                const Floats remainder = quadratic_remainder(x);
                const Floats is_near = choose(magnitude(x) <= 1.0f, all<Floats>(1.0f), Floats{});
                const Floats difference = q - p;
                sum += choose(is_near > 0.5f, p * (x * x) * remainder, difference - p * x);
                left = choose(is_near > 0.5f, p * (x + x * x * remainder), difference);
            } else if (divergence == HERO_REVERSE_KL) {
                const Floats term = kl_term(q, p, -x);
                sum += term;
                mean += term;
                left = x;
            } else {
                // log of the mixture against the more probable side: its argument stays in (-1, 0].
                const Floats weight = choose(x > 0.0f, all<Floats>(beta), all<Floats>(other));
                const Floats log_mixture =
                    log_1_plus(weight * exponential_minus_1(-magnitude(x)));
                const Floats from_teacher = choose(x > 0.0f, x + log_mixture, log_mixture);
                const Floats from_student = choose(x > 0.0f, log_mixture, log_mixture - x);
                const Floats m = beta * p + other * q;
                const Floats student_term = kl_term(q, m, from_student);
                sum += beta * kl_term(p, m, from_teacher) + other * student_term;
                mean += student_term;
                left = -from_student;
            }
            store_floats(row.log_ratio + i, left);
        }
        value.divergence += sum_of(sum);
        value.mean += sum_of(mean);
    }
    return value;
}

Value accumulate(const Row& row, const Normaliser& n, const RowsProblem& problem) {
    switch (problem.divergence) {
        case HERO_FORWARD_KL:
            return accumulate<HERO_FORWARD_KL>(row, n, problem.beta, problem.vocab_size);
        case HERO_REVERSE_KL:
            return accumulate<HERO_REVERSE_KL>(row, n, problem.beta, problem.vocab_size);
        default: return accumulate<HERO_JSD>(row, n, problem.beta, problem.vocab_size);
    }
}

// Pass 4: the gradient with respect to the raw student logits, times `scale`.
void write_gradient(const RowsProblem& problem, const Row& row, float inv_student, float mean,
                    float scale, void* grad) {
    const bool centred = problem.divergence != HERO_FORWARD_KL;
    const float side = problem.divergence == HERO_JSD ? 1.0f - problem.beta : 1.0f;
    const float outer = problem.logit_scale * problem.inv_temperature * side * scale;
    const float factor = centred ? outer * inv_student : outer;
    const bool capped = problem.softcap > 0;
    for (int64_t begin = 0; begin < problem.vocab_size; begin += BLOCK) {
        const int64_t end = problem.vocab_size - begin < BLOCK ? problem.vocab_size : begin + BLOCK;
        for (int64_t i = begin; i < end; i += LANES) {
            Floats value = load_floats(row.log_ratio + i);
            if (centred) value = load_floats(row.student + i) * (value - mean);
            if (capped) value *= load_floats(row.slope + i);
            store_floats(row.log_ratio + i, factor * value);
        }
        store(problem.grad_dtype, row.log_ratio + begin, begin, end - begin, grad);
    }
    clear(problem.grad_dtype, problem.vocab_size, problem.columns, grad);
}

const void* row_of(const void* tensor, int32_t dtype, int64_t stride, int64_t row) {
    return static_cast<const char*>(tensor) + row * stride * (dtype == HERO_FLOAT32 ? 4 : 2);
}

}  // namespace

void HERO_ROW_FUNCTION(const RowsProblem& problem, int64_t index, float* scratch,
                       int64_t scratch_stride) {
    const int64_t size = problem.vocab_size;
    const Row row = {scratch, scratch + scratch_stride, scratch + 2 * scratch_stride,
                     scratch + 3 * scratch_stride};
    const void* teacher =
        row_of(problem.teacher, problem.teacher_dtype, problem.teacher_stride, index);
    const void* student =
        row_of(problem.student, problem.student_dtype, problem.student_stride, index);
    float* stats = problem.stats + index * HERO_NUM_STATS;
    for (int i = 0; i < HERO_NUM_STATS; ++i) stats[i] = 0.0f;

    const bool absolute = problem.absolute_rows && problem.absolute_rows[index];
    const Extremes top = load_row(problem, teacher, student, absolute, row);
    const int64_t target = problem.target_ids ? problem.target_ids[index] : -1;
    const float target_teacher = target < 0 ? 0.0f : row.teacher[target] - top.teacher;
    const float target_student = target < 0 ? 0.0f : row.student[target] - top.student;
    if (problem.with_stats)
        stats[HERO_STAT_TOP1_AGREEMENT] = same_top(row, top, size) ? 1.0f : 0.0f;

    // x is invariant under a constant; aligning the maxima keeps it small when the two logits are
    // offset.
    const float shift = top.student - top.teacher;
    const Sums sums = exponentiate(row, top, shift, size, problem.with_stats);
    const double growth = sums.difference / sums.teacher;
    const double offset = fabs(growth) < 0.5 ? log1p(growth) : log(sums.student / sums.teacher);
    const Normaliser n = {static_cast<float>(1.0 / sums.teacher),
                          static_cast<float>(1.0 / sums.student), static_cast<float>(offset)};

    float ratio = 1.0f;
    if (target >= 0) {
        const double teacher_logprob = target_teacher - log(sums.teacher);
        const double target_ratio = row.log_ratio[target] - offset;
        // The difference of the two keeps delta's accuracy, unless one side is masked.
        const double student_logprob = fabs(target_ratio) < WIDE_LOG_RATIO
                                           ? teacher_logprob + target_ratio
                                           : target_student - log(sums.student);
        stats[HERO_STAT_STUDENT_LOGPROB] = static_cast<float>(student_logprob);
        stats[HERO_STAT_TEACHER_LOGPROB] = static_cast<float>(teacher_logprob);
        if (problem.old_logprobs) {
            ratio = static_cast<float>(exp(student_logprob - problem.old_logprobs[index]));
            if (problem.is_clip > 0) ratio = at_most(ratio, problem.is_clip);
        }
    }
    if (problem.with_stats) {
        stats[HERO_STAT_STUDENT_ENTROPY] =
            static_cast<float>(log(sums.student) - sums.student_log / sums.student);
        stats[HERO_STAT_TEACHER_ENTROPY] =
            static_cast<float>(log(sums.teacher) - sums.teacher_log / sums.teacher);
    }

    const Value value = accumulate(row, n, problem);
    stats[HERO_STAT_DIVERGENCE] = static_cast<float>(value.divergence);
    stats[HERO_STAT_RATIO] = ratio;
    const float weight = problem.row_weights[index];
    // Garbage behind a mask must not poison the weighted sum.
    if (weight == 0.0f && !isfinite(value.divergence))
        for (int i = 0; i < HERO_NUM_STATS; ++i) stats[i] = 0.0f;
    if (!problem.grad) return;
    void* grad =
        const_cast<void*>(row_of(problem.grad, problem.grad_dtype, problem.grad_stride, index));
    if (weight == 0.0f) {
        clear(problem.grad_dtype, 0, problem.columns, grad);
    } else {
        write_gradient(problem, row, n.inv_student, static_cast<float>(value.mean), weight * ratio,
                       grad);
    }
}
