"""Facts about a run, for its header, its summary and its report."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import hero_kernels
from hero.algorithms import MODES
from hero.config import TrainConfig
from hero.policy import Policy


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("hero-kernels", "torch", "transformers", "triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def reflector_reason(config: TrainConfig) -> str:
    """Why this reflector reads the episodes of this run, in one sentence."""
    if not MODES[config.mode].needs_reflection:
        return f"mode {config.mode} uses no reflection"
    weights = {
        "ema": "the slowly averaged",
        "frozen": "the starting",
        "live": "the live",
    }[config.teacher.weights]
    return {
        "self": "the student itself reads its episodes, with its present weights",
        "teacher": f"the same model reads its own episodes, with {weights} weights: one that "
        "learns to act while it "
        "reflects forgets how to diagnose",
        "rules": "the environment's own deterministic diagnosis: for tests and for models too "
        "small to reflect",
        "openai": f"{config.reflection.model} at {config.reflection.base_url}",
    }[config.reflection.reflector]


def describe(config: TrainConfig, policy: Policy) -> dict[str, Any]:
    """Keyword arguments of `Console.header`."""
    weight = policy.head.weight
    options = " ".join(f"{key}={value}" for key, value in config.env.options.items())
    uses_reflection = MODES[config.mode].needs_reflection
    return {
        "model": config.model.path,
        "parameters": policy.num_parameters,
        "device": f"{policy.device}, {str(policy.dtype).removeprefix('torch.')}",
        "environment": f"{config.env.name} {options}".strip(),
        "mode": config.mode,
        "reflector": config.reflection.reflector if uses_reflection else "none",
        "reflector_reason": reflector_reason(config),
        "divergence": hero_kernels.explain(
            1024, weight.shape[1], weight.shape[0], dtype=policy.dtype, device=policy.device,
            trainable_head=weight.requires_grad, support=config.loss.support, impl=config.loss.impl,
        ).splitlines()[0],
    }  # fmt: skip
