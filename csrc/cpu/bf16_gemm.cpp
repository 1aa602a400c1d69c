// Products of bf16 matrices with fp32 results, for processors that multiply bf16 numbers: AMX tiles
// or AVX-512's vdpbf16ps. Torch's product rounds its result to bf16, which logits and sums over
// chunks cannot bear.
//
//   logits     C [M, V] = A [M, K] Wᵀ          of two left sides at once: W is read and packed once
//   hidden     C [M, H] = G [M, V] W [V, H]
//   weight     C [V, H] (+)= Gᵀ X              of G [M, V] and X [M, H]
//
// Everything is cut into blocks of 32 x 32 results, whose k comes in steps of 32:
//
//        left                 right, packed                       block
//     32 |  k ->           step: [pair of k] x [16 columns]      32 |         tiles 0 | 1
//        |  as it lies  x   two such tiles of 16 pairs side   =     | 32 ->   -----------
//        |                  by side: 32 k x 32 columns              |               2 | 3
//
//     one row of a packed tile:  c0 k0, c0 k1, c1 k0, c1 k1, ... c15 k0, c15 k1   (64 bytes)
//
// which is what both instructions want. Where k is contiguous in the right side (logits) it is packed
// by transposing 32-bit pairs; where columns are (hidden, weight), by interleaving two rows. That is
// cheap within 128-bit lanes only, so columns come out as 0-3, 8-11, 16-19, 24-27 | 4-7, 12-15, ...;
// `unpermute` puts the results back. The left side needs a contiguous k. For `weight` it has none:
// the transpose Xᵀ G is computed, and its blocks are turned.
//
// A result is the work of one thread from end to end: it does not depend on their number.

#include "bf16_gemm.h"

#ifdef HERO_BF16_GEMM

#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bf16_pack.h"

