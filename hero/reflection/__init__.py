"""Hindsight reflection: a finished episode in, one diagnosis for each of its turns out.

base.py        Reflector, Reflections, ReflectionStats: the contract
make.py        make_reflector: from settings to a reflector
reflectors.py  a model that is asked, or the environment's rules
models.py      the models that can be asked: the student, its teacher
endpoint.py    and an OpenAI-compatible endpoint
parse.py       text of a model -> diagnoses, however badly written
filters.py     hints that are too long, or that tell what could not be known, are removed
votes.py       several reflections of an episode, what most of them say
verify.py      corrected actions tried in the restored state
shuffle.py     the control experiment: hints of another task
"""

from hero.reflection.base import Reflections, ReflectionStats, Reflector
from hero.reflection.endpoint import Endpoint, ReflectionError
from hero.reflection.make import make_reflector
from hero.reflection.parse import parse_diagnoses
from hero.reflection.reflectors import ModelReflector, RuleReflector
from hero.reflection.shuffle import ShuffledReflector, shuffle_hints

__all__ = [
    "Endpoint",
    "ModelReflector",
    "ReflectionError",
    "ReflectionStats",
    "Reflections",
    "Reflector",
    "RuleReflector",
    "ShuffledReflector",
    "make_reflector",
    "parse_diagnoses",
    "shuffle_hints",
]
