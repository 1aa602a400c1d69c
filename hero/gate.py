"""When a frozen teacher may take over the student's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

GATE = ("dev/success", "dev/turns", "dev/turn_tokens", "dev/episodes")
"""Metrics that `gate_opens` reads."""
CERTAIN = 1.645
"""Standard errors by which success has to rise: one-sided 5 %."""
LONGEST = 1.5
"""Turns an episode and tokens a turn may grow by this factor from one refresh to the next."""


def gate_opens(now: Mapping[str, float], then: Mapping[str, float]) -> bool:
    """Whether a frozen teacher may take over the student's weights (CGTR, arXiv 2606.03532).

    Success must have risen by more than `CERTAIN` standard errors of the difference of two shares
    (of `dev/episodes` each, one success and one failure added, so that 0 and 1 have a spread too),
    while neither turns an episode nor tokens a turn grew by more than `LONGEST`. Bounds: ours.

    Args:
        now: metrics of this evaluation.
        then: of the one at the last refresh, or before training.
    """
    episodes = now["dev/episodes"]
    shares = [(m["dev/success"] * episodes + 1) / (episodes + 2) for m in (now, then)]
    error = math.sqrt(sum(p * (1 - p) for p in shares) / episodes)
    grown = [now[name] > LONGEST * then[name] for name in ("dev/turns", "dev/turn_tokens")]
    return now["dev/success"] - then["dev/success"] > CERTAIN * error and not any(grown)
