"""A customer-service desk in the spirit of tau-bench: JSON tools, a policy and a scripted customer."""

from hero.envs.desk.env import DeskEnv

__all__ = ["DeskEnv"]
