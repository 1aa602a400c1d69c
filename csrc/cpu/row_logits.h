// Pass 1 of the row kernel: from the stored row to fp32 logits and their log ratio.
//
// z = cap((raw + bias) * logit_scale) * inv_temperature, cap(z) = softcap * tanh(z / softcap).
#pragma once

#include <math.h>

#include "../rows.h"
#include "vector_math.h"

namespace {

using namespace hero;

constexpr int64_t BLOCK = 1024;  // columns that stay in the first-level cache

// The row in fp32. Each pass overwrites what no later pass needs.
struct Row {
    float* teacher;    // z_t, then p_t up to a factor
    float* student;    // z_s, then p_s up to a factor
    float* log_ratio;  // delta, then x up to a constant, then the gradient's bracket
    float* slope;      // d z_s / d raw student logit, without its constant factor; soft-cap only
};

struct Extremes {
    float teacher = -INFINITY, student = -INFINITY, log_ratio = -INFINITY;
    int64_t teacher_block = 0, student_block = 0;  // first column of the block that has the maximum
};

// Whether a row is its own fp32 form already.
bool is_plain(const RowsProblem& problem, float inv_temperature) {
    return problem.teacher_dtype == FLOAT32 && problem.student_dtype == FLOAT32 &&
           !problem.teacher_bias && !problem.student_bias && problem.softcap <= 0 &&
           problem.logit_scale * inv_temperature == 1.0f;
}

// Raw storage -> z_t, z_s and delta of one block; `student` receives z_s or delta, as stored.
void transform(const RowsProblem& problem, float inv_temperature, int64_t begin, int64_t count,
               float* teacher, float* student, float* slope) {
    const bool delta = problem.delta;
    const float* teacher_bias = problem.teacher_bias ? problem.teacher_bias + begin : nullptr;
    const float* student_bias = problem.student_bias ? problem.student_bias + begin : nullptr;
    if (delta && (teacher_bias || student_bias)) {
        // The difference of the biases first: a shared one cancels exactly.
        for (int64_t i = 0; i < count; ++i) {
            const float before = teacher_bias ? teacher_bias[i] : 0.0f;
            const float after = student_bias ? student_bias[i] : 0.0f;
            student[i] += after - before;
        }
    } else if (student_bias) {
        for (int64_t i = 0; i < count; ++i) student[i] += student_bias[i];
    }
    if (teacher_bias)
        for (int64_t i = 0; i < count; ++i) teacher[i] += teacher_bias[i];
    if (delta)  // a masked column is masked for both, whatever the GEMM made of its delta
        for (int64_t i = 0; i < count; ++i) student[i] = teacher[i] < MASKED ? 0.0f : student[i];
    const bool capped = problem.softcap > 0;
    const float inner = capped ? problem.logit_scale : problem.logit_scale * inv_temperature;
    if (inner != 1.0f)
        for (int64_t i = 0; i < count; ++i) teacher[i] *= inner, student[i] *= inner;
    if (!capped) return;
    const float cap = problem.softcap;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) slope[i] = soft_cap(cap, delta, teacher[i], student[i]);
    for (int64_t i = 0; i < count; ++i) teacher[i] *= inv_temperature, student[i] *= inv_temperature;
}

// Pass 1: the row as fp32, and its extremes. `absolute`: with delta, this row's student holds raw_s.
Extremes load_row(const RowsProblem& problem, float inv_temperature, const void* teacher_row,
                  const void* student_row, bool absolute, const Row& row) {
    Extremes extremes;
    const bool plain = is_plain(problem, inv_temperature) && !absolute;
    const bool delta = problem.delta;
    for (int64_t begin = 0; begin < problem.vocab_size; begin += BLOCK) {
        const int64_t rest = problem.vocab_size - begin;
        const int64_t count = rest < BLOCK ? rest : BLOCK;
        float* teacher = row.teacher + begin;
        float* student = row.student + begin;
        float* log_ratio = row.log_ratio + begin;
        const float* raw_teacher = teacher;
        const float* raw_student = delta ? log_ratio : student;
        if (plain) {
            raw_teacher = static_cast<const float*>(teacher_row) + begin;
            raw_student = static_cast<const float*>(student_row) + begin;
        } else {
            float* stored = delta ? log_ratio : student;
            load(problem.teacher_dtype, teacher_row, begin, count, teacher);
            load(problem.student_dtype, student_row, begin, count, stored);
            if (absolute)
                for (int64_t i = 0; i < count; ++i) stored[i] -= teacher[i];
            transform(problem, inv_temperature, begin, count, teacher, stored, row.slope + begin);
        }

        float top_teacher = extremes.teacher, top_student = extremes.student,
              top_ratio = extremes.log_ratio;
#pragma omp simd reduction(max : top_teacher, top_student, top_ratio)
        for (int64_t i = 0; i < count; ++i) {
            const float raw = raw_teacher[i];
            const float stored = delta && raw < MASKED ? 0.0f : raw_student[i];
            const float t = at_least(raw, MASKED);
            const float s = at_least(delta ? t + stored : stored, MASKED);
            const float x = delta ? stored : s - t;
            teacher[i] = t;
            student[i] = s;
            log_ratio[i] = x;
            top_teacher = t > top_teacher ? t : top_teacher;
            top_student = s > top_student ? s : top_student;
            top_ratio = x > top_ratio ? x : top_ratio;
        }
        extremes = {top_teacher, top_student, top_ratio,
                    top_teacher > extremes.teacher ? begin : extremes.teacher_block,
                    top_student > extremes.student ? begin : extremes.student_block};
    }
    // The passes work on whole vectors: what is beyond the row has probability 0.
    for (int64_t i = problem.vocab_size; i % LANES; ++i) {
        row.teacher[i] = row.student[i] = MASKED;
        row.log_ratio[i] = extremes.log_ratio;  // never the widest, so it cannot overflow alone
        row.slope[i] = 0.0f;
    }
    return extremes;
}

// The first column that attains a maximum, which lies in this block; reads the logits, so it comes
// before pass 2.
int64_t first_of(const float* logits, float maximum, int64_t block, int64_t size) {
    const int64_t end = size - block < BLOCK ? size : block + BLOCK;
    for (int64_t i = block; i < end; ++i)
        if (logits[i] == maximum) return i;
    return block;
}

}  // namespace
