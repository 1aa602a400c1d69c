// What divergence_rows.cpp calls: the work on one row, compiled for several instruction sets.
#pragma once

#include "../rows.h"

// `scratch` holds SCRATCH_ARRAYS arrays of `scratch_stride` floats, aligned to 64 bytes.
constexpr int SCRATCH_ARRAYS = 4;
typedef void (*RowFunction)(const RowsProblem&, int64_t row, float* scratch, int64_t scratch_stride);

void hero_row_baseline(const RowsProblem&, int64_t, float*, int64_t);
void hero_row_avx2(const RowsProblem&, int64_t, float*, int64_t);
void hero_row_avx512(const RowsProblem&, int64_t, float*, int64_t);
