"""Algorithms annotate turns; trainer and loss are blind to them. Each mode is one small class."""

from hero.algorithms.base import Algorithm, Episodes
from hero.algorithms.distillation import (
    EnvOnly,
    FullDemo,
    Hero,
    ReflectionOnly,
    Sdpo,
    Terminal,
)
from hero.algorithms.grpo import Grpo, HeroGrpo
from hero.teacher import TeacherContext

MODES: dict[str, type[Algorithm]] = {
    "hero": Hero,
    "env_only": EnvOnly,
    "reflection_only": ReflectionOnly,
    "terminal": Terminal,
    "full_demo": FullDemo,
    "sdpo": Sdpo,
    "grpo": Grpo,
    "hero+grpo": HeroGrpo,
}


def make_algorithm(mode: str, context: TeacherContext) -> Algorithm:
    """The algorithm of a mode; ValueError names the modes there are."""
    if mode not in MODES:
        raise ValueError(f"Unknown mode {mode!r}: expected one of {', '.join(MODES)}.")
    return MODES[mode](context)


__all__ = ["MODES", "Algorithm", "Episodes", "make_algorithm"]
