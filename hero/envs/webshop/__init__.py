"""WebShop on its own products and goals; `WebShopEnv` is all that others need."""

from hero.envs.webshop.env import WebShopEnv

__all__ = ["WebShopEnv"]
