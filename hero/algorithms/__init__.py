"""Algorithms annotate turns; trainer and loss are blind to them. Each mode is one small class."""

from hero.algorithms.base import Algorithm, Experience
from hero.algorithms.distillation import EnvOnly, FullDemo, Hero, ReflectionOnly, Sdpo, Terminal
from hero.algorithms.grpo import Grpo, HeroGrpo
from hero.algorithms.imitation import Imitation
from hero.algorithms.reinforce import Reinforce, Rloo
from hero.algorithms.rivals import Grsd, HintSd, Sdar, SkillSd

MODES: dict[str, type[Algorithm]] = {
    "hero": Hero,
    "env_only": EnvOnly,
    "reflection_only": ReflectionOnly,
    "terminal": Terminal,
    "full_demo": FullDemo,
    "sdpo": Sdpo,
    "grpo": Grpo,
    "hero+grpo": HeroGrpo,
    "reinforce": Reinforce,
    "rloo": Rloo,
    "imitation": Imitation,
    "hint_sd": HintSd,
    "skill_sd": SkillSd,
    "sdar": Sdar,
    "grsd": Grsd,
}

__all__ = ["MODES", "Algorithm", "Experience"]
