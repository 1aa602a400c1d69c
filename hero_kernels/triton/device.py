"""Elementary functions for the row kernels, accurate relative to their result also near zero.

The formulas of csrc/cpu/vector_math.h, in fp32: Triton's interpreter gets bf16 arithmetic wrong.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Arguments of @triton.jit functions are typed by Triton.

from __future__ import annotations

import triton
import triton.language as tl

from hero_kernels import constants

LOG_RATIO_LIMIT = tl.constexpr(constants.LOG_RATIO_LIMIT)
CLOSE = tl.constexpr(constants.CLOSE_LOG_RATIO)
_LOG2_E = tl.constexpr(1.4426950408889634)
_EXP_LIMIT = tl.constexpr(80.0)
"""exp of it is finite, and exp of its negative counts nothing in a sum of probabilities."""


@triton.jit
def exp(x):
    """exp(x), 0 below 2^-126: two instructions, where tl.exp takes five to keep denormals."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def quadratic_remainder(x):
    """(exp(x) - 1 - x) / x^2 for |x| <= 1 by its Taylor series; relative error below 1e-7."""
    x2 = x * x
    low = (1.0 / 2 + x * (1.0 / 6)) + x2 * (1.0 / 24 + x * (1.0 / 120))
    high = (1.0 / 720 + x * (1.0 / 5040)) + x2 * (1.0 / 40320 + x * (1.0 / 362880))
    x4 = x2 * x2
    return low + x4 * (high + x4 * (1.0 / 3628800))


@triton.jit
def exp_minus_1(x):
    """exp(x) - 1; infinite above 88."""
    near = x + x * x * quadratic_remainder(x)
    return tl.where(tl.abs(x) <= CLOSE, near, exp(x) - 1.0)


@triton.jit
def log_1_plus(t, total):
    """log(total), where `total` is 1 + t > 0, rounded."""
    # 1 + t = 2^k m with m in [sqrt(1/2), sqrt(2)); where k = 0 the fraction is t itself, unrounded.
    bits = total.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    k = (bits >> 23) - 127
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = tl.where(k == 0, t, m - 1.0)
    # log(1 + f) = 2 artanh(s), s = f / (2 + f), |s| < 0.172.
    s = f / (2.0 + f)
    z = s * s
    series = (1.0 / 3 + z * (1.0 / 5)) + z * z * (1.0 / 7 + z * (1.0 / 9))
    return k.to(tl.float32) * 0.6931471805599453 + (2.0 * s + 2.0 * s * z * series)


@triton.jit
def kl_term(p, q, x):
    """q - p - p x >= 0: the column's share of KL(p || q) where log q - log p = x."""
    near = p * (x * x) * quadratic_remainder(x)
    return tl.where(tl.abs(x) <= CLOSE, near, (q - p) - p * x)


@triton.jit
def bounded(log_ratio):
    """Within -LOG_RATIO_LIMIT and LOG_RATIO_LIMIT; a NaN stays a NaN."""
    return tl.clamp(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def probabilities(log_p, log_q, x):
    """p_t, p_s, and p_s - p_t without cancellation, where x = log p_s - log p_t."""
    p, q = exp(log_p), exp(log_q)
    near = p * (x + x * x * quadratic_remainder(x))
    is_close = tl.abs(x) <= CLOSE
    return p, tl.where(is_close, p + near, q), tl.where(is_close, near, q - p)


@triton.jit
def exp_both_ways(x):
    """exp(x), exp(-x), exp(x) - 1 and exp(-x) - 1, for |x| up to `_EXP_LIMIT`."""
    size = tl.minimum(tl.abs(x), _EXP_LIMIT)
    decay = exp(-size)
    fall = tl.where(size <= CLOSE, size * (size * quadratic_remainder(-size) - 1.0), decay - 1.0)
    growth = 1.0 / decay
    rise = -fall * growth
    return (
        tl.where(x > 0.0, growth, decay),
        tl.where(x > 0.0, decay, growth),
        tl.where(x > 0.0, rise, fall),
        tl.where(x > 0.0, fall, rise),
    )


@triton.jit
def log_mixture(x, beta, other_beta):
    """log m - log p_t and log m - log p_s, m = beta p_t + other_beta p_s, beta + other_beta = 1.

    m / p_t = 1 + other_beta (exp(x) - 1) = beta + other_beta exp(x), m / p_s likewise: of the two
    forms one is exact near 1, the other far from it, also where beta is near 0 or 1.
    """
    e_x, e_minus_x, to_student, to_teacher = exp_both_ways(x)
    from_teacher = log_1_plus(other_beta * to_student, beta + other_beta * e_x)
    return from_teacher, log_1_plus(beta * to_teacher, other_beta + beta * e_minus_x)


@triton.jit
def sign_times(size, sign):
    """`size` with the sign of `sign`."""
    return tl.where(sign < 0.0, -size, size)


@triton.jit
def soft_cap(z, cap):
    """cap * tanh(z / cap), and its slope without the cancellation of 1 - tanh^2."""
    u = z / cap
    fall = exp(-2.0 * tl.abs(u))
    capped = sign_times(-cap * exp_minus_1(-2.0 * tl.abs(u)) / (1.0 + fall), u)
    return capped, 4.0 * fall / ((1.0 + fall) * (1.0 + fall))


@triton.jit
def soft_cap_gap(gap, z, cap):
    """soft_cap(z + gap) - soft_cap(z) = cap sinh(gap/cap) / (cosh((z+gap)/cap) cosh(z/cap))."""
    d, v = gap / cap, z / cap
    size, a, b = tl.abs(d), tl.abs(v + d), tl.abs(v)
    # All exponents are at most 0.
    decay = exp(tl.minimum(size - a - b, 0.0))
    scale = (1.0 + exp(-2.0 * a)) * (1.0 + exp(-2.0 * b))
    return sign_times(-2.0 * cap * exp_minus_1(-2.0 * size) * decay / scale, d)
