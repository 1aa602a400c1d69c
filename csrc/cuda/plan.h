// How a problem is laid out on a GPU: blocks of a cluster, slices of a row, stages of shared
// memory. Plain host code, shared by the launcher and by the emulator.
#pragma once

#include <stdint.h>

#include "../rows.h"

namespace hero {

constexpr int COLUMNS_PER_THREAD = 8;
constexpr int GROUP = 32 * COLUMNS_PER_THREAD;  // columns that a warp works on at once
constexpr int MAX_CLUSTER = 16;                 // of the hardware; above 8 it is not portable
constexpr int MAX_WARPS = 15;                   // that compute; one more copies
constexpr int SMALL_WARPS = 7;                  // the same where two blocks share a multiprocessor
constexpr int MAX_STAGES = 16;
constexpr int MAX_THREADS = 32 * (MAX_WARPS + 1);
constexpr int EXCHANGE_BYTES = 4096;  // barriers and partial results, before the stages

// A row is cut into one slice for each block of a cluster, a slice into tiles of one group for each
// warp. A tile lies in a stage of shared memory: teacher's logits and student's logits.
struct Plan {
    int32_t cluster_size;    // blocks that share a row
    int32_t warps;           // that compute
    int32_t slice_columns;   // of one block, a multiple of GROUP
    int32_t tiles;           // of one slice
    int32_t stages;          // tiles that fit into shared memory
    int32_t resident;        // 1: all tiles of a slice, read once; 0: read again in every sweep
    int32_t vectors;         // 1: every row can be read and written in pieces of 16 bytes
    int32_t teacher_stage;   // bytes
    int32_t student_stage;   // bytes
    int32_t student_offset;  // bytes from the start of shared memory
    int32_t shared_bytes;    // of a block
};

// What a GPU offers.
struct Limits {
    int32_t shared_per_block, shared_per_processor;  // bytes
    int32_t max_cluster;                             // 1 without clusters
};

inline int32_t dtype_size(int32_t dtype) {
    return dtype == FLOAT32 ? 4 : 2;
}

inline bool is_aligned(const void* pointer, int64_t stride, int32_t dtype) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * dtype_size(dtype) % 16 == 0;
}

// The plan for a given cluster. `stages`: how many tiles are held at once; 0 for the whole slice.
inline Plan lay_out(const RowsProblem& problem, int32_t cluster_size, int32_t warps,
                    int32_t stages) {
    Plan plan = {};
    const int32_t columns = static_cast<int32_t>(problem.columns);
    const int32_t tile = warps * GROUP;
    const int32_t share = (columns + cluster_size - 1) / cluster_size;
    plan.cluster_size = cluster_size;
    plan.warps = warps;
    plan.slice_columns = (share + GROUP - 1) / GROUP * GROUP;
    plan.tiles = (plan.slice_columns + tile - 1) / tile;
    plan.resident = stages == 0;
    plan.stages = plan.resident ? plan.tiles : stages;
    plan.vectors =
        is_aligned(problem.student, problem.student_stride, problem.student_dtype) &&
        is_aligned(problem.teacher, problem.teacher_stride, problem.teacher_dtype) &&
        (!problem.grad || is_aligned(problem.grad, problem.grad_stride, problem.grad_dtype));
    // Copies are of whole 16 bytes: a tile that does not begin at such a border needs 16 more.
    plan.teacher_stage = tile * dtype_size(problem.teacher_dtype) + 16;
    plan.student_stage = tile * dtype_size(problem.student_dtype) + 16;
    // Of the whole slice, the last tile is only as long as what is left.
    const int32_t held = plan.resident ? plan.slice_columns : plan.stages * tile;
    const int32_t padding = plan.stages * 16;
    plan.student_offset = EXCHANGE_BYTES + held * dtype_size(problem.teacher_dtype) + padding;
    plan.shared_bytes = plan.student_offset + held * dtype_size(problem.student_dtype) + padding;
    return plan;
}

inline bool fits(const RowsProblem& problem, int32_t cluster_size, int32_t warps, int64_t bytes) {
    const int64_t size =
        dtype_size(problem.teacher_dtype) + static_cast<int64_t>(dtype_size(problem.student_dtype));
    if (problem.columns / cluster_size * size > bytes) return false;  // before anything overflows
    const Plan plan = lay_out(problem, cluster_size, warps, 0);
    return plan.shared_bytes <= bytes && plan.stages <= MAX_STAGES;
}

// The smallest cluster that leaves room for a second block on each multiprocessor, whose loads then
// run while the first one computes; else the smallest that can hold a row; else no cluster, and the
// row is read in every sweep. By arithmetic, not by measurement.
inline Plan choose_plan(const RowsProblem& problem, const Limits& limits) {
    const int64_t half = limits.shared_per_processor / 2 - 1024;  // a block costs 1 KB besides
    const int64_t shared = limits.shared_per_block;
    for (int32_t size = 1; size <= limits.max_cluster && size <= 8; size *= 2)
        if (fits(problem, size, SMALL_WARPS, half < shared ? half : shared))
            return lay_out(problem, size, SMALL_WARPS, 0);
    for (int32_t size = 1; size <= limits.max_cluster; size *= 2)
        if (fits(problem, size, MAX_WARPS, shared)) return lay_out(problem, size, MAX_WARPS, 0);
    int32_t stages = MAX_STAGES;
    while (stages > 1 && lay_out(problem, 1, MAX_WARPS, stages).shared_bytes > shared) --stages;
    return lay_out(problem, 1, MAX_WARPS, stages);
}

}  // namespace hero
