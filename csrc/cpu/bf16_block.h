// One block of a bf16 product: 32 x 32 results, by AMX tiles or by AVX-512's vdpbf16ps.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "bf16_gemm.h"

namespace {

typedef uint16_t Bf16;

constexpr int64_t SIDE = 32;         // rows and columns of a block
constexpr int64_t STEP = 32;         // k of one tile
constexpr int64_t PANEL = SIDE * STEP;  // elements of one packed step: two tiles of 16 x 16 pairs
constexpr int64_t BLOCK = SIDE * SIDE;  // results of a block

int64_t blocks_of(int64_t size, int64_t side) {
    return (size + side - 1) / side;
}

struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

#define HERO_TARGET_AMX __attribute__((target("amx-tile,amx-bf16")))
#define HERO_TARGET_BF16 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

HERO_TARGET_AMX void configure_tiles() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.rows[i] = 16, config.row_bytes[i] = 64;
    __asm__ volatile("" ::"m"(config));  // the intrinsic does not say that it reads all of it
    _tile_loadconfig(&config);
}

HERO_TARGET_AMX void release_tiles() {
    _tile_release();
}

// `out` and `out_stride` (in floats) say where the tiles go; with `add` they come from there too.
HERO_TARGET_AMX void block_amx(const Bf16* a, int64_t a_stride, const Bf16* b, int64_t steps,
                               float* out, int64_t out_stride, bool add) {
    const int64_t bytes = 2 * a_stride;
    const int64_t out_bytes = 4 * out_stride;
    const Bf16* lower = a + 16 * a_stride;
    float* out_lower = out + 16 * out_stride;
    if (add) {
        _tile_loadd(0, out, out_bytes);
        _tile_loadd(1, out + 16, out_bytes);
        _tile_loadd(2, out_lower, out_bytes);
        _tile_loadd(3, out_lower + 16, out_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(4, a + step * STEP, bytes);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + PANEL / 2, 64);
        _tile_loadd(5, lower + step * STEP, bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        b += PANEL;
    }
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + 16, out_bytes);
    _tile_stored(2, out_lower, out_bytes);
    _tile_stored(3, out_lower + 16, out_bytes);
}

HERO_TARGET_BF16 void block_avx512(const Bf16* a, int64_t a_stride, const Bf16* b, int64_t steps,
                                   float* out, int64_t out_stride, bool add) {
    constexpr int ROWS = 8;  // 16 sums, 2 packed rows: 18 of the 32 registers
    for (int64_t row = 0; row < SIDE; row += ROWS) {
        __m512 left[ROWS], right[ROWS];
        for (int i = 0; i < ROWS; ++i) {
            const float* from = out + (row + i) * out_stride;
            left[i] = add ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
            right[i] = add ? _mm512_loadu_ps(from + 16) : _mm512_setzero_ps();
        }
        const Bf16* packed = b;
        const Bf16* rows = a + row * a_stride;
        for (int64_t step = 0; step < steps; ++step, packed += PANEL, rows += STEP) {
            for (int pair = 0; pair < 16; ++pair) {
                const __m512bh b_left = (__m512bh)_mm512_loadu_si512(packed + 32 * pair);
                const __m512bh b_right =
                    (__m512bh)_mm512_loadu_si512(packed + PANEL / 2 + 32 * pair);
                for (int i = 0; i < ROWS; ++i) {
                    int32_t both;
                    memcpy(&both, rows + i * a_stride + 2 * pair, sizeof both);
                    const __m512bh value = (__m512bh)_mm512_set1_epi32(both);
                    left[i] = _mm512_dpbf16_ps(left[i], value, b_left);
                    right[i] = _mm512_dpbf16_ps(right[i], value, b_right);
                }
            }
        }
        for (int i = 0; i < ROWS; ++i) {
            float* to = out + (row + i) * out_stride;
            _mm512_storeu_ps(to, left[i]);
            _mm512_storeu_ps(to + 16, right[i]);
        }
    }
}

typedef void (*BlockFunction)(const Bf16*, int64_t, const Bf16*, int64_t, float*, int64_t, bool);

// What a thread needs while it multiplies.
class Multiplier {
 public:
    explicit Multiplier(int kind) : amx_(kind == HERO_GEMM_AMX) {
        if (amx_) configure_tiles();
    }
    ~Multiplier() {
        if (amx_) release_tiles();
    }
    Multiplier(const Multiplier&) = delete;
    Multiplier& operator=(const Multiplier&) = delete;
    BlockFunction block() const { return amx_ ? block_amx : block_avx512; }

 private:
    const bool amx_;
};

}  // namespace