namespace {

// Scratch memory, aligned to cache lines and, where it is large, on huge pages.
class Scratch {
 public:
    explicit Scratch(int64_t bytes) {
        if (posix_memalign(&memory_, 64, std::max<int64_t>(bytes, 64))) memory_ = nullptr;
    }
    ~Scratch() { free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    template <class T>
    T* as() const {
        return static_cast<T*>(memory_);
    }

 private:
    void* memory_ = nullptr;
};

constexpr int64_t DEPTH = 1024;  // of k at once: packed panels stay in the cache

// left · right for all rows and `count` blocks of columns from block `first` on: sums of [row
// blocks][count] permuted blocks. `packed` holds count · DEPTH / STEP panels, `edge` 32 rows of DEPTH.
void multiply_run(const Matrix& left, const Matrix& right, int64_t first, int64_t count,
                  BlockFunction block, Bf16* packed, Bf16* edge, float* sums) {
    for (int64_t k = 0; k == 0 || k < right.rows; k += DEPTH) {
        const int64_t steps = blocks_of(std::min(DEPTH, right.rows - k), STEP);
        for (int64_t j = 0; j < count; ++j)
            pack_interleaved(right, k, (first + j) * SIDE, steps, packed + j * steps * PANEL);
        for (int64_t i = 0; i < blocks_of(left.rows, SIDE); ++i) {
            const bool whole =
                (i + 1) * SIDE <= left.rows && k + steps * STEP <= left.columns;
            if (!whole) copy_rows(left, i * SIDE, k, steps * STEP, edge);
            for (int64_t j = 0; j < count; ++j)
                block(whole ? left.data + i * SIDE * left.stride + k : edge,
                      whole ? left.stride : steps * STEP, packed + j * steps * PANEL, steps,
                      sums + (i * count + j) * BLOCK, SIDE, k > 0);
        }
    }
}

// A permuted block [32 a][32 b] as [32 b][32 a], in order.
HERO_TARGET_BF16 void turn(const float* block, float* turned) {
    alignas(64) float rows[BLOCK];
    for (int64_t i = 0; i < SIDE; ++i) {
        __m512 low, high;
        unpermute(block + i * SIDE, low, high);
        _mm512_store_ps(rows + i * SIDE, low);
        _mm512_store_ps(rows + i * SIDE + 16, high);
    }
    for (int64_t a = 0; a < SIDE; a += 16)
        for (int64_t b = 0; b < SIDE; b += 16) {
            alignas(64) uint32_t tile[256];
            transpose_16x16((const Bf16*)(rows + a * SIDE + b), 2 * SIDE, tile);
            for (int64_t i = 0; i < 16; ++i)
                memcpy(turned + (b + i) * SIDE + a, tile + 16 * i, 64);
        }
}

}  // namespace

extern "C" {

int hero_gemm_kind() {
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bf16");
    if (!avx512) return HERO_GEMM_NONE;
#ifdef __linux__
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    const bool tiles = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    if (tiles && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)
        return HERO_GEMM_AMX;
#endif
    // Intel's processors without AMX multiply fp32 numbers as fast; AMD's bf16 ones twice as fast.
    return __builtin_cpu_is("amd") ? HERO_GEMM_AVX512 : HERO_GEMM_NONE;
}

int hero_gemm_logits(const HeroGemm* g, const void* second_left, void* second_out) {
    const Matrix weight = {static_cast<const Bf16*>(g->right), g->columns, g->depth,
                           g->right_stride};
    const int64_t steps = blocks_of(g->depth, STEP), row_blocks = blocks_of(g->rows, SIDE);
    const int64_t sides = second_left ? 2 : 1;
    const int64_t depth = steps * STEP;
    // Left sides as 32 full rows each, k padded with zeros: small beside the head.
    Scratch left(sides * row_blocks * SIDE * depth * sizeof(Bf16));
    if (!left.as<Bf16>()) return 1;
    const void* lefts[2] = {g->left, second_left};
    float* outs[2] = {static_cast<float*>(g->out), static_cast<float*>(second_out)};
    // Columns that one thread packs at once: 128 make writes of half a kilobyte a row.
    constexpr int64_t WIDE = 4;
    const int64_t column_blocks = blocks_of(g->columns, SIDE);
    int failed = 0;
#pragma omp parallel num_threads(g->num_threads) reduction(| : failed)
    {
        Scratch packed(WIDE * steps * PANEL * sizeof(Bf16));
        failed = packed.as<Bf16>() == nullptr;
        const Multiplier multiplier(g->kind);
        const BlockFunction block = multiplier.block();
#pragma omp for schedule(static) collapse(2)
        for (int64_t side = 0; side < sides; ++side)
            for (int64_t i = 0; i < row_blocks; ++i) {
                const Matrix m = {static_cast<const Bf16*>(lefts[side]), g->rows, g->depth,
                                  g->left_stride};
                copy_rows(m, i * SIDE, 0, depth,
                          left.as<Bf16>() + (side * row_blocks + i) * SIDE * depth);
            }
#pragma omp for schedule(dynamic)
        for (int64_t wide = 0; wide < column_blocks; wide += WIDE) {
            if (failed) continue;
            const int64_t last = std::min(wide + WIDE, column_blocks);
            for (int64_t j = wide; j < last; ++j)
                pack_transposed(weight, j * SIDE, steps,
                                packed.as<Bf16>() + (j - wide) * steps * PANEL);
            for (int64_t side = 0; side < sides; ++side)
                for (int64_t i = 0; i < row_blocks; ++i) {
                    const Bf16* a = left.as<Bf16>() + (side * row_blocks + i) * SIDE * depth;
                    const int64_t rows = std::min(SIDE, g->rows - i * SIDE);
                    for (int64_t j = wide; j < last; ++j) {
                        const Bf16* b = packed.as<Bf16>() + (j - wide) * steps * PANEL;
                        const int64_t columns = std::min(SIDE, g->columns - j * SIDE);
                        float* out = outs[side] + i * SIDE * g->out_stride + j * SIDE;
                        if (rows == SIDE && columns == SIDE) {
                            block(a, depth, b, steps, out, g->out_stride, false);
                            continue;
                        }
                        alignas(64) float results[BLOCK];
                        block(a, depth, b, steps, results, SIDE, false);
                        store_block(results, false, rows, columns, HERO_STORE_FLOAT, out,
                                    g->out_stride);
                    }
                }
        }
    }
    return failed;
}

int hero_gemm_hidden(const HeroGemm* g) {
    const Matrix left = {static_cast<const Bf16*>(g->left), g->rows, g->depth, g->left_stride};
    const Matrix right = {static_cast<const Bf16*>(g->right), g->depth, g->columns,
                          g->right_stride};
    const int64_t row_blocks = blocks_of(g->rows, SIDE);
    const int64_t column_blocks = blocks_of(g->columns, SIDE);
    const int64_t size = g->store == HERO_STORE_BF16 ? 2 : 4;
    int failed = 0;
#pragma omp parallel num_threads(g->num_threads) reduction(| : failed)
    {
        // Columns are dealt out in runs, so that every thread packs its part of the head alone.
#pragma omp for schedule(static, 1)
        for (int part = 0; part < g->num_threads; ++part) {
            const int64_t first = column_blocks * part / g->num_threads;
            const int64_t count = column_blocks * (part + 1) / g->num_threads - first;
            if (count == 0) continue;
            Scratch sums(row_blocks * count * BLOCK * sizeof(float));
            Scratch packed(count * DEPTH / STEP * PANEL * sizeof(Bf16));
            Scratch edge(SIDE * DEPTH * sizeof(Bf16));
            if (!sums.as<float>() || !packed.as<Bf16>() || !edge.as<Bf16>()) {
                failed = 1;
                continue;
            }
            const Multiplier multiplier(g->kind);
            multiply_run(left, right, first, count, multiplier.block(), packed.as<Bf16>(),
                         edge.as<Bf16>(), sums.as<float>());
            for (int64_t i = 0; i < row_blocks; ++i)
                for (int64_t j = 0; j < count; ++j) {
                    const int64_t column = (first + j) * SIDE;
                    store_block(sums.as<float>() + (i * count + j) * BLOCK, true,
                                g->rows - i * SIDE, g->columns - column, g->store,
                                static_cast<char*>(g->out) +
                                    (i * SIDE * g->out_stride + column) * size,
                                g->out_stride);
                }
        }
    }
    return failed;
}

// dW: computed as its transpose, X ᵀ G, so that G needs no transposing; the results are turned.
int hero_gemm_weight(const HeroGemm* g) {
    // As the struct has it: left G [depth, rows], right X [depth, columns], out [rows, columns].
    const Matrix grad = {static_cast<const Bf16*>(g->left), g->depth, g->rows, g->left_stride};
    const Matrix hidden = {static_cast<const Bf16*>(g->right), g->depth, g->columns,
                           g->right_stride};
    constexpr int64_t WIDE = 8;      // blocks of the vocabulary that a thread packs at once
    const int64_t vocab_blocks = blocks_of(g->rows, SIDE);
    const int64_t hidden_blocks = blocks_of(g->columns, SIDE);
    const int64_t depth = blocks_of(g->depth, STEP) * STEP;
    const int64_t size = g->store == HERO_STORE_BF16 ? 2 : 4;
    Scratch turned(hidden_blocks * SIDE * depth * sizeof(Bf16));  // X ᵀ [H, depth]
    if (!turned.as<Bf16>()) return 1;
    const Matrix transposed = {turned.as<Bf16>(), hidden_blocks * SIDE, depth, depth};
    int failed = 0;
#pragma omp parallel num_threads(g->num_threads) reduction(| : failed)
    {
        Scratch sums(WIDE * hidden_blocks * BLOCK * sizeof(float));
        Scratch packed(WIDE * DEPTH / STEP * PANEL * sizeof(Bf16));
        failed = !sums.as<float>() || !packed.as<Bf16>();
        const Multiplier multiplier(g->kind);
#pragma omp for schedule(static)
        for (int64_t j = 0; j < hidden_blocks * SIDE; ++j) {
            Bf16* to = turned.as<Bf16>() + j * depth;
            memset(to, 0, depth * sizeof(Bf16));
            if (j < hidden.columns)
                for (int64_t k = 0; k < hidden.rows; ++k) to[k] = hidden.data[k * hidden.stride + j];
        }
#pragma omp for schedule(dynamic)
        for (int64_t wide = 0; wide < vocab_blocks; wide += WIDE) {
            if (failed) continue;
            const int64_t count = std::min(WIDE, vocab_blocks - wide);
            multiply_run(transposed, grad, wide, count, multiplier.block(), packed.as<Bf16>(),
                         nullptr, sums.as<float>());
            for (int64_t v = 0; v < count; ++v)
                for (int64_t j = 0; j < hidden_blocks; ++j) {
                    alignas(64) float columns[BLOCK];  // [32 vocab][32 hidden]
                    turn(sums.as<float>() + (j * count + v) * BLOCK, columns);
                    store_block(columns, false, g->rows - (wide + v) * SIDE,
                                g->columns - j * SIDE, g->store,
                                static_cast<char*>(g->out) +
                                    ((wide + v) * SIDE * g->out_stride + j * SIDE) * size,
                                g->out_stride);
                }
        }
    }
    return failed;
}
}

#else  // no such instructions on this platform, or a compiler that does not know them

extern "C" {
int hero_gemm_kind() { return HERO_GEMM_NONE; }
int hero_gemm_logits(const HeroGemm*, const void*, void*) { return 2; }
int hero_gemm_hidden(const HeroGemm*) { return 2; }
int hero_gemm_weight(const HeroGemm*) { return 2; }
}

#endif
