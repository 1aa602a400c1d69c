"""The benchmarks' own machinery: registry, contestants, report, and the GPU script's dry run.

The oracle of the report is a session written by hand, whose medians and ratios can be seen.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import check_problems, correctness, measure, memory, profiled, report  # noqa: E402
from benchmarks.baselines import CONTESTANTS, OURS, Ours, Unavailable  # noqa: E402
from benchmarks.ours import Variant, gradient_bytes, planned, refusal  # noqa: E402
from benchmarks.problem import FAR, make_problem, relative_error, truth  # noqa: E402
from benchmarks.shapes import MODELS, Case, case_sets  # noqa: E402
from benchmarks.yardsticks import YARDSTICKS  # noqa: E402
from hero_kernels import fused_linear_divergence  # noqa: E402
from hero_kernels.machines import Machine, Products  # noqa: E402

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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny shapes on a busy machine: threads would wait for each other, many times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
@pytest.mark.parametrize(
    "name", ["hero", "hero-own-head", "hero-sliced", "eager", "liger-chunked", "trl-chunked"]
)
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


@pytest.mark.parametrize(
    ("name", "reason"),
    [("hero-triton", "runs on cuda"), ("hero-cuda", "runs on cuda"), ("hero-fused", "fused")],
)
def test_a_way_that_cannot_serve_is_unavailable_with_its_reason(name: str, reason: str) -> None:
    case = Case("tiny", 32, "float32")
    with pytest.raises(Unavailable, match=reason):
        CONTESTANTS[name].make(case, "cpu")
    limits = measure.Limits(rounds_seconds=0, call_seconds=30, memory=False)
    result = measure.measure(case, [name], "cpu", limits)[name]
    assert result.skipped
    assert not result.failed  # a benchmark of it is skipped, not failed


def test_an_unknown_design_is_refused_in_words() -> None:
    reason = refusal(Variant(design="folded"), (8, 4, 16), torch.float32, "cpu")
    assert reason is not None and "got 'folded'" in reason


def test_prediction_is_the_planners() -> None:
    case = Case("tiny", 64)
    limits = measure.Limits(rounds_seconds=0, call_seconds=30, memory=False)
    results = measure.measure(case, ["hero", "hero-sliced", "eager"], "cpu", limits)
    chosen = planned(Variant(), (64, 32, 512), torch.bfloat16, "cpu", max_active_rows=64)
    hero = results["hero"]
    assert hero.predicted_seconds == chosen.seconds
    # In bf16: dX is [64, 32], dW is [512, 32].
    assert gradient_bytes(case) == 2 * (64 * 32 + 512 * 32)
    assert hero.predicted_bytes == chosen.bytes + gradient_bytes(case)
    assert (hero.plan or "").startswith("chunked, ")
    assert (results["hero-sliced"].plan or "").startswith("sliced, ")
    assert results["eager"].predicted_seconds is None


def test_every_way_of_ours_is_a_contestant_of_ours() -> None:
    assert {"hero", "hero-own-head", "hero-cuda", "hero-fused", "hero-sliced"} <= set(OURS)
    made = {CONTESTANTS[name].make for name in OURS}
    assert all(isinstance(make, Ours) for make in made)
    assert len(made) == len(OURS)


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


def predicted_session() -> dict[str, object]:
    changed = json.loads(json.dumps(session()))
    hero = changed["cases"][0]["results"]["hero"]
    hero |= {"plan": "chunked", "predicted_seconds": 1.5, "predicted_bytes": 3 * 2**20}
    return changed


def test_report_renders_medians_ratios_and_reasons() -> None:
    text = report.render(json.loads(json.dumps(session())))
    assert "Abacus 3000, 2 threads, AVX2 (row kernel: avx2); torch 2.13.0" in text
    assert "**tiny: 64 tokens, H = 32, V = 512, bfloat16, JSD**" in text
    # The median of 4/1, 4/2 and 9/3 is 3, not the ratio of the medians.
    assert "| theirs | 4000.0 | 3.00x | 4.00 |  | 50 | 10 % | 30 % |  |" in text
    assert "| ours | 2000.0 |  | 2.00 | 2.00 | 1 | 0.1 % | 1 % | 2 % |" in text
    assert "Not measured: absent (trl cannot be imported)." in text


def test_report_shows_predictions_where_a_file_has_them() -> None:
    text = report.render(predicted_session())
    header = text.split("\n\n")[2].splitlines()[0]
    assert "| time, ms | predicted, ms |" in header
    assert "| extra memory, MiB | predicted, MiB |" in header
    # Predicted 1.5 s and 3 MiB, measured 2 s and 1 MiB; the others have no prediction.
    assert "| ours | 2000.0 | 1500.0 |  | 2.00 | 2.00 | 1 | 3 |" in text
    assert "| theirs | 4000.0 |  | 3.00x |" in text


def test_files_without_predictions_load_and_keep_their_columns() -> None:
    old = json.loads(json.dumps(session()))
    for result in old["cases"][0]["results"].values():
        for name in ("failed", "plan", "predicted_seconds", "predicted_bytes"):
            del result[name]
    assert "predicted" not in report.render(old)
    assert report.render(old) == report.render(session())


def test_sweep_is_summed_up_by_token() -> None:
    gradients = 2 * 512 * 32  # bytes of dW
    cases = [
        measure.as_json(
            Case("tiny", tokens),
            {
                "hero": measure.Result(
                    "ours", None, [1e-5 * tokens], gradients + 2**21 + 64 * tokens
                ),
                "library-gemms": measure.Result("products", None, [5e-6 * tokens]),
                "own-gemms": measure.Result("own products", None, [5e-6 * tokens]),
            },
        )
        for tokens in (64, 4096)
    ]
    text = report.render({"machine": MACHINE, "cases": cases})
    # 10 us a token, of which 5 in products; 2 MiB beside dX and dW, at both lengths.
    assert "| 64 | 10.00 | 5.00 | 2 |" in text
    assert "| 4096 | 10.00 | 5.00 | 2 |" in text
    assert "us a token" not in report.render(session())


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


def all_checks(group: str) -> list[check_problems.Check]:
    subjects = {name: check_problems.SUBJECTS[name] for name in ("torch", "sliced")}
    refused: dict[str, set[str]] = {name: set() for name in subjects}
    size = check_problems.SIZES["smallest"]
    return list(correctness.CHECKS[group](size, "cpu", subjects, refused))


def test_checks_fail_for_a_loss_that_is_a_hundredth_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*tensors: torch.Tensor, **settings: object) -> torch.Tensor:
        return 1.01 * fused_linear_divergence(*tensors, **settings)  # type: ignore[operator]

    assert all(check.passed for check in all_checks("operation"))
    monkeypatch.setattr(correctness, "fused_linear_divergence", off)
    checks = all_checks("operation")
    assert len(checks) == 2 * 18 * 3  # subjects, problems; loss, dX and dW
    assert not any(check.passed for check in checks)


def test_checks_cut_a_call_into_unequal_pieces() -> None:
    inputs = check_problems.make_inputs(67, 45, 1025, "cpu", 0.1)
    for variant in (Variant("torch", "chunked"), Variant("torch", "sliced")):
        cut = check_problems.pieces(variant, inputs, 67)
        chosen = planned(variant, (67, 45, 1025), torch.float32, "cpu", **cut)
        total = 67 if variant.design == "chunked" else 1025
        assert chosen.size < total and total % chosen.size


def test_profiled_calls_what_is_available(capsys: pytest.CaptureFixture[str]) -> None:
    called = profiled.profile(Case("tiny", 32, "float32"), ["hero", "hero-cuda"], "cpu")
    assert called == ["hero"]
    assert "hero-cuda is unavailable: impl='cuda' cannot serve" in capsys.readouterr().out


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
    check = json.loads((tmp_path / "check.json").read_text())
    assert check["subjects"] == ["cpu", "torch", "sliced"]
    assert {entry["subject"] for entry in check["checks"]} == set(check["subjects"])
    assert len(check["checks"]) > 200
    assert all(entry["passed"] for entry in check["checks"])
    cases = json.loads((tmp_path / "benchmark.json").read_text())["cases"]
    assert [set(case["results"]) for case in cases] == [{"hero", "eager", *YARDSTICKS}]
    [compared] = json.loads((tmp_path / "comparison.json").read_text())["cases"]
    assert {"hero", "hero-triton", "hero-cuda", "hero-fused"} <= set(compared["results"])
    assert compared["results"]["hero-sliced"]["seconds"]
    sweep = json.loads((tmp_path / "sweep.json").read_text())["cases"]
    assert [case["case"]["tokens"] for case in sweep] == [64, 128, 256]
    assert set(json.loads((tmp_path / "ceilings.json").read_text())) >= {"copy_gb_per_s"}
    [costs] = tmp_path.glob("cpu*.json")
    check_costs(json.loads(costs.read_text()))
    # With compiled.json, which a dry run leaves out, as many as the GPU machine gives back.
    assert len(list(tmp_path.iterdir())) == 7
    check_time_limits((tmp_path / "session.log").read_text())


def check_costs(values: dict[str, Any]) -> None:
    """A file of calibrate --quick is one that `machines.load` reads, marked as not measured."""
    products = {dtype: Products(**rates) for dtype, rates in values.pop("products").items()}
    costs = Machine(name="dry-run", products=products, **values)
    assert not costs.measured
    assert {"torch"} <= set(costs.rows)
    rates = [rate for kernel in costs.rows.values() for rate in kernel.values()]
    rates += [costs.bandwidth, costs.fresh]
    for product in products.values():
        rates += [product.logits, product.hidden, product.weight]
    assert all(rate > 0 for rate in rates)
    # Python and dispatch of a chunk, not the scheduling of a busy machine.
    assert 1e-6 < costs.chunk_seconds < 3e-3


def check_time_limits(log: str) -> None:
    """A command on the GPU machine may take ten minutes; what must run fits in nine together."""
    limits = {name: int(limit) for name, limit in re.findall(r"== (\S+) \(at most (\d+) s\)", log)}
    assert list(limits)[:3] == ["build", "check", "ceilings"]  # the most valuable first
    assert {"memcheck", "racecheck", "tests", "sweep", "comparison", "ncu"} <= set(limits)
    optional = limits.pop("ncu") + limits.pop("compiled")
    assert optional < 120
    assert sum(limits.values()) < 540


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
        f"FAILED {stage}: exit status 3"
        for stage in ("check", "ceilings", "calibrate", "benchmarks", "comparison", "sweep")
    ]
