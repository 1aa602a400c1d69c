// The numbers of C++ and CUDA. hero_kernels/constants.py has the same by the same names, and says
// what they mean; a test holds the two files together.
#pragma once

namespace hero {

// Codes.
constexpr int JSD = 0, FORWARD_KL = 1, REVERSE_KL = 2;
constexpr int FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2;

// Columns of the result.
constexpr int DIVERGENCE = 0, RATIO = 1, LOGPROB_S = 2, LOGPROB_T = 3, ENTROPY_S = 4, ENTROPY_T = 5,
              TOP1 = 6, NUM_STATS = 8;

// Thresholds. A row without any logit above MASKED on one side has no distribution there: all its
// numbers are NaN, as those of torch's softmax are.
constexpr float MASKED = -1e30f;
constexpr float LOG_RATIO_LIMIT = 1e4f;
constexpr float CLOSE_LOG_RATIO = 1.0f;
constexpr float NEAR_GROWTH = 0.5f;
constexpr float WIDE_LOG_RATIO = 30.0f;

// (e^x - 1 - x) / x^2 is the sum of REMAINDER_k x^k, to 2e-7 for |x| <= CLOSE_LOG_RATIO: minimax.
constexpr float REMAINDER_0 = 0.5f, REMAINDER_1 = 1.6666695e-1f, REMAINDER_2 = 4.1666515e-2f,
                REMAINDER_3 = 8.3309300e-3f, REMAINDER_4 = 1.3891335e-3f,
                REMAINDER_5 = 2.0325484e-4f, REMAINDER_6 = 2.4960811e-5f;
// log(1 + f) / f is 1 plus the sum of LOGARITHM_k f^k, to 2e-7 for f from sqrt(1/2) - 1 to
// sqrt(2) - 1: minimax.
constexpr float LOGARITHM_1 = -4.9999988e-1f, LOGARITHM_2 = 3.3334187e-1f,
                LOGARITHM_3 = -2.5002074e-1f, LOGARITHM_4 = 1.9956833e-1f,
                LOGARITHM_5 = -1.6562393e-1f, LOGARITHM_6 = 1.4952266e-1f,
                LOGARITHM_7 = -1.4366843e-1f, LOGARITHM_8 = 8.7223552e-2f;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
// LN_2 in two parts: small integers times the first are exact.
constexpr float LN_2_HIGH = 0.693359375f, LN_2_LOW = -2.12194440e-4f;

}  // namespace hero
