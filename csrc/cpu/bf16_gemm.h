// The C interface of the bf16 products; hero_kernels/cpu_gemm.py mirrors it.
#pragma once

#include <stdint.h>

enum HeroGemmKind { HERO_GEMM_NONE = 0, HERO_GEMM_AVX512 = 1, HERO_GEMM_AMX = 2 };
enum HeroStore { HERO_STORE_FLOAT = 0, HERO_STORE_BF16 = 1, HERO_ADD_FLOAT = 2 };

struct HeroGemm {
    const void* left;   // bf16
    const void* right;  // bf16
    void* out;          // fp32 or, for HERO_STORE_BF16, bf16
    int64_t rows, columns, depth;  // of the result, and k
    int64_t left_stride, right_stride, out_stride;  // elements; the last dimension is contiguous
    int32_t kind, store, num_threads, reserved;
};

// Each returns 0, 1 (out of memory) or 2 (not built for this platform).
extern "C" {
int hero_gemm_kind();
// out [rows, columns] = left [rows, depth] · right [columns, depth]ᵀ in fp32; if `second_left` is
// not null, second_out = second_left · rightᵀ too, of the same strides.
int hero_gemm_logits(const HeroGemm*, const void* second_left, void* second_out);
// out [rows, columns] = left [rows, depth] · right [depth, columns].
int hero_gemm_hidden(const HeroGemm*);
// out [rows, columns] (+)= left [depth, rows]ᵀ · right [depth, columns].
int hero_gemm_weight(const HeroGemm*);
}
