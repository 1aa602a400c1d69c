// The C interface of the row kernel: one plain struct, no Python, no torch.
//
// hero_kernels/cpu.py mirrors this struct with ctypes. Whoever changes it, or that of
// logprobs_problem.h, raises HERO_ABI_VERSION in both places, so that a library built from older
// sources is refused instead of misread.
#pragma once

#include <stdint.h>

#define HERO_ABI_VERSION 3

enum HeroDtype { HERO_FLOAT32 = 0, HERO_BFLOAT16 = 1, HERO_FLOAT16 = 2 };
enum HeroDivergence { HERO_JSD = 0, HERO_FORWARD_KL = 1, HERO_REVERSE_KL = 2 };
enum HeroInstructionSet { HERO_BASELINE = 0, HERO_AVX2 = 1, HERO_AVX512 = 2 };

enum HeroStat {
    HERO_STAT_DIVERGENCE = 0,
    HERO_STAT_RATIO = 1,
    HERO_STAT_STUDENT_LOGPROB = 2,
    HERO_STAT_TEACHER_LOGPROB = 3,
    HERO_STAT_STUDENT_ENTROPY = 4,
    HERO_STAT_TEACHER_ENTROPY = 5,
    HERO_STAT_TOP1_AGREEMENT = 6,
    HERO_NUM_STATS = 8,
};

struct RowsProblem {
    // tensors; strides in elements, the last dimension is contiguous
    const void* student;        // [rows, columns] logits z_s, or delta = z_s - z_t
    const void* teacher;        // [rows, columns] logits z_t
    void* grad;                 // [rows, columns] or null; may be student or teacher itself
    const float* student_bias;  // [columns] or null
    const float* teacher_bias;  // [columns] or null
    const int64_t* target_ids;  // [rows] or null; -1 = no target
    const float* row_weights;   // [rows]
    const float* old_logprobs;  // [rows] or null: no importance ratio
    const uint8_t* absolute_rows;  // [rows] or null: with delta, 1 where student holds raw z_s
    float* stats;               // [rows, HERO_NUM_STATS]
    // shapes and strides
    int64_t rows, columns, vocab_size;
    int64_t student_stride, teacher_stride, grad_stride;
    // options
    int32_t student_dtype, teacher_dtype, grad_dtype;
    int32_t divergence, delta, with_stats, num_threads;
    // scalars; softcap and is_clip: 0 = none
    float beta, inv_temperature, softcap, logit_scale, is_clip;
};

// One row, one thread. `scratch` holds HERO_SCRATCH_ARRAYS arrays of `scratch_stride` floats,
// aligned to 64 bytes.
#define HERO_SCRATCH_ARRAYS 4
typedef void (*HeroRowFunction)(const RowsProblem&, int64_t row, float* scratch,
                                int64_t scratch_stride);
