"""The checks for a GPU, and the script that runs everything there: as far as a CPU can tell.

What is checked is compared with fp64 by the checks themselves; here they must also fail.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import gpu_check  # noqa: E402
from benchmarks.check_problems import SIZES  # noqa: E402
from benchmarks.first_look import right  # noqa: E402
from benchmarks.ours import Variant  # noqa: E402
from benchmarks.problem import Problem  # noqa: E402
from benchmarks.workers import Broken, Worker  # noqa: E402
from benchmarks.yardsticks import YARDSTICKS  # noqa: E402


def add(first: int, second: int) -> int:
    return first + second


def end_process(status: int) -> None:
    os._exit(status)


def test_worker_answers_and_says_why_it_does_not() -> None:
    worker = Worker()
    worker.ask(add, 2, 3)
    assert worker.answer(time.monotonic() + 120) == 5
    worker.ask(add, 2, "three")
    with pytest.raises(Broken, match="TypeError"):
        worker.answer(time.monotonic() + 120)
    worker.ask(time.sleep, 600)
    with pytest.raises(Broken, match="not ready in time"):
        worker.answer(time.monotonic())
    ending = Worker()
    ending.ask(end_process, 7)
    with pytest.raises(Broken, match="status 7"):
        ending.answer(time.monotonic() + 120)


def test_checks_fail_for_a_loss_that_is_a_hundredth_off() -> None:
    class Off(Variant):
        def loss(self, problem: Problem, beta: float, options: Any) -> torch.Tensor:
            return 1.01 * super().loss(problem, beta, options)

    for variant, passes in ((Variant("torch"), True), (Off("torch"), False)):
        checks = list(right(SIZES["smallest"], "cpu", variant, set()))
        assert len(checks) == 3  # loss, dX and dW
        assert {check.passed for check in checks} == {passes}


def test_a_subject_that_refuses_everything_fails() -> None:
    checks, refused = gpu_check.run_group("cuda", "operation", "smallest", "cpu", seed=0)
    assert not checks
    assert any("cuda" in reason for reason in refused)
    seen = gpu_check.Report(["cuda"], "cpu", 0, quiet=True)
    seen.add("cuda", (checks, refused))
    assert not seen.passed
    assert "refused by cuda" in seen.summary()


def dry_run(out: Path, python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "benchmarks/gpu_session.sh", "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "OUT": str(out), "PYTHON": python},
        capture_output=True,
        text=True,
        check=False,
    )


def names_in(path: Path) -> list[str]:
    return [stage["stage"] for stage in json.loads(path.read_text())]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
@pytest.mark.slow
def test_gpu_session_dry_run(tmp_path: Path) -> None:
    done = dry_run(tmp_path, sys.executable)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    first, check = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("first", "check"))
    assert first["subjects"] == check["subjects"] == ["cpu", "torch", "torch-split"]
    told = [entry["name"].split(" ")[0] for entry in first["checks"] if entry["subject"] == "cpu"]
    assert told == ["launch", *["tiny_161_bfloat16_jsd_100_trained,"] * 3, "one", "the"]
    assert {entry["subject"] for entry in check["checks"]} == set(check["subjects"])
    assert len(check["checks"]) > 200
    assert all(entry["passed"] for entry in first["checks"] + check["checks"])

    [measured] = json.loads((tmp_path / "benchmark.json").read_text())["cases"]
    assert set(measured["results"]) == {"hero", "eager", *YARDSTICKS}
    [compared] = json.loads((tmp_path / "comparison.json").read_text())["cases"]
    assert compared["results"]["hero-split"]["seconds"]
    sweep = json.loads((tmp_path / "sweep.json").read_text())["cases"]
    assert [case["case"]["tokens"] for case in sweep] == [64, 128, 256]
    stages = ["first", "check", "benchmarks", "comparison", "sweep"]
    assert names_in(tmp_path / "session.json") == stages

    log = (tmp_path / "session.log").read_text()
    limits = {name: int(limit) for name, limit in re.findall(r"== (\S+) \(at most (\d+) s\)", log)}
    assert next(iter(limits)) == "first" and limits["first"] <= 60
    assert sum(limits.pop(optional) for optional in ("loops", "ncu", "compiled")) <= 185
    assert sum(limits.values()) < 540  # a command on the GPU machine may take ten minutes


def test_gpu_session_goes_on_after_a_failing_stage(tmp_path: Path) -> None:
    """An interpreter that fails every command fails every stage, and none is left out."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    done = dry_run(tmp_path, str(broken))
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    stages = names_in(tmp_path / "session.json")
    assert failed == [f"FAILED {stage}: exit status 3" for stage in stages]
    assert len(stages) == 5
