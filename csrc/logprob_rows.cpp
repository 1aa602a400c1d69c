// Entry point of the log-probability kernel: instruction set and threads.

#include "flush_subnormals.h"
#include "logprobs_problem.h"
#include "rows_problem.h"

void hero_logprob_baseline(const LogprobsProblem&, int64_t);
#ifdef HERO_X86
void hero_logprob_avx2(const LogprobsProblem&, int64_t);
void hero_logprob_avx512(const LogprobsProblem&, int64_t);
#endif

namespace {

HeroLogprobFunction row_function(int instruction_set) {
#ifdef HERO_X86
    if (instruction_set == HERO_AVX512) return hero_logprob_avx512;
    if (instruction_set == HERO_AVX2) return hero_logprob_avx2;
#endif
    return instruction_set == HERO_BASELINE ? hero_logprob_baseline : nullptr;
}

}  // namespace

// Returns 0, or 2 for an unknown instruction set, as hero_divergence_rows. A row is the work of one
// thread from end to end, so the result does not depend on their number.
extern "C" int hero_logprob_rows(const LogprobsProblem* problem, int instruction_set) {
    const HeroLogprobFunction run = row_function(instruction_set);
    if (!run) return 2;
#pragma omp parallel num_threads(problem->num_threads)
    {
        const FlushSubnormals guard;
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < problem->rows; ++row) run(*problem, row);
    }
    return 0;
}
