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

// (e^x - 1 - x) / x^2 is the sum of REMAINDER_k x^k, to 1e-7 for |x| <= CLOSE_LOG_RATIO.
constexpr float REMAINDER_0 = 1.0f / 2.0f, REMAINDER_1 = 1.0f / 6.0f, REMAINDER_2 = 1.0f / 24.0f,
                REMAINDER_3 = 1.0f / 120.0f, REMAINDER_4 = 1.0f / 720.0f,
                REMAINDER_5 = 1.0f / 5040.0f, REMAINDER_6 = 1.0f / 40320.0f,
                REMAINDER_7 = 1.0f / 362880.0f, REMAINDER_8 = 1.0f / 3628800.0f;
// artanh(s) is s + s^3 times the sum of ARTANH_k s^2k, to 1e-8 for |s| < 0.172.
constexpr float ARTANH_0 = 1.0f / 3.0f, ARTANH_1 = 1.0f / 5.0f, ARTANH_2 = 1.0f / 7.0f,
                ARTANH_3 = 1.0f / 9.0f;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
// LN_2 in two parts: small integers times the first are exact.
constexpr float LN_2_HIGH = 0.693359375f, LN_2_LOW = -2.12194440e-4f;

}  // namespace hero
