"""HERO: agents that learn from hindsight. Nothing is loaded before it is used."""

from typing import Any

__all__ = ["evaluate", "load_run", "rollout", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hero' has no attribute {name!r}; it has {__all__}")
    from hero import api

    return getattr(api, name)
