"""Exact, fused divergences between a student and a teacher language model, on any device.

`reference` is the definition, `explain` says what a call would do.
"""

from hero_kernels.aggregation import token_coefficients
from hero_kernels.backends import supports
from hero_kernels.cpu import release_memory
from hero_kernels.from_logits import divergence_from_logits
from hero_kernels.functional import fused_linear_divergence
from hero_kernels.logprobs import linear_logprobs
from hero_kernels.modules import FusedLinearDivergence, LinearLogprobs
from hero_kernels.objective import DivergenceOutput, KernelOptions, Objective
from hero_kernels.planning import explain

__version__ = "0.1.0"

__all__ = [
    "DivergenceOutput",
    "FusedLinearDivergence",
    "KernelOptions",
    "LinearLogprobs",
    "Objective",
    "divergence_from_logits",
    "explain",
    "fused_linear_divergence",
    "linear_logprobs",
    "release_memory",
    "supports",
    "token_coefficients",
]
