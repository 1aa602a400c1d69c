"""All cells of a study, side by side: starts, learning rates, then the runs that count."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from hero.checks import from_dict
from hero.config import SftConfig, TrainConfig
from hero.files import only_writer, write_atomic
from hero.processes import safe_path, started
from hero.recipes import merge
from hero.study.cells import DIAGNOSED, Cell, diagnosing, gap, judge, kept, run_cell
from hero.study.plan import BASE, RATES, StudyConfig, chosen_rates, claim_folder
from hero.types import Fault

TUNING = 100
"""First seed of the runs that choose a learning rate: none of them is reported."""

Say = Callable[[str], None]


def run_study(study: StudyConfig, folder: Path, say: Say) -> list[dict[str, Any]]:
    """Run what is missing; returns the rows of all runs that count.

    Raises:
        Fault: the folder holds another study.
    """
    claim_folder(study, folder)
    with (
        only_writer(folder, "hero study", "--output-dir"),
        safe_path(),
        _processes(study.jobs) as pool,
    ):
        models = make_starts(study, folder, pool, say)
        rates = choose_rates(study, folder, models, pool, say)
        say("Runs that count: test tasks.")
        rows = [
            pool.submit(_base, study, start, models[start], folder).result() for start in models
        ]
        for done in [
            pool.submit(gap, start, arm, study.of(arm), models[start], study.dev_tasks, folder)
            for start in models
            for arm in study.arms_at(start)
        ]:
            done.result()
        rows += _all(pool, _cells(study, models, rates), folder, say)
    return rows


@contextmanager
def _processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """So many, each with its own torch and one thread.

    An error or Ctrl-C ends them at once, so that none writes in a folder that is free again.
    """
    others = active_children()
    context = get_context("spawn")
    with ProcessPoolExecutor(number, mp_context=context, initializer=_prepare) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                if process not in others:
                    process.kill()
                    process.join()
            raise


def _prepare() -> None:
    from hero.commands.base import prepare_torch

    started()
    Thread(target=_end_with_the_study, daemon=True).start()
    os.nice(5)
    prepare_torch(1)


def _end_with_the_study() -> None:
    """A study that is killed leaves nobody behind; a row is whole or not there."""
    study = parent_process()
    assert study is not None
    study.join()
    os._exit(1)


def make_starts(
    study: StudyConfig, folder: Path, pool: ProcessPoolExecutor, say: Say
) -> dict[str, str]:
    """The folder of each start's model; those that are made by `hero sft` are made once."""
    found, waiting = {}, {}
    for name, settings in study.starts.items():
        if set(settings) == {"model"}:
            found[name] = str(settings["model"])
            continue
        found[name] = str(folder / "starts" / name)
        if not Path(found[name]).is_dir():
            waiting[pool.submit(_warm_start, settings, found[name])] = name
    for done in as_completed(waiting):
        done.result()
        say(f"Start {waiting[done]}: {found[waiting[done]]}")
    return found


def _warm_start(settings: dict[str, Any], folder: str) -> None:
    import io

    from hero.report.console import Console
    from hero.sft import train_sft

    config = from_dict(merge(settings, {"output_dir": folder, "threads": 1}), SftConfig)
    train_sft(config, Console(io.StringIO(), terminal=False))


def choose_rates(
    study: StudyConfig, folder: Path, models: dict[str, str], pool: ProcessPoolExecutor, say: Say
) -> dict[tuple[str, str], float]:
    """The learning rate of each (start, arm): the best mean success on dev tasks; ties the lower.

    The mean is over tuning seeds and marks, so that a rate that rises fast and then collapses does
    not win by its peak.
    """
    if len(study.learning_rates) == 1:
        return chosen_rates(study, folder)
    say("Learning rates: dev tasks.")
    wanted = dict.fromkeys(
        (start, study.rate_of(arm)) for start in models for arm in study.arms_at(start)
    )
    cells = [
        _cell(study, start, models[start], arm, seed=TUNING + k, rate=rate, split="dev")
        for k in range(study.tuning_seeds)
        for start, arm in wanted
        for rate in study.learning_rates
    ]
    successes: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in _all(pool, cells, folder, say):
        by_rate = successes.setdefault((row["start"], row["arm"]), {})
        by_rate.setdefault(row["learning_rate"], []).extend(
            mark["success"].count("1") / len(mark["success"]) for mark in row["marks"]
        )
    means = {
        key: {rate: sum(found) / len(found) for rate, found in sorted(rates.items())}
        for key, rates in successes.items()
    }
    kept = {"/".join(key): rates for key, rates in means.items()}
    write_atomic(folder / RATES, json.dumps(kept, indent=1))
    return chosen_rates(study, folder)


def _cells(
    study: StudyConfig, models: dict[str, str], rates: dict[tuple[str, str], float]
) -> list[Cell]:
    """Seed by seed, so that what is there after half the time is a comparison too."""
    return [
        _cell(study, start, models[start], arm, seed=seed, rate=rates[start, arm], split="test")
        for seed in range(study.seeds)
        for start in models
        for arm in study.arms_at(start)
        if seed < study.seeds_of(arm)
    ]


def _cell(
    study: StudyConfig, start: str, model: str, arm: str, *, seed: int, rate: float, split: str
) -> Cell:
    is_test = split == "test"
    return Cell(
        start=start, arm=arm, seed=seed, model=model, split=split,
        settings=merge(study.of(arm), {"optim": {"learning_rate": rate}}),
        marks=tuple(study.marks if is_test else study.marks[: study.tuning_marks]),
        tasks=study.test_tasks if is_test else study.dev_tasks,
    )  # fmt: skip


def _all(
    pool: ProcessPoolExecutor, cells: Iterable[Cell], folder: Path, say: Say
) -> list[dict[str, Any]]:
    """The rows of all cells; a cell that fails does not keep the others from being run.

    Raises:
        Fault: names the first that failed.
    """
    waiting = {pool.submit(run_cell, cell, folder): cell for cell in cells}
    rows: dict[int, dict[str, Any]] = {}
    failed: list[str] = []
    for number, done in enumerate(as_completed(waiting), 1):
        cell = waiting[done]
        if (error := done.exception()) is not None:
            failed.append(f"{cell.name}: {type(error).__name__}: {error}")
            say(f"{number}/{len(waiting)}  FAILED {failed[-1]}")
            continue
        rows[id(cell)] = done.result()
        say(f"{number}/{len(waiting)}  {cell.name}  {_reached(done.result())}")
    if failed:
        raise Fault(
            f"{len(failed)} of {len(waiting)} runs failed, the first: {failed[0]}\nThe others are "
            "kept; the same command goes on with those that failed."
        )
    return [rows[id(cell)] for cell in waiting.values()]


def _reached(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{mark['success'].count('1') / len(mark['success']):.1%} @{mark['turns']}"
        for mark in row["marks"]
    )


def _base(study: StudyConfig, start: str, model: str, folder: Path) -> dict[str, Any]:
    """The start itself on the test tasks, untrained."""

    def judged() -> dict[str, Any]:
        from hero.config import ModelConfig
        from hero.policy import Policy

        config: TrainConfig = from_dict(study.of(next(iter(study.arms))))
        policy, number = Policy.load(ModelConfig(path=model)), min(DIAGNOSED, study.test_tasks)
        return {
            "start": start, "arm": BASE, "seed": 0, "split": "test",
            "marks": [{"turns": 0, **judge(policy, config, "test", study.test_tasks)}],
            "diagnosing": diagnosing(policy, config, model, number),
        }  # fmt: skip

    return kept(folder / "rows" / start / "base.json", judged)
