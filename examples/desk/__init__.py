"""A customer-service desk in the spirit of tau-bench: tools, a policy, a scripted customer."""

from desk.env import DeskEnv

__all__ = ["DeskEnv"]
