"""Before training: can this model learn here, and from whom? Minutes, no weight is changed.

The gap between teacher and student before training predicts the gain of self-distillation
(arXiv 2605.30070); `hero study` fits a line to its own runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hero.algorithms import MODES, Experience
from hero.checks import from_dict
from hero.config import TrainConfig
from hero.envs.base import Environment, HasDiagnosis
from hero.episodes import gold_episodes, rewarded
from hero.evaluation import Probe, agreement, probe_teacher
from hero.policy import Policy
from hero.prompts import make_prompts
from hero.recipes import merge
from hero.reflection import Reflections, make_reflector
from hero.sampler import HFSampler
from hero.teacher import TeacherContext, TeacherWeights
from hero.types import Trajectory

NOTHING = {"observation": False, "reward": False, "diagnosis": False, "corrected_action": False}
CONTEXTS: dict[str, dict[str, Any]] = {
    "raw observation": {"mode": "env_only"},
    "self reflection": {"mode": "hero", "reflection": {"reflector": "self"}},
    "rules": {"mode": "hero", "reflection": {"reflector": "rules"}},
    "rules, hint alone": {"mode": "reflection_only", "reflection": {"reflector": "rules"}},
    "demonstration": {"mode": "full_demo"},
    "outcome": {"mode": "terminal"},
    "shuffled": {"mode": "hero", "reflection": {"reflector": "rules", "shuffle_hints": "causes"}},
    "unrelated": {
        "mode": "hero", "reflection": {"reflector": "rules", "shuffle_hints": "unrelated"}
    },
    "empty": {"mode": "hero", "reflection": {"reflector": "rules"}, "teacher": NOTHING},
}  # fmt: skip
"""What teachers are shown: settings on top of the run's. The last three are controls."""
CONTROLS = ("shuffled", "unrelated", "empty")


def measure(
    policy: Policy, config: TrainConfig, env: Environment, trajectories: Sequence[Trajectory],
    seed: int, max_turns: int = 128,
) -> tuple[Probe | None, Reflections]:  # fmt: skip
    """The gap of a run's teacher on finished episodes, and what its reflector wrote.

    Args:
        policy: teacher and student before training are the same weights, unless `config` names
            another model as teacher.
        config: mode, reflector and block of the run.
        env: judges answers; without a diagnosis there is no gap.
        trajectories: of the student, without reward of the wrong kind.
        seed: of reflection and answers.
        max_turns: so many turns are answered again.
    """
    paid = rewarded([replace(t) for t in trajectories], config.env.reward)
    sampler = HFSampler(policy, config.rollout.batch_size)
    prompts, renderer = make_prompts(config.prompts), policy.renderer
    weights = TeacherWeights(policy, replace(config.teacher, weights="live"))
    teacher_sampler = HFSampler(weights.policy, config.rollout.batch_size)
    algorithm = MODES[config.mode](TeacherContext(config.teacher, renderer, prompts))
    reflections = Reflections.none(paid)
    if algorithm.needs_reflection:
        reflector = make_reflector(
            config.reflection, env=env, sampler=sampler, renderer=renderer, prompts=prompts,
            teacher_sampler=teacher_sampler, teacher_weights=weights.applied,
            context=min(policy.context, weights.policy.context),
        )  # fmt: skip
        reflections = reflector.reflect(paid, seed)
    if not algorithm.distils or not isinstance(env, HasDiagnosis):
        return None, reflections
    tasks = {trajectory.task_id for trajectory in paid}
    gold = gold_episodes(env, tasks, config.rollout.max_turns) if algorithm.needs_gold else {}
    samples = algorithm.annotate(
        Experience(trajectories=paid, diagnoses=reflections.diagnoses, gold=gold)
    )
    found = probe_teacher(
        env, paid, reflections.diagnoses, samples, sampler=sampler, teacher_sampler=teacher_sampler,
        weights=weights, renderer=renderer, seed=seed, max_turns=max_turns,
        max_turn_tokens=config.rollout.max_turn_tokens,
    )  # fmt: skip
    return found, reflections


def contexts(
    policy: Policy, data: dict[str, Any], env: Environment, trajectories: Sequence[Trajectory],
    seed: int,
) -> tuple[dict[str, Probe], dict[str, float]]:  # fmt: skip
    """The gap of each of `CONTEXTS` that the world allows, and how well the model reflects."""
    gaps, reflecting = {}, {}
    for name, settings in CONTEXTS.items():
        config: TrainConfig = from_dict(merge(data, settings))
        if config.reflection.reflector == "rules" and not isinstance(env, HasDiagnosis):
            continue
        gap, read = measure(policy, config, env, trajectories, seed)
        if gap is not None:
            gaps[name] = gap
        if name == "self reflection":
            reflecting = {"parsed": read.stats.parsed / max(1, read.stats.turns)}
            for key, value in agreement(env, trajectories, read.diagnoses).items():
                reflecting[key.removeprefix("agreement/")] = value
    return gaps, reflecting


def advice(success: float, well_formed: float, silent: float, gaps: dict[str, Probe]) -> list[str]:
    """What the figures say, in words.

    Args:
        success: share of episodes.
        well_formed: share of actions that could be read.
        silent: share of groups of eight without any difference in reward.
        gaps: of each context.
    """
    said = []
    if well_formed < 0.5:
        said.append(
            f"Only {well_formed:.0%} of the actions can be read: give it a warm start first (hero "
            "sft, where the environment can demonstrate), or a model that follows the format."
        )
    if success > 0.95:
        said.append(f"Success is {success:.0%} already: little is left to learn here.")
    real = {name: gap.gap for name, gap in gaps.items() if name not in CONTROLS}
    fake = max((gap.gap for name, gap in gaps.items() if name in CONTROLS), default=0.0)
    if real:
        best = max(real, key=lambda name: real[name])
        if real[best] <= max(0.02, fake):
            said.append(
                f"No context helps more than a control does (best: {best}, {real[best]:+.2f}; best "
                f"control {fake:+.2f}): there is nothing to distil. Train with rewards (reinforce, "
                "grpo), or give it a warm start."
            )
        else:
            said.append(
                f"Worth distilling: {best} ({real[best]:+.2f} of all actions become right; the "
                f"best control {fake:+.2f})."
            )
    said.append(
        f"{silent:.0%} of groups of eight show GRPO no difference"
        + (": too many to learn from at a small budget." if silent > 0.7 else ".")
    )
    return said
