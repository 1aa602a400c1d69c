"""Skipping vocabulary columns whose gradient is negligible for a whole chunk of rows.

    python -m benchmarks.experiments.column_skipping [--part errors|times] [--out FILE]

dX = G·W and dW = Gᵀ·X only need the columns of G [R, V] that count. Those are gathered, with their
rows of W, and both products run over the K that are left; dW of the others is exactly 0. Three
rules choose them, each relative to the gradient of the chunk, so none depends on its scale:

    peak   max_r |G[r, v]| > threshold · |G|
    row    |G[r, v]| > threshold · |G[r]| in some row r, so rows with a small gradient count too
    mass   as few columns as leave out no more than threshold · |G|: no rule for an error of that
           size in G keeps fewer

|.| of more than one number is the Euclidean norm. A row of G sums to 0, so what all rows of W have
in common cancels in dX, but not any more over the columns that are kept. `dX_centred` is the error
of dX from W less its mean row: one rank-1 update, which without skipping changes nothing (but for a
soft cap).

Errors are those of the whole backward pass in bf16 against fp64, so the error without skipping is
that of rounding. `adam_error` is that of the first step of Adam, dW / (|dW| + 1e-8), which does not
care how small a gradient is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.experiments.states import (
    DIVERGENCES,
    States,
    fp64_truth,
    gaussian,
    gradient_of,
    smollm2,
)
from benchmarks.machine import describe
from benchmarks.problem import NEAR, relative_error
from hero_kernels import gemm

RESULTS = Path(__file__).parents[1] / "results" / "experiments-column-skipping.json"
TOKENS = 1024
CHUNKS = (64, 256, 1024)
THRESHOLDS = (1e-2, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6)
TIMED = (("mass", 1e-2), ("mass", 1e-3), ("row", 1e-4), ("peak", 1e-5))
BLOCK = 64
"""Columns of a tile, for the share of tiles that a kernel without gathering could skip."""
ADAM_EPSILON = 1e-8
CASES: dict[str, tuple[Callable[[], States], tuple[str, ...], tuple[int, ...]]] = {
    "SmolLM2, hint": (lambda: smollm2("hint", TOKENS), DIVERGENCES, CHUNKS),
    "SmolLM2, answer": (lambda: smollm2("answer", TOKENS), ("jsd",), (256,)),
    "Gaussian": (lambda: gaussian(TOKENS, 576, 49152, NEAR), ("jsd",), (256,)),
}
"""By name: the states, and for which divergences and chunk sizes errors are measured."""


def by_peak(grad: Tensor, threshold: float) -> Tensor:
    low, high = torch.aminmax(grad, dim=0)
    norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
    return torch.maximum(-low, high).float() > threshold * norm


def by_row(grad: Tensor, threshold: float) -> Tensor:
    bounds = threshold * torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32)
    return (grad.abs() > bounds[:, None]).any(0)


def by_mass(grad: Tensor, threshold: float) -> Tensor:
    squares = torch.linalg.vector_norm(grad, dim=0, dtype=torch.float32).double().square()
    ascending, order = squares.sort()
    dropped = ascending.cumsum(0)
    keep = dropped > threshold**2 * dropped[-1]
    return torch.empty_like(keep).scatter_(0, order, keep)


RULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "peak": by_peak,
    "row": by_row,
    "mass": by_mass,
}
"""Which columns of a chunk [R, V] to keep: [V] bool."""


class Stopwatch:
    """Seconds spent under each name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class Backward(NamedTuple):
    """Result of the backward pass over N rows."""

    hidden: Tensor  # [N, H] dX, bf16
    weight: Tensor  # [V, H] dW, fp32
    row_sums: Tensor  # [N] sum of the gradient that was kept
    share: float
    """Of the columns, those kept: mean over chunks."""
    block_share: float
    """Of the tiles of `BLOCK` neighbouring columns, those that hold a column that is kept."""


def dense_backward(grad: Tensor, states: States, chunk: int, watch: Stopwatch) -> Backward:
    """From grad [N, V]: dX by chunks, dW in one product."""
    d_hidden, d_weight = torch.empty_like(states.student), torch.empty(states.weight.shape)
    with watch("products"):
        for start in range(0, len(grad), chunk):
            rows = slice(start, start + chunk)
            d_hidden[rows] = gemm.hidden_gradient(grad[rows], states.weight)
        gemm.weight_gradient_into(d_weight, grad, states.student, accumulate=False)
    return Backward(d_hidden, d_weight, torch.zeros(len(grad)), 1.0, 1.0)


