"""Collapse: what gives it away between two evaluations, before success is gone."""

from __future__ import annotations

from collections.abc import Mapping

WATCHED = ("dev/cut_rate", "entropy", "reflection/non_empty_rate", "agreement/recall")
"""Metrics that are compared with those of the best evaluation, beside dev success."""

MAX_BAD_EVALUATIONS = 2


def signs_of_collapse(
    now: Mapping[str, float], best: Mapping[str, float], drop: float
) -> list[str]:
    """What speaks for a collapse, in words; [] while nothing needs to be done.

    Either success fell by more than half of `drop`, or episodes run into their cap; and a second
    of the five signs is there too. Bounds: our decision.

    Args:
        now: metrics of this evaluation; those that it lacks give no sign.
        best: of the best evaluation; what it lacks (before training) of the one after it.
        drop: `eval.stop_drop`.
    """
    if now["dev/success"] > best["dev/success"]:
        return []
    values = {name: (now[name], best[name]) for name in WATCHED if name in now and name in best}
    signs = []
    if now["dev/success"] < best["dev/success"] - drop / 2:
        signs.append(f"dev success fell from {best['dev/success']:.2f} to {now['dev/success']:.2f}")
    cut, cut_before = values.get("dev/cut_rate", (0.0, 0.0))
    if cut >= 0.8 and cut >= cut_before + 0.3:
        signs.append(f"mean turns climb to the cap: {cut:.0%} of episodes end there")
    if not signs:
        return []
    names = ("entropy", "share of hints", "reflector's recall of faults")
    for name, words in zip(WATCHED[1:], names, strict=True):
        value, before = values.get(name, (0.0, 0.0))
        measured = value > 0 or name != "entropy"  # an update that trains nothing sees no entropy
        if measured and value < before / 2:
            signs.append(f"{words} fell from {before:.3f} to {value:.3f}")
    return signs if len(signs) > 1 else []
