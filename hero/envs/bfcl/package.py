"""What is taken from the wheel bfcl-eval: tasks, simulated APIs and the checker.

The wheel is unpacked into a folder without what it says it needs: its multi-turn part needs mpmath
alone, which torch brings. It is loaded once a process and shared; nobody may write to it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hero.fetch import unpack_package
from hero.files import new_folder

VERSION = "2026.3.23"
SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
"""Of the wheel."""
CATEGORIES = ("base", "miss_func", "miss_param", "long_context")
TASKS = 200
"""Of each category. Number i is one scenario in all of them."""
TEST_DIGITS, DEV_DIGITS = "0346", "9"
"""Last digits of the numbers of test and dev tasks: scenarios with equal data fall together."""
OPENAPI = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
"""JSON schema's names of the package's types; others are the same."""


@dataclass(frozen=True)
class Package:
    """The parts of bfcl-eval that are used."""

    tasks: dict[str, dict[str, Any]]
    """Task by id, with `gold`: the calls of each of its turns, as Python expressions."""
    schemas: dict[str, list[dict[str, Any]]]
    """OpenAI schemas of each API's functions."""
    checker: ModuleType
    classes: dict[str, str]
    """Module of each API."""
    stateless: tuple[str, ...]
    rules: str
    """The package's words to a model that is prompted."""
    more_functions: str
    """Its words when functions are added."""
    max_steps: int
    """Answers with calls in one turn of the user, after which it gives up."""


def data_folder() -> Path:
    """Where `hero envs get bfcl` puts the package."""
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache_folder / "hero" / f"bfcl-eval-{VERSION}"


def fetch(say: Callable[[str], None]) -> Path:
    """Download and unpack the wheel; does nothing if it is there.

    Raises:
        ValueError: it cannot be downloaded, or is not the one that was tested.
    """
    folder = data_folder()
    if (folder / "bfcl_eval").is_dir():
        say(f"{folder} is there already: nothing is downloaded.")
        return folder
    say(f"Downloading the package bfcl-eval {VERSION} (2 MB, Apache-2.0) …")
    with new_folder(folder) as new:
        unpack_package(f"bfcl-eval=={VERSION}", new, SHA256)
    return folder


@cache
def load_package(data_dir: str) -> Package:
    """The package in a folder, "" for the usual one.

    Raises:
        ValueError: it is not there.
    """
    folder = Path(data_dir).expanduser() if data_dir else data_folder()
    if not (folder / "bfcl_eval").is_dir():
        raise ValueError(
            f"{folder} does not hold the package bfcl-eval. Run: hero envs get bfcl; or name the "
            "folder it was unpacked into: --env.options.data-dir DIR."
        )
    sys.path.insert(0, str(folder))
    try:
        checker = import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
        backends = import_module("bfcl_eval.constants.executable_backend_config")
        words = import_module("bfcl_eval.constants.default_prompts")
        for module in map(backends.CLASS_FILE_PATH_MAPPING.get, _apis(backends)):
            import_module(module)
    except ImportError as error:
        raise ValueError(f"The package in {folder} cannot be imported: {error}") from error
    finally:
        sys.path.remove(str(folder))
    style = words.PROMPT_STYLE_TEMPLATES["classic"]
    data = folder / "bfcl_eval" / "data"
    files = {api: backends.MULTI_TURN_FUNC_DOC_FILE_MAPPING[api] for api in _apis(backends)}
    return Package(
        tasks={task["id"]: task for name in CATEGORIES for task in _tasks(data, name)},
        schemas={api: _schemas(data / "multi_turn_func_doc" / name) for api, name in files.items()},
        checker=checker, classes=backends.CLASS_FILE_PATH_MAPPING,
        stateless=tuple(backends.STATELESS_CLASSES),
        rules=f"{style['persona']} {style['task']}\n\n{style['multiturn_behavior']}",
        more_functions=words.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC,
        max_steps=words.MAXIMUM_STEP_LIMIT,
    )  # fmt: skip


def _apis(backends: ModuleType) -> list[str]:
    """Those of the multi-turn tasks: memory and web search need other packages."""
    names = backends.CLASS_FILE_PATH_MAPPING
    return [name for name in names if not name.startswith(("WebSearch", "Memory"))]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. Remove the folder, then run: hero envs get bfcl"
        ) from error


def _tasks(data: Path, category: str) -> list[dict[str, Any]]:
    name = f"BFCL_v4_multi_turn_{category}.json"
    gold = {row["id"]: row["ground_truth"] for row in _lines(data / "possible_answer" / name)}
    return [{**row, "gold": gold[row["id"]]} for row in _lines(data / name)]


def _schemas(path: Path) -> list[dict[str, Any]]:
    found = []
    for row in _lines(path):
        row.pop("response", None)  # which OpenAI's schemas do not have
        found.append({"type": "function", "function": _openapi(row)})
    return found


def _openapi(value: Any) -> Any:
    """The same with JSON schema's names of types."""
    if isinstance(value, list):
        return [_openapi(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: OPENAPI.get(item, item) if key == "type" and isinstance(item, str) else _openapi(item)
        for key, item in value.items()
    }
