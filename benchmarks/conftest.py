"""Options, and the session's results: `pytest benchmarks/ --help` lists them under "benchmarks".

The table of a case is printed as soon as it is measured; what is ahead of what, and who was skipped
and why, at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import machine, measure, report
from benchmarks.baselines import CONTESTANTS, takes_part
from benchmarks.machine import device_type
from benchmarks.ours import ON_REQUEST
from benchmarks.shapes import Case, case_sets

if TYPE_CHECKING:  # it loads transformers
    from benchmarks.loops import Loops


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--full", action="store_true", help="larger cases")
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each contestant of each case."""
    if "contestant" not in metafunc.fixturenames:
        return
    config = metafunc.config
    default = ("gpu" if device_type() == "cuda" else "cpu") + "-full" * config.getoption("full")
    given = config.getoption("contestants")
    names = given.split(",") if given else [n for n in CONTESTANTS if n not in ON_REQUEST]
    if unknown := [name for name in names if name not in CONTESTANTS]:
        raise pytest.UsageError(
            f"--contestants: unknown {', '.join(unknown)}; expected some of "
            f"{', '.join(CONTESTANTS)}."
        )
    pairs = [
        pytest.param(case, name, id=f"{case.id}-{name}")
        for case in case_sets()[config.getoption("cases") or default]
        for name in names
        if takes_part(name, case)
    ]
    metafunc.parametrize(("case", "contestant"), pairs)


class Session:
    """Measures each case once, when its first test asks, with the contestants selected."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self._config = config
        self._selected = [item.callspec.params for item in items if hasattr(item, "callspec")]
        self._measured: dict[Case, dict[str, measure.Result]] = {}
        self.machine = machine.describe(device_type())
        self._say(report.machine_line(self.machine))
        if warning := machine.busy(self.machine):
            self._say(report.wrapped(warning))

    def results(self, case: Case) -> dict[str, measure.Result]:
        if case not in self._measured:
            names = [chosen["contestant"] for chosen in self._selected if chosen["case"] == case]
            option = self._config.getoption
            limits = measure.Limits(
                option("seconds"), option("call_limit"), not option("skip_memory")
            )
            self._measured[case] = measure.measure(case, names, device_type(), limits)
            self._say(report.case_table(case, self._measured[case]))
            if path := option("results"):
                machine.write_json(path, self.as_json())
        return self._measured[case]

    def ending(self) -> str:
        return "\n\n".join(report.ending(self.machine, list(self._measured.items())))

    def as_json(self) -> dict[str, Any]:
        entries = [measure.as_json(case, results) for case, results in self._measured.items()]
        return {"machine": self.machine, "cases": entries}

    def _say(self, text: str) -> None:
        """Print now, although pytest captures what a test prints."""
        capture = self._config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", flush=True)


_SESSION = pytest.StashKey[Session]()


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Session:
    session = Session(request.config, request.session.items)
    request.config.stash[_SESSION] = session
    return session


@pytest.fixture(scope="session")
def loops(request: pytest.FixtureRequest) -> Loops:
    """For whole loops: prints tables as soon as they are there, and adds them to `--results`."""
    from benchmarks.loops import Loops

    torch.set_num_threads(1)  # what the small models of these loops gain from
    session = request.config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with session.global_and_fixture_disabled():
            print(f"\n{text}", flush=True)

    return Loops(say, request.config.getoption("results"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if session := config.stash.get(_SESSION, None):
        terminalreporter.write_line("\n" + session.ending())
