"""The benchmarks' own machinery: registry, contestants, report, and the GPU script's dry run.

The oracle of the report is a session written by hand, whose medians and ratios can be seen.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import measure, memory, report  # noqa: E402
from benchmarks.baselines import CONTESTANTS, Unavailable  # noqa: E402
from benchmarks.problem import FAR, make_problem, relative_error, truth  # noqa: E402
from benchmarks.shapes import MODELS, Case, case_sets  # noqa: E402
from benchmarks.yardsticks import YARDSTICKS  # noqa: E402

DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")
MACHINE = {
    "device": "cpu",
    "processor": "Abacus 3000",
    "threads": 2,
    "torch_instruction_set": "AVX2",
    "kernel_instruction_set": "avx2",
    "versions": {"torch": "2.13.0"},
    "date": "2026-01-02",
    "commit": "abc1234",
}


def every_case() -> list[Case]:
    return [case for cases in case_sets().values() for case in cases]


def test_cases_are_distinct_and_survive_their_ids() -> None:
    for name, cases in case_sets().items():
        ids = [case.id for case in cases]
        assert len(set(ids)) == len(ids), name
    assert all(Case.parse(case.id) == case for case in every_case())
    assert {case.model for case in every_case()} == set(MODELS)


@pytest.mark.parametrize("text", ["smollm2-135m_2048", "gpt-9_8_float32_jsd_100_trained"])
def test_wrong_case_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected something like"):
        Case.parse(text)


def test_share_of_actions_is_spread_over_turns() -> None:
    active = make_problem(Case("tiny", 80, "float32", action_share=0.2), "cpu").active
    assert active.sum() == 16
    assert active.view(8, 10)[:, :2].all()  # the first two of each of the eight turns


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("name", ["hero", "hero-own-head", "eager", "liger-chunked", "trl-chunked"])
def test_contestants_compute_the_same_loss(name: str, share: float, divergence: str) -> None:
    case = Case("tiny", 40, "float32", divergence, share)
    problem = make_problem(case, "cpu", FAR)
    expected = truth(problem)
    try:
        loss_of = CONTESTANTS[name].make(case, "cpu")
    except Unavailable as reason:
        pytest.skip(str(reason))
    loss = loss_of(problem)
    loss.backward()
    assert relative_error(loss, expected.loss) < 1e-4
    for tensor, gradient in zip(problem.trainable, expected.gradients, strict=True):
        assert relative_error(tensor.grad, gradient) < 1e-4


def test_a_contestant_that_computes_something_else_is_excluded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager = CONTESTANTS["eager"].make
    twice = measure.CONTESTANTS["eager"].__class__(
        "twice the loss", lambda case, device: lambda problem: 2 * eager(case, device)(problem)
    )
    monkeypatch.setitem(CONTESTANTS, "twice", twice)
    limits = measure.Limits(rounds_seconds=0, call_seconds=30, memory=False)
    results = measure.measure(Case("tiny", 32, "float32"), ["eager", "twice"], "cpu", limits)
    assert results["twice"].skipped == "its loss is 1e+02 % off that of fp64"
    assert not results["eager"].skipped
    timed = {name for name, result in results.items() if result.seconds}
    assert timed == {"eager", *YARDSTICKS}
    assert {len(results[name].seconds) for name in timed} == {measure.MIN_ROUNDS}


def test_a_contestant_over_the_limit_is_named_with_its_time() -> None:
    limits = measure.Limits(rounds_seconds=0, call_seconds=0, memory=False)
    results = measure.measure(Case("tiny", 32, "float32"), ["eager"], "cpu", limits)
    assert "more than the limit of 0 s" in (results["eager"].skipped or "")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_sees_a_tensor_that_is_gone_when_the_call_returns() -> None:
    """Eager holds several fp32 [4096, 512] tensors, 8 MiB each; the fused loss 256 rows of two."""
    case = Case("tiny", 4096, "float32")
    eager, hero = (memory.on_cpu(case, name) for name in ("eager", "hero"))
    assert eager > 4 * 8 * 2**20
    assert hero < eager / 4


def session() -> dict[str, object]:
    results = {
        "hero": measure.Result("ours", None, [1.0, 2.0, 3.0], 2**20, 1e-3, [0.01, 0.02]),
        "eager": measure.Result("theirs", None, [4.0, 4.0, 9.0], 50 * 2**20, 0.1, [0.3]),
        "trl-chunked": measure.Result("absent", "trl cannot be imported\nfor a reason"),
        "library-gemms": measure.Result("products", None, [1.0, 1.0, 1.0]),
        "own-gemms": measure.Result("own products", None, [0.5, 1.0, 2.0]),
    }
    return {"machine": MACHINE, "cases": [measure.as_json(Case("tiny", 64), results)]}


def test_report_renders_medians_ratios_and_reasons() -> None:
    text = report.render(json.loads(json.dumps(session())))
    assert "Abacus 3000, 2 threads, AVX2 (row kernel: avx2); torch 2.13.0" in text
    assert "**tiny: 64 tokens, H = 32, V = 512, bfloat16, JSD**" in text
    # The median of 4/1, 4/2 and 9/3 is 3, not the ratio of the medians.
    assert "| theirs | 4000.0 | 3.00x | 4.00 |  | 50 | 10 % | 30 % |  |" in text
    assert "| ours | 2000.0 |  | 2.00 | 2.00 | 1 | 0.1 % | 1 % | 2 % |" in text
    assert "Not measured: absent (trl cannot be imported)." in text


def test_results_survive_json() -> None:
    entry = json.loads(json.dumps(session()))["cases"][0]  # type: ignore[index]
    case, results = measure.from_json(entry)
    assert case == Case("tiny", 64)
    assert {name: asdict(result) for name, result in results.items()} == entry["results"]


def test_plot_needs_matplotlib_or_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(json.loads(json.dumps(session())), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_document_is_filled_from_the_named_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "r.json").write_text(json.dumps(session()))
    document = "before\n<!-- results: r.json -->\nstale\n<!-- end -->\nafter\n"
    filled = report.updated(document)
    assert filled.startswith("before\n<!-- results: r.json -->\nAbacus 3000")
    assert filled.endswith("<!-- end -->\nafter\n")
    assert "stale" not in filled
    assert report.updated(filled) == filled


def test_tables_of_the_documentation_are_those_of_the_committed_results() -> None:
    document = (ROOT / "docs" / "benchmarks.md").read_text()
    assert re.search(report.BLOCK, document)
    assert report.updated(document) == document


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_gpu_session_dry_run(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "benchmarks/gpu_session.sh", "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    checks = json.loads((tmp_path / "check.json").read_text())["checks"]
    assert len(checks) > 100
    assert all(check["passed"] for check in checks)
    cases = json.loads((tmp_path / "benchmark.json").read_text())["cases"]
    assert [set(case["results"]) for case in cases] == [{"hero", "eager", *YARDSTICKS}]
    assert set(json.loads((tmp_path / "ceilings.json").read_text())) >= {"copy_gb_per_s"}
    assert "compute-sanitizer" in (tmp_path / "session.log").read_text()


def test_gpu_session_goes_on_after_a_failing_stage(tmp_path: Path) -> None:
    """An interpreter that fails every command fails every stage, and none is left out."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    done = subprocess.run(
        ["bash", "benchmarks/gpu_session.sh", "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": str(broken)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert failed == [
        "FAILED check: exit status 3",
        "FAILED ceilings: exit status 3",
        "FAILED benchmarks: exit status 3",
    ]
