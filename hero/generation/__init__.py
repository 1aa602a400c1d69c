"""Generators: ids in, ids and log-probabilities out."""

from hero.generation.base import Completion, Generator, Sampling

__all__ = ["Completion", "Generator", "Sampling"]
