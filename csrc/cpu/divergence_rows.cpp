// Entry points of the library: instruction set, threads, scratch memory.

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#ifdef HERO_X86
#include <xmmintrin.h>
#endif

#include "../rows.h"

HeroRowFunction hero_row_baseline, hero_row_avx2, hero_row_avx512;

namespace {

enum InstructionSet { BASELINE = 0, AVX2 = 1, AVX512 = 2 };

HeroRowFunction* row_function(int instruction_set) {
#ifdef HERO_X86
    if (instruction_set == AVX512) return hero_row_avx512;
    if (instruction_set == AVX2) return hero_row_avx2;
#endif
    return instruction_set == BASELINE ? hero_row_baseline : nullptr;
}

// While it lives, results of this thread below 1e-38 become 0: tails of peaked distributions are
// full of them, they count for nothing, and x86 is slow at them.
struct FlushSubnormals {
#ifdef HERO_X86
    const unsigned saved = _mm_getcsr();
    FlushSubnormals() { _mm_setcsr(saved | 0x8000u); }
    ~FlushSubnormals() { _mm_setcsr(saved); }
#else
    ~FlushSubnormals() {}
#endif
};

}  // namespace

extern "C" {

int hero_abi_version() {
    return HERO_ABI_VERSION;
}

// The best InstructionSet of this machine.
int hero_instruction_set() {
#ifdef HERO_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512) return AVX512;
    if (avx2) return AVX2;
#endif
    return BASELINE;
}

// Asks the system to back these bytes by huge pages, before they are first touched: a fresh buffer
// costs a page fault for each page.
void hero_advise_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Returns 0, 1 (out of memory) or 2 (unknown instruction set). A row is the work of one thread from
// end to end, so the result does not depend on their number.
int hero_divergence_rows(const RowsProblem* problem, int instruction_set) {
    HeroRowFunction* const run = row_function(instruction_set);
    if (!run) return 2;
    // Whole vectors; and no multiple of 4096 bytes, where a load waits for stores to other arrays.
    const int64_t stride = (problem->columns + 15) / 16 * 16 + 272;
    const size_t bytes = HERO_SCRATCH_ARRAYS * stride * sizeof(float);
    int out_of_memory = 0;
#pragma omp parallel num_threads(problem->num_threads) reduction(| : out_of_memory)
    {
        const FlushSubnormals guard;
        void* scratch = nullptr;
        out_of_memory = posix_memalign(&scratch, 64, bytes) != 0;
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < problem->rows; ++row)
            if (!out_of_memory) run(*problem, row, static_cast<float*>(scratch), stride);
        free(scratch);
    }
    return out_of_memory;
}
}
