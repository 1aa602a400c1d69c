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
// F is `kl_term`. All values are sums of it, so they cannot come out negative, and they keep their
// relative accuracy for arbitrarily small divergences as long as delta does: nothing large cancels.
// The general case only differs in forming delta = z_s - z_t, exact in fp32 where the two are close.
// Sums run in fp32 within a block of columns and in fp64 across blocks, in an order that depends on
// the shape alone.

#include <math.h>

#include "row_logits.h"
#include "vector_math.h"

namespace {

struct Sums {
    double teacher = 0, student = 0;          // sum exp(z - max)
    double difference = 0;                    // student - teacher, summed without cancellation
    double teacher_log = 0, student_log = 0;  // sum exp(z - max) (z - max), for the entropies
};

// Pass 2: logits -> unnormalised probabilities. `wide`: some log ratio exceeds WIDE_LOG_RATIO.
template <bool wide, bool entropies>
Sums exponentiate(const Row& row, const Extremes& top, float shift, int64_t size) {
    Sums sums;
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
        const int64_t end = size - begin < BLOCK ? size : begin + BLOCK;
        Floats sum_p = {}, sum_q = {}, sum_difference = {}, sum_log_p = {}, sum_log_q = {};
        for (int64_t i = begin; i < end; i += LANES) {
            const Floats a = load_floats(row.teacher + i) - top.teacher;
            const Floats x0 = load_floats(row.log_ratio + i) - shift;
            const Floats x = at_most(at_least(x0, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT);
            const Floats p = exponential(a);
            const auto e = both_exponentials(wide ? at_most(x, WIDE_LOG_RATIO) : x);
            // Not q = p + difference: that would round small q to the spacing of p.
            Floats q = p * e.exponential;
            Floats difference = p * e.minus_1;
            if (wide || entropies) {
                const Floats b = load_floats(row.student + i) - top.student;
                if (wide) {
                    const Floats own = exponential(b);
                    q = choose(x > WIDE_LOG_RATIO, own, q);
                    difference = choose(x > WIDE_LOG_RATIO, own - p, difference);
                }
                if (entropies) {
                    sum_log_p += p * a;
                    sum_log_q += q * b;
                }
            }
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

// Whether |x| <= EVEN_LIMIT, x = log_ratio - offset, for the columns [begin, end).
inline bool all_even(const float* log_ratio, float offset, int64_t begin, int64_t end) {
    Ints far = {};
    for (int64_t i = begin; i < end; i += LANES)
        far |= magnitude(load_floats(log_ratio + i) - offset) > EVEN_LIMIT;
    return !any(far);
}

struct Value {
    double divergence, centre;  // centre: mean under q of the gradient's bracket
};

constexpr int64_t GROUP = 4 * LANES;  // columns whose log ratios are all small, or not

// Pass 3: the divergence. Leaves in log_ratio the gradient's bracket minus `reference`, or for
// forward KL q - p. One function for a row and for its reference: both round alike, except in
// a JSD whose top token has a small log ratio among large ones: only its reference is by series.
template <int divergence>
__attribute__((noinline)) Value accumulate(const Row& row, const Normaliser& n,
                                           const Mixture& mixture, float reference, int64_t size) {
    Value value = {0, 0};
    const float beta = mixture.beta, other = mixture.other, minus_reference = -reference;
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
        const int64_t end = size - begin < BLOCK ? size : begin + BLOCK;
        Floats sum = {}, centre = {};
        for (int64_t group = begin; group < end; group += GROUP) {
            const int64_t stop = end - group < GROUP ? end : group + GROUP;
            const bool even = divergence == JSD && mixture.even() &&
                              all_even(row.log_ratio, n.offset, group, stop);
            for (int64_t i = group; i < stop; i += LANES) {
                const Floats p = load_floats(row.teacher + i) * n.inv_teacher;
                const Floats q = load_floats(row.student + i) * n.inv_student;
                const Floats x = load_floats(row.log_ratio + i) - n.offset;
                Floats left;
                if (divergence == FORWARD_KL) {
                    const Floats close = p * (x + x * x * quadratic_remainder(x));
                    sum += kl_term(p, q, x);
                    left = choose(magnitude(x) <= CLOSE_LOG_RATIO, close, q - p);
                } else if (divergence == REVERSE_KL) {
                    sum += kl_term(q, p, -x);
                    left = minus_reference + x;
                    centre += q * left;
                } else if (even) {
                    const Floats t = x * x;
                    sum += 0.5f * (p + q) * even_share(t);
                    left = minus_reference + even_bracket(x, t);
                    centre += q * left;
                } else {
                    const LogMixture<Floats> log_m = log_mixture(x, mixture);
                    const Floats m = beta * p + other * q;
                    sum += beta * kl_term(p, m, log_m.from_teacher) +
                           other * kl_term(q, m, log_m.from_student);
                    left = minus_reference - log_m.from_student;
                    centre += q * left;
                }
                store_floats(row.log_ratio + i, left);
            }
        }
        value.divergence += sum_of(sum);
        value.centre += sum_of(centre);
    }
    return value;
}

// The bracket of the student's top token is subtracted from all: it cancels in the gradient. Where
// the student is confident, bracket and centre of this token are nearly the same large number, and
// their difference is its gradient; so both are formed as small numbers.
template <int divergence>
Value centred(const Row& row, const Normaliser& n, const RowsProblem& problem, int64_t top) {
    const Mixture mixture(problem.beta, problem.one_minus_beta);
    float reference = 0.0f;
    if (divergence != FORWARD_KL) {
        alignas(64) float p[LANES] = {}, q[LANES] = {}, x[LANES];
        for (float& lane : x) lane = row.log_ratio[top];
        accumulate<divergence>({p, q, x, nullptr}, n, mixture, 0.0f, LANES);
        reference = x[0];
    }
    return accumulate<divergence>(row, n, mixture, reference, problem.vocab_size);
}

// Pass 4: the gradient with respect to the raw student logits, times `scale`.
void write_gradient(const RowsProblem& problem, const Row& row, float inv_student, float centre,
                    float scale, void* grad) {
    const bool is_centred = problem.divergence != FORWARD_KL;
    const float factor = is_centred ? scale * inv_student : scale;
    const bool capped = problem.softcap > 0;
    for (int64_t begin = 0; begin < problem.vocab_size; begin += BLOCK) {
        const int64_t end = problem.vocab_size - begin < BLOCK ? problem.vocab_size : begin + BLOCK;
        for (int64_t i = begin; i < end; i += LANES) {
            Floats value = load_floats(row.log_ratio + i);
            if (is_centred) value = load_floats(row.student + i) * (value - centre);
            if (capped) value *= load_floats(row.slope + i);
            store_floats(row.log_ratio + i, factor * value);
        }
        store(problem.grad_dtype, row.log_ratio + begin, begin, end - begin, grad);
    }
    clear(problem.grad_dtype, problem.vocab_size, problem.columns, grad);
}

// Log p of the target and the importance ratio, which is returned. `student` and `teacher` are its
// logits below the maxima, `x` its log ratio.
float target_stats(const RowsProblem& problem, const Sums& sums, int64_t index, float teacher,
                   float student, double x, float* stats) {
    const double teacher_logprob = teacher - log(sums.teacher);
    // Close to the teacher's it keeps delta's accuracy; beyond, its own sum is as accurate.
    const double student_logprob = fabs(x) < CLOSE_LOG_RATIO ? teacher_logprob + x
                                                             : student - log(sums.student);
    const float logprob = at_most(static_cast<float>(student_logprob), 0.0f);
    stats[LOGPROB_S] = logprob;
    stats[LOGPROB_T] = at_most(static_cast<float>(teacher_logprob), 0.0f);
    if (!problem.old_logprobs) return 1.0f;
    const float ratio = static_cast<float>(exp(logprob - double(problem.old_logprobs[index])));
    return problem.is_clip > 0 ? at_most(ratio, problem.is_clip) : ratio;
}

// What the gradient needs of a row, beside what passes 2 and 3 leave in the row's memory.
struct Result {
    Value value;
    float inv_student, ratio;
};

Result compute(const RowsProblem& problem, const Row& row, const Extremes& top, int64_t index,
               float* stats) {
    const int64_t size = problem.vocab_size;
    const int64_t student_top = first_of(row.student, top.student, top.student_block, size);
    if (problem.with_stats)
        stats[TOP1] = student_top == first_of(row.teacher, top.teacher, top.teacher_block, size);
    const int64_t target = problem.target_ids ? problem.target_ids[index] : -1;
    const float target_teacher = target < 0 ? 0.0f : row.teacher[target] - top.teacher;
    const float target_student = target < 0 ? 0.0f : row.student[target] - top.student;

    // x is invariant under a constant; aligning the maxima keeps it small when the two logits are
    // offset.
    const Sums sums = exponentiate(row, top, top.student - top.teacher, size, problem.with_stats);
    const double growth = sums.difference / sums.teacher;
    const double offset =
        fabs(growth) < NEAR_GROWTH ? log1p(growth) : log(sums.student / sums.teacher);
    const Normaliser n = {static_cast<float>(1.0 / sums.teacher),
                          static_cast<float>(1.0 / sums.student), static_cast<float>(offset)};
    Result result = {{0, 0}, n.inv_student, 1.0f};
    if (target >= 0)
        result.ratio = target_stats(problem, sums, index, target_teacher, target_student,
                                    row.log_ratio[target] - offset, stats);
    if (problem.with_stats) {
        const double of_student = log(sums.student) - sums.student_log / sums.student;
        const double of_teacher = log(sums.teacher) - sums.teacher_log / sums.teacher;
        stats[ENTROPY_S] = at_least(static_cast<float>(of_student), 0.0f);
        stats[ENTROPY_T] = at_least(static_cast<float>(of_teacher), 0.0f);
    }
    result.value = (problem.divergence == JSD          ? centred<JSD>
                    : problem.divergence == FORWARD_KL ? centred<FORWARD_KL>
                                                       : centred<REVERSE_KL>)(row, n, problem,
                                                                              student_top);
    return result;
}

}  // namespace

void HERO_ROW_FUNCTION(const RowsProblem& problem, int64_t index, float* scratch,
                       int64_t scratch_stride) {
    const Row row = {scratch, scratch + scratch_stride, scratch + 2 * scratch_stride,
                     scratch + 3 * scratch_stride};
    const auto row_of = [index](const void* tensor, int32_t dtype, int64_t stride) {
        return (char*)tensor + index * stride * (dtype == FLOAT32 ? 4 : 2);
    };
    const void* teacher = row_of(problem.teacher, problem.teacher_dtype, problem.teacher_stride);
    const void* student = row_of(problem.student, problem.student_dtype, problem.student_stride);
    void* grad = row_of(problem.grad, problem.grad_dtype, problem.grad_stride);
    float* stats = problem.stats + index * NUM_STATS;
    for (int i = 0; i < NUM_STATS; ++i) stats[i] = 0.0f;
    const float inv_temperature =
        problem.temperatures ? 1.0f / problem.temperatures[index] : problem.inv_temperature;
    const float weight = problem.row_weights[index];

    const bool absolute = problem.absolute_rows && problem.absolute_rows[index];
    const Extremes top = load_row(problem, inv_temperature, teacher, student, absolute, row);
    Result result = {{NAN, NAN}, NAN, NAN};  // of a row without a distribution
    if (top.teacher > MASKED && top.student > MASKED)
        result = compute(problem, row, top, index, stats);
    stats[DIVERGENCE] = static_cast<float>(result.value.divergence);
    stats[RATIO] = result.ratio;
    // Garbage behind a mask must not poison the weighted sum.
    if (weight == 0.0f && !isfinite(stats[DIVERGENCE]))
        for (int i = 0; i < NUM_STATS; ++i) stats[i] = 0.0f;
    if (problem.grad && weight == 0.0f) clear(problem.grad_dtype, 0, problem.columns, grad);
    if (!problem.grad || weight == 0.0f) return;
    const float side = problem.divergence == JSD ? problem.one_minus_beta : 1.0f;
    const float scale = problem.logit_scale * inv_temperature * side * weight * result.ratio;
    write_gradient(problem, row, result.inv_student, static_cast<float>(result.value.centre), scale,
                   grad);
}
