"""Options, and the session's results: `pytest benchmarks/ --help` lists them under "benchmarks"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, measure, report
from benchmarks.baselines import CONTESTANTS, ON_REQUEST, SLOW_TO_START, takes_part
from benchmarks.shapes import Case, case_sets
from hero_kernels import cpu_gemm


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption(
        "--full", action="store_true", help="larger cases; on CPU, compiled contestants too"
    )
    group.addoption(
        "--cases", choices=case_sets(), help="a set of cases; default: by device and --full"
    )
    group.addoption(
        "--contestants",
        help=f"comma-separated; default all but {', '.join(ON_REQUEST)}: {', '.join(CONTESTANTS)}",
    )
    group.addoption("--results", type=Path, help="JSON file to write, after every case")
    group.addoption("--seconds", type=float, default=20.0, help="for the rounds of a case")
    group.addoption(
        "--call-limit", type=float, default=30.0, help="seconds; leave out what takes longer"
    )
    group.addoption("--skip-memory", action="store_true", help="do not measure peak memory")
    group.addoption(
        "--without-bf16-products",
        action="store_true",
        help="as a CPU without AMX: operands of this package's products are widened (no memory)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-bf16-products"):
        cpu_gemm.kind = lambda: cpu_gemm.KINDS[0]  # type: ignore[assignment]
        config.option.skip_memory = True  # measured in other processes, which know nothing of it


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each contestant of each case."""
    if "contestant" not in metafunc.fixturenames:
        return
    config = metafunc.config
    default = ("gpu" if device_type() == "cuda" else "cpu") + "-full" * config.getoption("full")
    quick = device_type() == "cpu" and not config.getoption("full")
    entered = [name for name in CONTESTANTS if name not in ON_REQUEST]
    names = (config.getoption("contestants") or ",".join(entered)).split(",")
    if unknown := [name for name in names if name not in CONTESTANTS]:
        raise pytest.UsageError(
            f"--contestants: no {', '.join(unknown)}; expected some of {', '.join(CONTESTANTS)}"
        )
    pairs = [
        pytest.param(case, name, id=f"{case.id}-{name}")
        for case in case_sets()[config.getoption("cases") or default]
        for name in names
        if takes_part(name, case) and (name not in SLOW_TO_START or not quick)
    ]
    metafunc.parametrize(("case", "contestant"), pairs)


class Session:
    """Measures each case once, when its first test asks, with the contestants selected."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self._config = config
        self._selected = [item.callspec.params for item in items if hasattr(item, "callspec")]
        self._measured: dict[Case, dict[str, measure.Result]] = {}

    def results(self, case: Case) -> dict[str, measure.Result]:
        if case not in self._measured:
            names = [chosen["contestant"] for chosen in self._selected if chosen["case"] == case]
            self._measured[case] = measure.measure(
                case,
                names,
                device_type(),
                measure.Limits(
                    self._config.getoption("seconds"),
                    self._config.getoption("call_limit"),
                    not self._config.getoption("skip_memory"),
                ),
            )
            if path := self._config.getoption("results"):
                path.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        return self._measured[case]

    def as_json(self) -> dict[str, Any]:
        entries = [measure.as_json(case, results) for case, results in self._measured.items()]
        return {"machine": machine.describe(device_type()), "cases": entries}


_SESSION = pytest.StashKey[Session]()


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Session:
    session = Session(request.config, request.session.items)
    request.config.stash[_SESSION] = session
    return session


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The tables of docs/benchmarks.md, for what was just measured."""
    if session := config.stash.get(_SESSION, None):
        terminalreporter.write_line("\n" + report.render(session.as_json()))
