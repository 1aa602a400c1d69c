// The C interface of the row kernels: one plain struct, no Python, no torch.
//
// hero_kernels/cpu.py mirrors this struct with ctypes. Whoever changes it raises HERO_ABI_VERSION
// in both places, so that a library built from older sources is refused instead of misread.
#pragma once

#include <stdint.h>

#include "constants.h"

#define HERO_ABI_VERSION 4

struct RowsProblem {
    // tensors; strides in elements, the last dimension is contiguous
    const void* student;           // [rows, columns] raw logits, or raw_s - raw_t if `delta`
    const void* teacher;           // [rows, columns] raw logits
    void* grad;                    // [rows, columns] or null; may be student or teacher itself
    const float* student_bias;     // [columns] or null
    const float* teacher_bias;     // [columns] or null
    const int64_t* target_ids;     // [rows] or null; -1 = no target
    const float* row_weights;      // [rows]
    const float* old_logprobs;     // [rows] or null: no importance ratio
    const float* temperatures;     // [rows] or null: `inv_temperature` holds for all rows
    const uint8_t* absolute_rows;  // [rows] or null: with delta, 1 where student holds raw_s
    float* stats;                  // [rows, NUM_STATS]
    // shapes and strides
    int64_t rows, columns, vocab_size;
    int64_t student_stride, teacher_stride, grad_stride;
    // options
    int32_t student_dtype, teacher_dtype, grad_dtype;
    int32_t divergence, delta, with_stats, num_threads;
    // scalars; softcap and is_clip: 0 = none
    float beta, one_minus_beta;  // the second not from the first: that would be rounded
    float inv_temperature, softcap, logit_scale, is_clip;
};

// The work of the C++ kernel on one row, compiled for several instruction sets. `scratch` holds
// HERO_SCRATCH_ARRAYS arrays of `scratch_stride` floats, aligned to 64 bytes.
#define HERO_SCRATCH_ARRAYS 4
typedef void HeroRowFunction(const RowsProblem&, int64_t row, float* scratch,
                             int64_t scratch_stride);
