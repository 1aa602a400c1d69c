// The C interface of the log-probability kernel. hero_kernels/cpu_logprobs.py mirrors the struct;
// the version of both is HERO_ABI_VERSION (rows_problem.h).
#pragma once

#include <stdint.h>

enum HeroLogprobStat {
    HERO_LOGPROB = 0,      // log p(target), 0 without a target
    HERO_ENTROPY = 1,      // 0 unless asked for
    HERO_MAXIMUM = 2,      // of the row's logits z
    HERO_LOG_MASS = 3,     // log sum exp(z - maximum)
    HERO_LOGPROB_STATS = 4,
};

// With `upstream` the gradient is computed, from statistics that are then read; else the
// statistics.
struct LogprobsProblem {
    // tensors; strides in elements, the last dimension is contiguous
    const void* logits;         // [rows, columns] raw logits
    void* grad;                 // [rows, columns]; may be the logits themselves
    const float* bias;          // [columns] or null
    const int64_t* target_ids;  // [rows]; -1 = no target
    const float* upstream;      // [rows, 2] or null: gradients of log-probability and entropy
    float* stats;               // [rows, HERO_LOGPROB_STATS]
    // shapes and strides
    int64_t rows, columns, vocab_size, logits_stride, grad_stride;
    // options
    int32_t logits_dtype, grad_dtype, with_entropy, num_threads;
    // scalars; softcap: 0 = none
    float inv_temperature, softcap, logit_scale;
};

// One row, one thread.
typedef void (*HeroLogprobFunction)(const LogprobsProblem&, int64_t row);
