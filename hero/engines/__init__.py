"""Engines that sample from the student while it trains, behind one protocol.

make_engine(config, policy)     the one that `engine.kind` asks for
"""

from hero.engines.base import Engine, WeightFolder, check_same_model
from hero.engines.make import make_engine

__all__ = ["Engine", "WeightFolder", "check_same_model", "make_engine"]
