"""What test_ranks.py has two processes do, one thing after the other; started by torchrun.

The last one ends with the death of rank 1, in the middle of an episode.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hero.envs.shop import ShopEnv
from hero.policy import Policy
from hero.ranks import Ranks, open_ranks
from hero.shards import local
from hero.trainer import Trainer
from hero.types import Fault
from tests.hero.short_runs import settings, trainer

STEPS_OF_UPDATE = 2 * 3
"""Of each rank: half of the episodes, three turns each."""


def varied(path: Path, **changes: Any) -> Any:
    """A run with everything that ranks share: the model reads its episodes, its teacher scores
    them, so does the model of the start, in several micro-batches, with a mean of means."""
    varied = {
        "reflection": {"reflector": "self", "max_tokens": 12, "retries": 1},
        "loss": {"kl_to_start": 0.1, "loss_aggregation": "trajectory"},
        "optim": {"micro_batch_tokens": 300}, "updates": 3, "teacher": {"update_rate": 0.2},
    }  # fmt: skip
    return settings(path, **{**varied, **changes})


class Deadly(ShopEnv):
    """A shop in which something happens to this process at some step."""

    steps_left = 10**9
    event: Any = None

    def step(self, text: str) -> Any:
        Deadly.steps_left -= 1
        if Deadly.steps_left == 0:
            Deadly.event()
        return super().step(text)


made: list[Trainer] = []


def run(config: Any, folder: Path, event: Any = None, steps: int = 10**9) -> None:
    Deadly.event, Deadly.steps_left = event, steps
    config.env.name, config.env.workers = f"{__name__}:Deadly", "inline"
    made.append(trainer(config, folder))
    made[-1].run()


def held() -> dict[str, int]:
    """Bytes that this process holds of what lies in shards."""
    learner, teacher = made[-1].learner, made[-1].teacher
    moments = [t for state in learner.optimizer.state.values() for t in state.values() if t.dim()]
    tensors = {
        "trained weights": learner.policy.trainable().values(), "AdamW": moments,
        "teacher": teacher.state_dict().values(),
    }  # fmt: skip
    return {name: sum(local(t).nbytes for t in found) for name, found in tensors.items()}


def failed(model: Path, folder: Path, ranks: Ranks) -> None:
    """A callback, which rank 0 alone has, raises after the first update."""

    def spoil(number: int, metrics: Any) -> None:
        raise RuntimeError("no room left")

    config = varied(model, save_every=10)
    try:
        Trainer(config, folder, "test", callbacks=[spoil]).run()
        raise AssertionError("nothing was raised")
    except RuntimeError as error:
        name = f"{type(error).__name__}: {error}"
    told = ranks.all_gather(lambda: name)
    ranks.on_first(lambda: (folder / "told.txt").write_text(f"{told} {folder_state(folder)}"))


def unlike(path: Path, said: Path, ranks: Ranks) -> None:
    """Ranks that have read different models."""
    policy = Policy.load(settings(path).model)
    with torch.no_grad():
        policy.head.weight[0, 0] += ranks.rank
    try:
        policy.spread(ranks)
        raise AssertionError("nothing was raised")
    except ValueError as error:
        message = str(error)
    ranks.on_first(lambda: said.write_text(message))


def parted(said: Path, ranks: Ranks) -> None:
    """Ranks that do not do the same."""

    def one() -> None: ...

    def other() -> None: ...

    try:
        ranks.all_gather(other if ranks.rank else one)
        raise AssertionError("nothing was raised")
    except Fault as error:
        message = str(error)
    ranks.on_first(lambda: said.write_text(message))


def stopped(model: Path, folder: Path, ranks: Ranks) -> None:
    """A signal that comes to rank 1 alone, in the second update, and the run that goes on."""
    before = 3 * STEPS_OF_UPDATE  # probe, dev and test
    steps = before + STEPS_OF_UPDATE + 2 if ranks.rank == 1 else 10**9
    try:
        config = varied(model, save_every=10)
        run(config, folder, lambda: os.kill(os.getpid(), signal.SIGTERM), steps)
        raise AssertionError("no signal came")
    except KeyboardInterrupt as stop:
        number = int(getattr(stop, "number", 0))
    told = ranks.all_gather(lambda: number)
    ranks.on_first(lambda: (folder / "told.txt").write_text(f"{told} {folder_state(folder)}"))
    run(varied(model, resume=str(folder)), folder)


def folder_state(folder: Path) -> str:
    return (folder / "checkpoint" / "state.json").read_text()[:12]


def main(model: Path, root: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ranks = open_ranks("cpu")
    run(varied(model), root / "two")
    ranks.on_first(partial((root / "bytes.json").write_text, json.dumps(ranks.all_gather(held))))
    run(varied(model, resume=str(root / "one-two")), root / "one-two")
    run(varied(model, updates=1), root / "two-one")
    run(varied(model, model={"lora_rank": 4}, updates=1), root / "lora-two")
    failed(model, root / "failed", ranks)
    unlike(model, root / "unlike.txt", ranks)
    parted(root / "parted.txt", ranks)
    stopped(model, root / "stopped", ranks)
    is_second = ranks.rank == 1
    run(varied(model), root / "died", lambda: os._exit(3), 5 if is_second else 10**9)


if __name__ == "__main__":
    from tests.hero import on_ranks  # the environment's name has to be the same everywhere

    on_ranks.main(Path(sys.argv[1]), Path(sys.argv[2]))
