// Packing of the operands of a bf16 block, and unpacking of its results.
//
// A packed right operand consists of steps of 32 k, each two tiles of 16 pairs of k by 16 columns.
#pragma once

#include <algorithm>

#include "bf16_block.h"

namespace {

// 16 x 16 32-bit numbers, transposed: row i of the result is column i of the rows at `from`.
HERO_TARGET_BF16 void transpose_16x16(const Bf16* from, int64_t stride, uint32_t* to) {
    __m512i r[16], t[16];
    for (int i = 0; i < 4; ++i) {
        // Row j of the four 4 x 4 blocks that end up under each other: the loads do half the work.
        for (int j = 0; j < 4; ++j) {
            const Bf16* at = from + j * stride + 8 * i;
            __m512i row = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)at));
            row = _mm512_inserti32x4(row, _mm_loadu_si128((const __m128i*)(at + 4 * stride)), 1);
            row = _mm512_inserti32x4(row, _mm_loadu_si128((const __m128i*)(at + 8 * stride)), 2);
            row = _mm512_inserti32x4(row, _mm_loadu_si128((const __m128i*)(at + 12 * stride)), 3);
            r[4 * i + j] = row;
        }
        t[4 * i + 0] = _mm512_unpacklo_epi32(r[4 * i + 0], r[4 * i + 1]);
        t[4 * i + 1] = _mm512_unpackhi_epi32(r[4 * i + 0], r[4 * i + 1]);
        t[4 * i + 2] = _mm512_unpacklo_epi32(r[4 * i + 2], r[4 * i + 3]);
        t[4 * i + 3] = _mm512_unpackhi_epi32(r[4 * i + 2], r[4 * i + 3]);
        _mm512_store_si512(to + 64 * i + 0, _mm512_unpacklo_epi64(t[4 * i + 0], t[4 * i + 2]));
        _mm512_store_si512(to + 64 * i + 16, _mm512_unpackhi_epi64(t[4 * i + 0], t[4 * i + 2]));
        _mm512_store_si512(to + 64 * i + 32, _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]));
        _mm512_store_si512(to + 64 * i + 48, _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]));
    }
}

// A matrix in memory.
struct Matrix {
    const Bf16* data;
    int64_t rows, columns, stride;
};

// Rows [row, row + 32) of `m` as columns: packed B of a product with mᵀ, all of its k.
void pack_transposed(const Matrix& m, int64_t row, int64_t steps, Bf16* packed) {
    const int64_t count = std::min<int64_t>(SIDE, m.rows - row);
    for (int64_t step = 0; step < steps; ++step, packed += PANEL) {
        const int64_t k = step * STEP;
        if (count == SIDE && k + STEP <= m.columns) {
            const Bf16* from = m.data + row * m.stride + k;
            transpose_16x16(from, m.stride, (uint32_t*)packed);
            transpose_16x16(from + 16 * m.stride, m.stride, (uint32_t*)(packed + PANEL / 2));
            continue;
        }
        memset(packed, 0, PANEL * sizeof(Bf16));
        const int64_t depth = std::min<int64_t>(STEP, m.columns - k);
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < depth; ++j)
                packed[i / 16 * (PANEL / 2) + j / 2 * 32 + i % 16 * 2 + j % 2] =
                    m.data[(row + i) * m.stride + k + j];
    }
}

// Columns [column, column + 32) and rows [row, row + 32·steps) of `m`: packed B of a product with
// m. The columns come out permuted; `unpermute` puts the results back in order.
HERO_TARGET_BF16 void pack_interleaved(const Matrix& m, int64_t row, int64_t column, int64_t steps,
                                       Bf16* packed) {
    const int64_t count = std::min<int64_t>(SIDE, m.columns - column);
    const __mmask32 mask = count == SIDE ? ~0u : (1u << count) - 1;
    for (int64_t step = 0; step < steps; ++step, packed += PANEL) {
        for (int64_t pair = 0; pair < STEP / 2; ++pair) {
            const int64_t k = row + step * STEP + 2 * pair;
            const Bf16* from = m.data + k * m.stride + column;
            const __m512i even =
                k < m.rows ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
            const __m512i odd = k + 1 < m.rows ? _mm512_maskz_loadu_epi16(mask, from + m.stride)
                                               : _mm512_setzero_si512();
            _mm512_store_si512(packed + 32 * pair, _mm512_unpacklo_epi16(even, odd));
            _mm512_store_si512(packed + PANEL / 2 + 32 * pair, _mm512_unpackhi_epi16(even, odd));
        }
    }
}

// One row of a block whose columns were permuted by `pack_interleaved`, in order.
HERO_TARGET_BF16 inline void unpermute(const float* row, __m512& low, __m512& high) {
    const __m512 a = _mm512_loadu_ps(row), b = _mm512_loadu_ps(row + 16);
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    low = _mm512_permutex2var_ps(a, first, b);
    high = _mm512_permutex2var_ps(a, second, b);
}

// 32 rows from `row` on and `depth` columns from `column` on, filled up with zeros.
void copy_rows(const Matrix& m, int64_t row, int64_t column, int64_t depth, Bf16* to) {
    memset(to, 0, SIDE * depth * sizeof(Bf16));
    const int64_t count = std::min<int64_t>(SIDE, m.rows - row);
    const int64_t width = std::min<int64_t>(depth, m.columns - column);
    for (int64_t i = 0; i < count; ++i)
        memcpy(to + i * depth, m.data + (row + i) * m.stride + column, width * sizeof(Bf16));
}

// Writes `count` columns of two vectors as `mode` says.
HERO_TARGET_BF16 inline void store_pair(__m512 low, __m512 high, int64_t count, int mode,
                                        void* out) {
    const __mmask16 first = count >= 16 ? 0xffff : (1u << count) - 1;
    const __mmask16 second = count >= 32 ? 0xffff : count <= 16 ? 0 : (1u << (count - 16)) - 1;
    if (mode == HERO_STORE_BF16) {
        Bf16* to = static_cast<Bf16*>(out);
        _mm256_mask_storeu_epi16(to, first, (__m256i)_mm512_cvtneps_pbh(low));
        if (second) _mm256_mask_storeu_epi16(to + 16, second, (__m256i)_mm512_cvtneps_pbh(high));
        return;
    }
    float* to = static_cast<float*>(out);
    if (mode == HERO_ADD_FLOAT) {
        low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(first, to));
        high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(second, to + 16));
    }
    _mm512_mask_storeu_ps(to, first, low);
    if (second) _mm512_mask_storeu_ps(to + 16, second, high);
}

HERO_TARGET_BF16 void store_block(const float* block, bool permuted, int64_t rows, int64_t columns,
                                  int mode, void* out, int64_t stride) {
    const int64_t size = mode == HERO_STORE_BF16 ? 2 : 4;
    for (int64_t i = 0; i < std::min<int64_t>(rows, SIDE); ++i) {
        __m512 low = _mm512_loadu_ps(block + i * SIDE), high = _mm512_loadu_ps(block + i * SIDE + 16);
        if (permuted) unpermute(block + i * SIDE, low, high);
        store_pair(low, high, columns, mode, static_cast<char*>(out) + i * stride * size);
    }
}

}  // namespace
