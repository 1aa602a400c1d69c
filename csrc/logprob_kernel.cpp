// One row: log p(y) and entropy of its softmax, or their gradient. Compiled once for each
// instruction set (setup.py), with HERO_LOGPROB_FUNCTION naming the result; logprob_rows.cpp
// chooses among them at run time.
//
//   log p_j = z_j - maximum - log_mass,  log_mass = log sum exp(z_j - maximum)
//   entropy = log_mass - sum p_j (z_j - maximum)
//   d(a log p_y + b entropy)/dz_j = a ([j = y] - p_j) - b p_j (log p_j + entropy)
//
// Each of the two reads the row once: the statistics with a maximum that grows from block to block,
// as in an online softmax, and the gradient with what they left. A block of columns stays in the
// first-level cache from its load to its last use, so there is no scratch row. Sums run in fp32
// within a block and in fp64 across blocks; the order depends on the shape alone.

#include <math.h>

#include "logprobs_problem.h"
#include "rows_problem.h"
#include "storage.h"
#include "vector_math.h"

namespace {

constexpr int64_t BLOCK = 1024;
// Beneath every log-probability that counts: exp is 0 there, and its product with it is 0 too,
// which for the -inf of a masked column it would not be.
constexpr float LOWEST = -1e4f;

// A block of logits z; the distance of the arrays is no multiple of 4096 bytes, where a load would
// wait for stores to the other.
struct alignas(64) Block {
    float z[BLOCK + 272];
    float slope[BLOCK];  // d z / d raw logit without its constant factor; soft-cap only
};

// z = cap((raw + bias) * logit_scale) * inv_temperature, cap(z) = softcap * tanh(z / softcap).
void read_block(const LogprobsProblem& problem, const void* row, int64_t begin, int64_t count,
                Block& block) {
    float* z = block.z;
    load(problem.logits_dtype, row, begin, count, z);
    if (problem.bias) {
        const float* bias = problem.bias + begin;
        for (int64_t i = 0; i < count; ++i) z[i] += bias[i];
    }
    const float cap = problem.softcap;
    if (cap > 0) {
        const float inner = problem.logit_scale / cap;
        const float outer = cap * problem.inv_temperature;
        float* slope = block.slope;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
            const float u = z[i] * inner;
            const float fall = exponential(-2.0f * magnitude(u));
            const float shrink = exponential_minus_1(-2.0f * magnitude(u));
            z[i] = outer * with_sign(shrink / (1.0f + fall), u);
            slope[i] = 4.0f * fall / ((1.0f + fall) * (1.0f + fall));
        }
        return;
    }
    const float scale = problem.logit_scale * problem.inv_temperature;
    if (scale != 1.0f)
        for (int64_t i = 0; i < count; ++i) z[i] *= scale;
}

struct Sums {
    float maximum = -3e38f;  // finite: the first block may be all -inf
    double mass = 0;      // sum exp(z - maximum)
    double weighted = 0;  // sum exp(z - maximum) (z - maximum)
};

template <bool entropy>
void add_block(const float* z, int64_t count, Sums& sums) {
    float top = sums.maximum;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < count; ++i) top = z[i] > top ? z[i] : top;
    if (top > sums.maximum) {
        if (sums.mass > 0) {
            const double fall = static_cast<double>(sums.maximum) - top;
            sums.weighted = (sums.weighted + fall * sums.mass) * exp(fall);
            sums.mass *= exp(fall);
        }
        sums.maximum = top;
    }
    float mass = 0, weighted = 0;
#pragma omp simd reduction(+ : mass, weighted)
    for (int64_t i = 0; i < count; ++i) {
        const float below = at_least(z[i] - top, LOWEST);
        const float e = exponential(below);
        mass += e;
        if (entropy) weighted += e * below;
    }
    sums.mass += mass;
    sums.weighted += weighted;
}

void write_stats(const LogprobsProblem& problem, const void* logits, int64_t index) {
    const int64_t size = problem.vocab_size;
    Block block;
    Sums sums;
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
        const int64_t count = size - begin < BLOCK ? size - begin : BLOCK;
        read_block(problem, logits, begin, count, block);
        if (problem.with_entropy)
            add_block<true>(block.z, count, sums);
        else
            add_block<false>(block.z, count, sums);
    }
    const double log_mass = log(sums.mass);
    float* stats = problem.stats + index * HERO_LOGPROB_STATS;
    stats[HERO_LOGPROB] = 0.0f;
    stats[HERO_ENTROPY] = 0.0f;
    stats[HERO_MAXIMUM] = sums.maximum;
    stats[HERO_LOG_MASS] = static_cast<float>(log_mass);
    if (problem.with_entropy)
        stats[HERO_ENTROPY] = static_cast<float>(log_mass - sums.weighted / sums.mass);
    const int64_t target = problem.target_ids[index];
    if (target >= 0) {
        read_block(problem, logits, target, 1, block);
        const double below = static_cast<double>(block.z[0]) - sums.maximum;
        stats[HERO_LOGPROB] = static_cast<float>(below - log_mass);
    }
}

void write_gradient(const LogprobsProblem& problem, const void* logits, int64_t index, void* grad) {
    const int64_t target = problem.target_ids[index];
    const float of_logprob = target < 0 ? 0.0f : problem.upstream[2 * index];
    const float of_entropy = problem.upstream[2 * index + 1];
    if (of_logprob == 0.0f && of_entropy == 0.0f)  // whatever the row holds
        return clear(problem.grad_dtype, 0, problem.columns, grad);
    const float* stats = problem.stats + index * HERO_LOGPROB_STATS;
    const float entropy = stats[HERO_ENTROPY];
    const float maximum = stats[HERO_MAXIMUM];
    const float log_mass = stats[HERO_LOG_MASS];
    const float factor = problem.logit_scale * problem.inv_temperature;
    const int64_t size = problem.vocab_size;
    Block block;
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
        const int64_t count = size - begin < BLOCK ? size - begin : BLOCK;
        read_block(problem, logits, begin, count, block);
        float* z = block.z;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
            const float log_p = at_least((z[i] - maximum) - log_mass, LOWEST);
            const float p = exponential(log_p);
            z[i] = -factor * p * (of_logprob + of_entropy * (log_p + entropy));
        }
        if (target >= begin && target < begin + count) z[target - begin] += factor * of_logprob;
        if (problem.softcap > 0)
            for (int64_t i = 0; i < count; ++i) z[i] *= block.slope[i];
        store(problem.grad_dtype, z, begin, count, grad);
    }
    clear(problem.grad_dtype, size, problem.columns, grad);
}

void* row_of(const void* tensor, int32_t dtype, int64_t stride, int64_t row) {
    const int64_t size = dtype == HERO_FLOAT32 ? 4 : 2;
    return const_cast<char*>(static_cast<const char*>(tensor)) + row * stride * size;
}

}  // namespace

void HERO_LOGPROB_FUNCTION(const LogprobsProblem& problem, int64_t index) {
    const void* logits = row_of(problem.logits, problem.logits_dtype, problem.logits_stride, index);
    if (problem.upstream)
        write_gradient(problem, logits, index,
                       row_of(problem.grad, problem.grad_dtype, problem.grad_stride, index));
    else
        write_stats(problem, logits, index);
}
