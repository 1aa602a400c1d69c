"""A warm start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import MinLen

from hero.config.kinds import Chance, Count, CountOrZero, Positive, PromptStyle, Settings
from hero.config.parts import EnvConfig, ModelConfig


@dataclass(kw_only=True)
class ScratchConfig(Settings):
    """Shape of a small model made from nothing."""

    width: Count = 128
    layers: Count = 3
    heads: Count = 4
    context: Count = 1024
    init_std: Positive = 0.1
    """transformers' 0.02 is far too small at this width."""


@dataclass(kw_only=True)
class SftConfig(Settings):
    """A warm start."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(path=""))
    """The model to start from; path "" is a new one of `scratch`'s shape."""
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    prompts: PromptStyle = "standard"
    """Wording of what teachers and reflectors read."""
    max_turns: Count = 8
    """Cap of turns per episode."""
    demonstrator_episodes: CountOrZero = 1500
    """Episodes of the imperfect demonstrator: plain targets, and a part of the others."""
    coverage_episodes: CountOrZero = 1500
    """Near-perfect and noisy episodes: hindsight and diagnosis targets only."""
    coverage_noise: Annotated[list[Chance], MinLen(1)] = field(
        default_factory=lambda: [0.0, 0.15, 0.4]
    )
    """Share of random actions of the coverage episodes, in turn."""
    blank_contexts: Chance = 0.0
    """Share of the demonstrator's turns that are shown with a context that says nothing.

    The target is then the demonstrator's own action. Without them a small model learns that any
    context at all means "act like an expert", and what the context says no longer matters
    (docs/results.md)."""
    look_ahead: Count = 1
    """Turns whose observations a context shows at most, drawn anew each time; what the teacher of a
    run with the same `teacher.look_ahead` has to read."""
    diagnoses: Literal["faults", "all"] = "faults"
    """What a reflection is taught to list: turns with a fault, as requests ask, or all of them.

    The second is longer to write; the agents that the studies start from learnt it."""
    steps: Count = 3000
    """Optimiser steps."""
    batch_size: Count = 4
    """Episodes of each kind in a step."""
    learning_rate: Positive = 5e-3
    warmup_steps: CountOrZero = 50
    micro_batch_tokens: Count = 16384
    """Tokens in one forward pass. Gradients accumulate: results do not depend on it."""
    save_every: Count = 500
    """Steps between checkpoints for going on; the last state is always saved."""
    seed: int = 0
    threads: Count | None = None
    """CPU threads; None leaves torch's default."""
    output_dir: str = "models/sft"
    """New folder for model and tokenizer."""