def skipping_backward(
    grad: Tensor, states: States, chunk: int, rule: str, threshold: float, watch: Stopwatch
) -> Backward:
    """The same from the columns that `rule` keeps in each chunk."""
    d_hidden, d_weight = torch.empty_like(states.student), torch.zeros(states.weight.shape)
    row_sums = torch.empty(len(grad))
    shares, block_shares = [], []
    for start in range(0, len(grad), chunk):
        rows = slice(start, start + chunk)
        with watch("choice"):
            keep = RULES[rule](grad[rows], threshold)
            columns = keep.nonzero()[:, 0]
        with watch("gather"):
            part = grad[rows].index_select(1, columns)
            weight = states.weight.index_select(0, columns)
        with watch("products"):
            d_hidden[rows] = gemm.hidden_gradient(part, weight)
            d_part = torch.empty(weight.shape)
            gemm.weight_gradient_into(d_part, part, states.student[rows], accumulate=False)
        with watch("scatter"):
            d_weight.index_add_(0, columns, d_part)
        row_sums[rows] = part.sum(1, dtype=torch.float32)
        shares.append(len(columns) / len(keep))
        blocks = torch.nn.functional.pad(keep, (0, -len(keep) % BLOCK)).view(-1, BLOCK)
        block_shares.append(float(blocks.any(1).float().mean()))
    return Backward(d_hidden, d_weight, row_sums, fmean(shares), fmean(block_shares))


class Yardstick:
    """What a backward pass is compared with."""

    def __init__(self, states: States, divergence: str) -> None:
        truth = fp64_truth(states, divergence)
        self.hidden, self.weight = truth.hidden, truth.weight.float()
        self.step = self.adam_step(self.weight)
        self.mean_row = states.weight.float().mean(0)

    @staticmethod
    def adam_step(d_weight: Tensor) -> Tensor:
        return d_weight / (d_weight.abs() + ADAM_EPSILON)

    def errors(self, result: Backward) -> dict[str, float]:
        centred = result.hidden.float() - result.row_sums[:, None] * self.mean_row
        rows = (centred.double() - self.hidden).norm(dim=1) / self.hidden.norm(dim=1)
        return {
            "share": result.share,
            f"share_of_{BLOCK}s": result.block_share,
            "dX": relative_error(result.hidden, self.hidden),
            "dX_centred": relative_error(centred, self.hidden),
            "dX_centred_worst_row": float(rows.max()),
            "dW": relative_error(result.weight, self.weight),
            "adam_error": relative_error(self.adam_step(result.weight), self.step),
        }


def measure_errors(
    name: str, states: States, divergences: tuple[str, ...], chunks: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """One row without skipping, then one for each rule, chunk size and threshold."""
    for divergence in divergences:
        yardstick = Yardstick(states, divergence)
        grad, loss = gradient_of(states, divergence)
        case = {"states": name, "divergence": divergence, "loss": loss}
        dense = dense_backward(grad, states, max(chunks), Stopwatch())
        yield case | {"rule": "none"} | yardstick.errors(dense)
        for rule, chunk, threshold in product(RULES, chunks, THRESHOLDS):
            setting: dict[str, Any] = {"rule": rule, "chunk": chunk, "threshold": threshold}
            result = skipping_backward(grad, states, **setting, watch=Stopwatch())
            yield case | setting | yardstick.errors(result)


def measure_times(
    name: str, states: States, chunks: tuple[int, ...], rounds: int = 5
) -> Iterator[dict[str, Any]]:
    """Milliseconds of dX and dW for the JSD, with and without skipping in turns; medians."""
    grad, _ = gradient_of(states, "jsd")
    for chunk in chunks:
        runs: dict[tuple[str, float], list[dict[str, float]]] = defaultdict(list)
        shares: dict[tuple[str, float], float] = {}
        for round_, setting in product(range(rounds + 1), (("none", 0.0), *TIMED)):
            watch = Stopwatch()
            if setting[0] == "none":
                result = dense_backward(grad, states, chunk, watch)
            else:
                result = skipping_backward(grad, states, chunk, *setting, watch)
            shares[setting] = result.share
            if round_:  # the first one warms up
                runs[setting].append(dict(watch.seconds))
        for (rule, threshold), seconds in runs.items():
            stages = {stage: 1e3 * median(run[stage] for run in seconds) for stage in seconds[0]}
            total = 1e3 * median(sum(run.values()) for run in seconds)
            row = {"states": name, "chunk": chunk, "rule": rule, "threshold": threshold}
            yield row | {"share": shares[rule, threshold], "total_ms": total, "stages_ms": stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--part", choices=("errors", "times"), help="only this one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write or complete")
    given = parser.parse_args()
    result = json.loads(given.out.read_text()) if given.out.exists() else {}
    chosen = [given.part] if given.part else ["errors", "times"]
    for part in chosen:
        result[part] = {"machine": describe("cpu"), "tokens": TOKENS, "rows": []}
    for name, (make, divergences, chunks) in CASES.items():
        states = make()
        rows = {
            "errors": measure_errors(name, states, divergences, chunks),
            "times": measure_times(name, states, chunks),
        }
        for part in chosen:
            for row in rows[part]:
                result[part]["rows"].append(row)
                print(json.dumps(row), flush=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
