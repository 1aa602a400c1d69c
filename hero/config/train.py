"""A training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hero.config.kinds import Count, CountOrZero, PromptStyle, Settings
from hero.config.parts import (
    EngineConfig,
    EnvConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ReflectionConfig,
    RolloutConfig,
    TeacherConfig,
)


@dataclass(kw_only=True)
class TrainConfig(Settings):
    """A training run."""

    mode: str = "hero"
    """What the teacher sees and which turns are trained: hero, grpo, ... (docs/method.md)."""
    prompts: PromptStyle = "standard"
    """Wording of what teachers and reflectors read: compact is for the shipped small model."""
    model: ModelConfig = field(default_factory=ModelConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reflection: ReflectionConfig = field(default_factory=ReflectionConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    updates: Count = 100
    """Rollout batches. [L]"""
    max_env_turns: Count | None = None
    """Budget of environment turns of the whole run, never exceeded; None for no limit."""
    max_idle_updates: CountOrZero = 5
    """Stop after so many updates in a row without a step, or in which a model was asked to reflect
    and nothing could be read; 0 goes on.

    Where successes are rare GRPO has many of them and may still learn later."""
    seed: int = 0
    threads: Count | None = None
    """CPU threads; None leaves torch's default."""
    output_dir: str = ""
    """Folder of the run; "" makes runs/NAME-DATE."""
    resume: str = "never"
    """never, auto (go on if output_dir holds a checkpoint), or the folder of a run."""
    resume_anyway: bool = False
    """Go on with settings that differ from those of the run."""
    save_every: Count = 10
    """Updates between checkpoints for resuming; the last state is always saved."""
    save_trajectories: CountOrZero = 8
    """Trajectories of each update that are kept for `hero view`."""
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
    """Besides metrics.jsonl, which is always written."""
