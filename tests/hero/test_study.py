"""Studies: what is run, what is refused, what the figures say.

Oracles: values worked out by hand, and the plain bootstrap, draw by draw.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hero.cli import main
from hero.commands.arguments import parse
from hero.config import TrainConfig
from hero.state import State
from hero.study import cells, runner
from hero.study.claims import claims
from hero.study.page import write_page
from hero.study.plan import claim_folder, load_study
from hero.study.plots import plot
from hero.study.statistics import interval, line
from hero.study.tables import report_lines
from hero.types import Fault

SMALL: dict[str, Any] = {
    "base": "quickstart",
    "settings": {"env": {"reward": "success"}, "rollout": {"tasks_per_update": 4}},
    "starts": {"shipped": {"model": "tiny-shop"}, "other": {"model": "elsewhere"}},
    "arms": {
        "hero": {},
        "env_only": {"mode": "env_only"},
        "grpo": {"mode": "grpo", "rollout": {"group_size": 2}},
        "shuffled": {"reflection": {"shuffle_hints": "causes"}},
    },
    "like": {"shuffled": "hero"},
    "controls": ["shuffled"],
    "only": {"other": ["hero"]},
    "seeds": 2,
    "marks": [40, 80],
    "learning_rates": [1.0e-3],
    "dev_tasks": 4,
    "test_tasks": 4,
}


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Any]:
    """Loads `SMALL` with changes at the top level."""

    def load(**changes: Any) -> Any:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
        return load_study(str(path))

    return load


# ---- what ends a run -----------------------------------------------------------------------------


def test_updates_without_signal_end_a_run_only_if_asked() -> None:
    state = State(update=10, idle_updates=7)
    assert state.finished(TrainConfig(max_idle_updates=5)) and "max_idle_updates" in state.stopped
    assert not state.finished(TrainConfig(max_idle_updates=0))


def test_a_collapsed_run_goes_on_if_nothing_shall_stop_it() -> None:
    def judged(drop: float) -> str:
        state = State(best_dev=0.6, watched={"dev/cut_rate": 0.1, "entropy": 1.0})
        state.judge({"dev/success": 0.0, "dev/cut_rate": 1.0, "entropy": 0.1}, 5, drop)
        return state.collapse

    assert judged(0.3) and not judged(1.0)


# ---- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"a": {}, "b": {"env": {"reward": "score"}}}}, "env.reward is 'success' for one"),
        ({"arms": {"a": {}, "b": {"rollout": {"max_turns": 9}}}}, "rollout.max_turns is 8"),
        ({"arms": {"a": {}, "b": {"prompts": "standard"}}}, "prompts is 'compact'"),
        ({"arms": {"a": {}, "b": {"env": {"options": {"mode": "strict"}}}}}, "env.options is"),
        ({"arms": {"base": {}}}, "cannot be called 'base'"),
        ({"like": {"hero": "shuffled", "shuffled": "hero"}}, "in a circle"),
        ({"controls": ["shufled"]}, "controls: unknown shufled; there are hero"),
        ({"starts": {"s": {"prompts": "standard"}}}, "start s cannot be compared: its prompts"),
        ({"marks": [80, 40]}, "marks must rise"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    study: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        study(**{"like": {}, "controls": [], "only": {}} | changes)


def test_hints_and_the_reward_of_a_control_may_differ(study: Callable[..., Any]) -> None:
    arms = {"hero": {}, "named": {"env": {"options": {"hints": "rule"}}}}
    arms |= {"wrong": {"env": {"reward": "failure"}}}
    study(arms=arms, controls=["wrong"], like={})
    with pytest.raises(ValueError, match=r"env\.reward"):
        study(arms=arms, controls=[], like={})


def test_a_control_takes_settings_and_rate_of_its_arm(study: Callable[..., Any]) -> None:
    plan = study(arms=SMALL["arms"] | {"hero": {"reflection": {"reflector": "rules"}}})
    reflection = plan.of("shuffled")["reflection"]
    assert (reflection["reflector"], reflection["shuffle_hints"]) == ("rules", "causes")
    assert plan.rate_of("shuffled") == "hero"


def test_cells_go_seed_by_seed(study: Callable[..., Any]) -> None:
    plan = study(fewer_seeds={"grpo": 1})
    rates = {(start, arm): 1e-3 for start in plan.starts for arm in plan.arms}
    models = {name: name for name in plan.starts}
    assert [(c.seed, c.start, c.arm) for c in runner._cells(plan, models, rates)] == [
        (0, "shipped", "hero"), (0, "shipped", "env_only"), (0, "shipped", "grpo"),
        (0, "shipped", "shuffled"), (0, "other", "hero"),
        (1, "shipped", "hero"), (1, "shipped", "env_only"), (1, "shipped", "shuffled"),
        (1, "other", "hero"),
    ]  # fmt: skip


def test_a_folder_keeps_to_its_study(study: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    claim_folder(study(), folder)
    claim_folder(study(seeds=5, arms=SMALL["arms"] | {"terminal": {"mode": "terminal"}}), folder)
    claim_folder(study(), folder)  # the arm that is left out is not forgotten
    changed = SMALL["arms"] | {"terminal": {"mode": "sdpo"}}
    with pytest.raises(Fault, match=r"arms\.terminal\.mode = 'terminal', and this one has 'sdpo'"):
        claim_folder(study(arms=changed), folder)
    with pytest.raises(Fault, match=r"test_tasks = 4, and this one has 5"):
        claim_folder(study(test_tasks=5), folder)
    world = {"settings": SMALL["settings"] | {"env": {"options": {"catalogue_seed": 1}}}}
    with pytest.raises(Fault, match=r"settings\.env"):
        claim_folder(study(**world), folder)
    head = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(head | {"format": 0}))
    with pytest.raises(Fault, match="format = 0"):
        claim_folder(study(), folder)


def test_a_study_s_folder_holds_no_password(study: Callable[..., Any], tmp_path: Path) -> None:
    secret = {"reflection": {"base_url": "http://me:hunter2@host/v1"}}
    plan = study(settings=SMALL["settings"] | secret)
    for _ in range(2):  # goes on with what it wrote
        claim_folder(plan, tmp_path / "out")
    kept = (tmp_path / "out" / "study.json").read_text()
    assert "http://***@host/v1" in kept and "hunter2" not in kept


def test_flags_are_not_turned_off_by_the_second_reading() -> None:
    command: Any = parse(["study", "shop-rare", "--smoke", "--report"])
    assert command.smoke and command.report and not command.debug


# ---- the figures ---------------------------------------------------------------------------------


def test_the_interval_is_the_plain_bootstrap() -> None:
    random = np.random.default_rng(1)
    own = (random.random((4, 60)) < [[0.3], [0.5], [0.7], [0.4]]).astype(float)
    other = (random.random((3, 60)) < 0.3).astype(float)
    draws = []
    for _ in range(4000):
        tasks = random.integers(60, size=60)
        one = own[random.integers(4, size=4)][:, tasks].mean()
        draws.append(one - other[random.integers(3, size=3)][:, tasks].mean())
    assert interval(own, other) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.012)


def test_the_line_by_hand() -> None:
    intercept, slope, spread, r = line([0, 1, 2], [1, 3, 8])
    # Means 1 and 4; slope (1*3 + 1*4) / 2; residuals 0.5, -1, 0.5; one degree of freedom.
    assert (intercept, slope, spread) == pytest.approx((0.5, 3.5, 1.5**0.5))
    assert r == pytest.approx(7 / (2 * 26) ** 0.5)


def rows_of(successes: dict[str, str], turns: int = 4) -> list[dict[str, Any]]:
    """One start, one row an arm, the same at both marks."""
    return [
        {"start": "shipped", "arm": arm, "seed": 0, "learning_rate": 1e-3, "marks": 2 * [
            {"success": digits, "task_turns": [turns + (arm == "grpo")] * len(digits), "turns": 40}
        ]}
        for arm, digits in successes.items()
    ]  # fmt: skip


def test_claims_are_confirmed_denied_or_left_open(study: Callable[..., Any]) -> None:
    plan = study()
    all_of, none, half = "1" * 40, "0" * 40, "01" * 20
    rows = rows_of({"base": none, "hero": all_of, "env_only": half, "grpo": none, "shuffled": half})
    found = {claim.number: claim.verdict("shipped") for claim in claims(plan, rows)}
    assert found == {1: "confirmed", 2: "confirmed", 3: "confirmed", 4: "confirmed",
                     5: "not measured"}  # fmt: skip
    rows = rows_of({"base": none, "hero": half, "env_only": half, "grpo": all_of, "shuffled": half})
    found = {claim.number: claim.verdict("shipped") for claim in claims(plan, rows)}
    assert found[1] == "undecided" and found[2] == "denied" and found[4] == "undecided"
    text = "\n".join(report_lines(plan, rows))
    assert "Within 40 turns these data show: hero cannot be told from env_only, shuffled." in text


def test_a_report_compares_with_further_arms(study: Callable[..., Any]) -> None:
    plan = study(compared=["grpo", "hero"])
    rows = rows_of({"base": "00", "hero": "11", "env_only": "11", "grpo": "00"})
    lines = list(report_lines(plan, rows))
    assert sum(line.startswith("| hero minus") for line in lines) == 1
    at = lines.index("| grpo minus | 40 turns | 80 turns |")
    found = {line.split(" | ")[0]: line for line in lines[at + 2 : at + 5]}
    assert found["| env_only"].count("-100.0 (-100.0 to -100.0): worse") == 2
    assert found["| base"].count("+0.0 (+0.0 to +0.0): not told apart") == 2
    with pytest.raises(ValueError, match="compared: unknown other"):
        study(compared=["other"])


def test_forgetting_is_seen_in_the_recall(study: Callable[..., Any]) -> None:
    rows = rows_of({"base": "01", "hero": "11"})
    rows[0]["diagnosing"], rows[1]["diagnosing"] = {"recall": 0.9}, {"recall": 0.2}
    assert claims(study(), rows)[4].verdict("shipped") == "denied"


def test_a_page_holds_texts_as_texts(tmp_path: Path) -> None:
    write_page("# A\n\n| a | b |\n|---|---|\n| **1** | <script> |\n", None, tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert "<td><b>1</b></td><td>&lt;script&gt;</td>" in page and "<h1>A</h1>" in page


def test_plots_are_drawn_where_matplotlib_is(study: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra bench")
    rows = rows_of({"base": "01", "hero": "11", "grpo": "01"})
    image = plot(study(), rows, tmp_path / "plot.png")
    assert image is not None and image.read_bytes().startswith(b"\x89PNG")


# ---- what is run ---------------------------------------------------------------------------------


def test_workers_end_with_a_study_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        "import os\nfrom concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\nfrom hero.study import runner\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), initializer=runner._prepare)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    worker = Path("/proc", done.stdout.strip())
    assert done.returncode == -9 and worker.name.isdigit()
    for _ in range(200):
        if not worker.exists() or ") Z" in (worker / "stat").read_text():  # a zombie has ended
            return
        time.sleep(0.05)
    pytest.fail(f"process {worker.name} goes on")


def test_ctrl_c_ends_the_runs_too(study: Callable[..., Any], tmp_path: Path) -> None:
    study(arms={"hero": {}}, like={}, controls=[], only={}, seeds=1, marks=[10, 100_000], jobs=1,
          starts={"shipped": {"model": "tiny-shop"}})  # fmt: skip
    name, out = str(tmp_path / "small.yaml"), tmp_path / "out"
    code = (  # as on a terminal, also if the tests themselves were started in the background
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, hero.cli; raise SystemExit(hero.cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "study", name, "--output-dir", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(1200):
                if list(out.glob("runs/*/hero/*/metrics.jsonl")):  # it would go on for hours
                    break
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130 and "goes on from them" in said
    [run] = out.glob("runs/*/hero/*/metrics.jsonl")
    size = run.stat().st_size
    time.sleep(1)
    assert run.stat().st_size == size  # nobody writes any more


def test_a_study_runs_once_and_reports(study: Callable[..., Any], tmp_path: Path) -> None:
    arms = {"hero": {}}
    study(arms=arms, like={}, controls=[], only={}, seeds=1, marks=[20], test_tasks=3, jobs=1,
          starts={"shipped": {"model": "tiny-shop"}})  # fmt: skip
    name, out = str(tmp_path / "small.yaml"), tmp_path / "out"
    assert main(["study", name, "--output-dir", str(out)]) == 0
    [row] = [json.loads(p.read_text()) for p in out.glob("rows/*/hero/test-*.json")]
    [mark] = row["marks"]
    assert 0 < mark["turns"] <= 20 and len(mark["success"]) == len(mark["task_turns"]) == 3
    assert "recall" in row["diagnosing"] and mark["cpu_seconds"] > 0
    [gap] = [json.loads(p.read_text()) for p in out.glob("gaps/shipped/*.json")]
    assert gap["gap"] == pytest.approx(gap["share"] * (gap["teacher_right"] - gap["student_right"]))
    path = next(out.glob("rows/*/hero/test-*.json"))
    path.write_text(json.dumps(row | {"kept": True}))
    again = cells.Cell(
        start="shipped", arm="hero", seed=0, settings={"optim": {"learning_rate": 1e-3}},
        model="tiny-shop", marks=(20,), split="test", tasks=3,
    )  # fmt: skip
    assert cells.run_cell(again, out)["kept"]  # a row that is there is not made again
    assert "hero" in (out / "report.md").read_text() and (out / "report.html").is_file()
    assert cells.PANEL_SEED == 7001  # rows of before were made with it
