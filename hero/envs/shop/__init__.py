"""The embedded shop; `ShopEnv` is all that others need."""

from hero.envs.shop.env import ShopEnv

__all__ = ["ShopEnv"]
