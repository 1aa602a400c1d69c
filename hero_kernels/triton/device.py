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
_LN_2 = tl.constexpr(0.6931471805599453)
_EXP_LIMIT = tl.constexpr(80.0)
"""exp of it is finite, and exp of its negative counts nothing beside 1."""


@triton.jit
def exp(x):
    """exp(x), 0 below 2^-126: two instructions, where tl.exp takes five to keep denormals."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def quadratic_remainder(x):
    """(exp(x) - 1 - x) / x^2 for |x| <= 1: a minimax polynomial, relative error below 2e-7.

    Horner's way has the fewest instructions; other warps hide that each waits for the one before.
    """
    high = 8.330931e-03 + x * (1.3891335e-03 + x * (2.0325484e-04 + x * 2.4960811e-05))
    return 0.5 + x * (1.6666695e-01 + x * (4.1666515e-02 + x * high))


@triton.jit
def exp_minus_1(x):
    """exp(x) - 1; infinite above 88."""
    near = x + x * x * quadratic_remainder(x)
    return tl.where(tl.abs(x) <= CLOSE, near, exp(x) - 1.0)


@triton.jit
def log_1_plus(t, total):
    """log(total), where `total` is 1 + t > 0, rounded; a minimax polynomial, relative error below
    2e-7 beside the rounding of `total` far from 1."""
    # 1 + t = 2^k m with m in [sqrt(1/2), sqrt(2)); where k = 0 the fraction is t itself, unrounded.
    bits = total.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    k = (bits >> 23) - 127
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = tl.where(k == 0, t, m - 1.0)
    high = -1.6562393e-01 + f * (1.4952266e-01 + f * (-1.4366843e-01 + f * 8.7223552e-02))
    low = 3.3334187e-01 + f * (-2.5002074e-01 + f * (1.9956833e-01 + f * high))
    # f last: it is the result where f is small
    return k.to(tl.float32) * _LN_2 + (f + f * f * (-0.49999988 + f * low))


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
def log_mixture(x, beta, other_beta):
    """log m - log p_t and log m - log p_s, m = beta p_t + other_beta p_s, beta + other_beta = 1.

    m / p_s = 1 + beta (exp(-x) - 1) = other_beta + beta exp(-x): of the two forms one is exact near
    1, the other far from it, also where beta is near 0 or 1. The two logarithms differ by x; the
    first is small beside x only where its share of the divergence is.
    """
    x = tl.maximum(x, -_EXP_LIMIT)
    decay = exp(-x)
    fall = tl.where(tl.abs(x) <= CLOSE, x * (x * quadratic_remainder(-x) - 1.0), decay - 1.0)
    from_student = log_1_plus(beta * fall, other_beta + beta * decay)
    return from_student + x, from_student


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
