"""Facts about a run, for its header, its summary and its report."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import hero_kernels
from hero.algorithms import MODES
from hero.config import TrainConfig, redacted
from hero.policy import Policy
from hero.state import State

TEACHER_WEIGHTS = {
    "ema": "slowly averaged weights",
    "frozen": "the starting weights",
    "live": "its present weights",
}


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("hero-kernels", "torch", "transformers", "triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def reflector_facts(config: TrainConfig) -> dict[str, str]:
    """`reflector`: who reads the episodes of this run; `reflector_reason`: one sentence on it."""
    reflection = config.reflection
    if not MODES[config.mode].needs_reflection:
        return {"reflector": "none", "reflector_reason": f"mode {config.mode} uses no reflection"}
    reason = {
        "self": "the student itself reads its episodes, with its present weights",
        "teacher": f"{config.teacher.path}, another model, reads the student's episodes"
        if config.teacher.path
        else "the same model reads its own episodes, with "
        f"{TEACHER_WEIGHTS[config.teacher.weights]}: one that learns to act while it reflects "
        "forgets how to diagnose",
        "rules": "the environment's own deterministic diagnosis: for tests and for models too "
        "small to reflect",
        "openai": f"{reflection.model} at {reflection.base_url}",
    }[reflection.reflector]
    return {"reflector": reflection.reflector, "reflector_reason": redacted(reason)}


def outcome(recipe: str, config: TrainConfig, state: State, device: str) -> dict[str, Any]:
    """What `summary.json` says of a run that has ended, without its evaluations."""
    return {
        "recipe": recipe,
        "stopped": state.stopped,
        "selected": config.eval.select,
        "best_update": state.best_update,
        "rescues": state.rescues,
        "refreshes": state.refreshes,
        "env_turns": state.env_turns,
        "device": device,
        "versions": versions(),
        **reflector_facts(config),
    }


def header(config: TrainConfig, policy: Policy) -> dict[str, str]:
    """What is about to run: name and value of each line of `Console.header`."""
    weight, reflector = policy.head.weight, reflector_facts(config)
    options = " ".join(f"{key}={value}" for key, value in redacted(config.env.options).items())
    loss = hero_kernels.explain(
        1024, weight.shape[1], weight.shape[0], dtype=policy.dtype, device=policy.device,
        shared_head=not config.teacher.path
        and (config.teacher.weights == "live" or not weight.requires_grad),
        trainable_head=weight.requires_grad, support=config.loss.support, impl=config.loss.impl,
    )  # fmt: skip
    alone = policy.unpacked(config.rollout.max_episode_tokens)
    return {
        "model": f"{config.model.path} ({_count(policy.num_parameters)} parameters, "
        f"{_count(sum(p.numel() for p in policy.trainable().values()))} trained)",
        "device": f"{policy.device}, {str(policy.dtype).removeprefix('torch.')}"
        + (f", {processes} processes" if (processes := policy.shards.ranks.size) > 1 else ""),
        **({"rows": f"one by one, which takes several times as long: {alone}"} if alone else {}),
        "environment": f"{config.env.name} {options}".strip(),
        "mode": config.mode,
        "seed": f"{config.seed}, learning rate {config.optim.learning_rate:g}",
        "reflector": f"{reflector['reflector']}: {reflector['reflector_reason']}",
        "divergence": loss.splitlines()[0].removeprefix("implementation: "),
    }


def _count(number: int) -> str:
    """1234567 -> "1.2M"."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
