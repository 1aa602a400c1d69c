"""wandb, trackio and TensorBoard: the metrics of a run, under the names that TRL's users know.

All three get the same ones. wandb writes into the run's folder, also with `WANDB_MODE=offline`,
from where `wandb sync` uploads it; trackio keeps a database of its own (`TRACKIO_DIR`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

Metrics = Mapping[str, float]

OF_TRL = {
    "rewards/mean": "reward",
    "rewards/std": "reward_std",
    "generated_tokens": "num_tokens",
    "divergence/mean": "distillation/divergence",
    "drift/mean": "sampling/sampling_logp_difference/mean",
    "drift/max": "sampling/sampling_logp_difference/max",
}
"""What a metric is called by TRL's trainers, where that differs from `metrics.jsonl`."""


def named(metrics: Metrics) -> dict[str, float]:
    """`train/reward`, `train/loss`, …, `eval/success`: as transformers writes TRL's logs.

    `train/step_time` are the seconds of an update without its evaluation.
    """
    shown = {}
    for name, value in metrics.items():
        of_dev = name.removeprefix("dev/")
        shown[f"train/{OF_TRL.get(name, name)}" if of_dev == name else f"eval/{of_dev}"] = value
    phases = {n: s for n, s in metrics.items() if n.startswith("seconds/")}
    if phases:
        shown["train/step_time"] = sum(phases.values()) - phases.get("seconds/evaluation", 0.0)
    return shown


class Dashboard(Protocol):
    """Takes the metrics of an update; `step` is its number."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class _WandbLike:
    """wandb, and trackio, which keeps its interface."""

    def __init__(self, package: str, run_dir: Path, config: dict[str, Any]) -> None:
        module = _import(package, package)
        where = {"dir": str(run_dir)} if package == "wandb" else {}
        self._run = module.init(project="hero", name=run_dir.name, config=config, **where)

    def log(self, step: int, metrics: Metrics) -> None:
        shown = named(metrics)
        self._run.log({n: v for n, v in shown.items() if math.isfinite(v)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_at: int | None) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        # Events from `purge_step` on are hidden: they belong to updates that are made again.
        purge_step = None if resume_at is None else resume_at + 1
        self._writer = module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in named(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def open_dashboard(
    report_to: str, run_dir: Path, config: dict[str, Any], resume_at: int | None
) -> Dashboard | None:
    """The dashboard of that name, None for none; arguments as those of `Tracker`."""
    if report_to == "none":
        return None
    if report_to == "tensorboard":
        return _TensorBoard(run_dir, resume_at)
    return _WandbLike(report_to, run_dir, config)


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"report_to={extra} needs the package {extra}, which cannot be imported ({error}). "
            f"Install it with: pip install 'hero-kernels[{extra}]'"
        ) from error
