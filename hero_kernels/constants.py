"""The numbers that several kernels share: columns of their results, codes, and thresholds.

torch takes them from here, Triton too (as `tl.constexpr`); csrc/constants.h repeats them for C++
and CUDA, and a test holds the two together.

Glossary. A row is the logits of one token, a column one token of the vocabulary; `_t` is the
teacher's side, `_s` the student's. z are scaled logits, p = exp(log-softmax z), and

    gap     z_s - z_t; for a shared head it comes from (h_s - h_t)·Wᵀ, without cancellation
    shift   a constant of the row near the typical gap: x0 = gap - shift is small where it counts
    growth  sum p_t expm1(x0), up to the normaliser: how far the shifted student's mass exceeds 1
    offset  log(1 + growth), so that x = log p_s - log p_t = x0 - offset
    centre  what the gradient's bracket subtracts, so that the gradient of a row sums to 0
"""

from __future__ import annotations

DIVERGENCE_CODES = {"jsd": 0, "forward_kl": 1, "reverse_kl": 2}
JSD, FORWARD_KL, REVERSE_KL = DIVERGENCE_CODES.values()

NUM_STATS = 8
DIVERGENCE, RATIO, LOGPROB_S, LOGPROB_T, ENTROPY_S, ENTROPY_T, TOP1 = range(7)
"""Columns of what whole rows return, [R, 8]: the divergence without weight and ratio, the
importance ratio, log p(target) of both sides, both entropies, top-1 agreement. The last one is
reserved."""

NUM_STATISTICS = 11
(
    MAX_T,  # max of z_t; MASKED without columns
    SUM_T,  # sum exp(z_t - MAX_T)
    MAX_S,
    SUM_S,
    SHIFT,
    GROWTH,  # sum exp(z_t - MAX_T) expm1(x0)
    MEAN,  # sum exp(z_s - MAX_S) x0
    TARGET_T,  # z_t at the target, 0 where it lies in another tile: tiles add up
    TARGET_GAP,  # gap at the target, likewise
    TOP_T,  # first column that attains MAX_T, as a float: exact below 2^24
    TOP_S,
) = range(NUM_STATISTICS)
"""Columns of the statistics of a tile, [R, 11]."""

NUM_VALUES = 4
VALUE, CENTRE, VALUE_ENTROPY_S, VALUE_ENTROPY_T = range(NUM_VALUES)
"""Columns of the values of a tile, [R, 4]: its share of the divergence, of the centre, of the
entropies. Values of tiles add up."""

NUM_LOGPROB_STATS = 4
LOGPROB, ENTROPY, MAXIMUM, LOG_MASS = range(NUM_LOGPROB_STATS)
"""Columns of what `linear_logprobs` keeps of each row, [R, 4]: log p(target), entropy, the largest
z, log sum exp(z - MAXIMUM)."""

MASKED = -1e30
"""Stands for a logit of -inf: finite, so that the difference of two is 0."""
LOG_RATIO_LIMIT = 1e4
"""Bound of |x| in fp32, where one side alone is masked; exp of it is infinite anyway."""
CLOSE_LOG_RATIO = 1.0
"""Below this |x| expm1 and the quadratic remainder come from series, p_s from p_t·exp(x)."""
NEARBY_MAXIMA = 0.25
"""Maxima closer than this need no shift: growth stays below NEAR_GROWTH without it."""
NEAR_GROWTH = 0.5
"""Below it log1p(growth) is used; above, or where it overflowed, the two normalisers."""
WIDE_LOG_RATIO = 30.0
"""Above it p·exp(x) is formed by an exponential of its own (C++ and CUDA)."""
