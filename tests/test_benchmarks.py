"""The benchmarks' own machinery: cases, contestants, statistics, tables.

The oracle of the tables is a session written by hand, whose medians and ratios can be seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import machine, measure, memory, numerics, report  # noqa: E402
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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny shapes on a busy machine: threads would wait for each other, many times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Cases and problems


def test_cases_are_distinct() -> None:
    every = [case for cases in case_sets().values() for case in cases]
    for name, cases in case_sets().items():
        ids = [case.id for case in cases]
        assert len(set(ids)) == len(ids), name
    assert {case.model for case in every} == {*MODELS} - {"odd"}  # which checks alone use


def test_share_of_actions_is_spread_over_turns() -> None:
    problem = make_problem(Case("tiny", 80, "float32", action_share=0.2), "cpu")
    assert problem.active.sum() == 16
    assert problem.active.view(8, 10)[:, :2].all()  # the first two of each of the eight turns
    assert [len(hidden) for hidden in problem.active_rows()] == [16, 16]


# Contestants


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize(
    "name",
    ["hero", "hero-own-head", "hero-split", "eager", "chunked", "liger-chunked", "trl-chunked"],
)
def test_contestants_compute_the_same_loss(name: str, share: float, divergence: str) -> None:
    case = Case("tiny", 40, "float32", divergence, share)
    problem = make_problem(case, "cpu", FAR)
    expected = truth(problem)
    try:
        loss_of = CONTESTANTS[name](case, "cpu")
    except Unavailable as reason:
        pytest.skip(str(reason))
    loss = loss_of(problem)
    loss.backward()
    assert relative_error(loss, expected.loss) < 1e-4
    for tensor, gradient in zip(problem.trainable, expected.gradients, strict=True):
        assert relative_error(tensor.grad, gradient) < 1e-4


LIMITS = measure.Limits(rounds_seconds=0, call_seconds=30, memory=False)


def test_a_contestant_that_computes_something_else_is_excluded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager = CONTESTANTS["eager"]
    monkeypatch.setitem(
        CONTESTANTS, "twice", lambda case, device: lambda given: 2 * eager(case, device)(given)
    )
    results = measure.measure(Case("tiny", 32, "float32"), ["eager", "twice"], "cpu", LIMITS)
    assert results["twice"].skipped == "its loss is 1e+02 % off that of fp64"
    timed = {name for name, result in results.items() if result.seconds}
    assert timed == {"eager", *YARDSTICKS}
    assert {len(results[name].seconds) for name in timed} == {measure.MIN_ROUNDS}


@pytest.mark.parametrize("name", ["hero-triton", "hero-cuda"])
def test_a_way_that_cannot_serve_is_skipped_with_its_reason_not_failed(name: str) -> None:
    result = measure.measure(Case("tiny", 32, "float32"), [name], "cpu", LIMITS)[name]
    assert result.skipped and "impl" in result.skipped
    assert not result.failed


def test_plans_are_told_of_ours_only() -> None:
    results = measure.measure(Case("tiny", 64), ["hero", "eager"], "cpu", LIMITS)
    assert (results["hero"].plan or "").startswith(("cpu", "torch"))
    assert results["eager"].plan is None


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


# Statistics and tables


def session() -> dict[str, Any]:
    results = {
        "hero": measure.Result(None, [1.0, 2.0, 3.0], 2**20, 1e-3, [0.01, 0.02]),
        "eager": measure.Result(None, [4.0, 4.0, 9.0], 50 * 2**20, 0.1, [0.3]),
        "chunked": measure.Result(None, [0.5, 1.0, 1.5], 2**20, 0.1, [0.01]),
        "trl-chunked": measure.Result("trl cannot be imported\nfor a reason"),
        "library-gemms": measure.Result(None, [1.0, 1.0, 1.0]),
        "own-gemms": measure.Result(None, [0.5, 1.0, 2.0]),
    }
    entries = [measure.as_json(case, results) for case in (Case("tiny", 64), Case("odd", 64))]
    return json.loads(json.dumps({"machine": MACHINE, "cases": entries}))  # type: ignore[no-any-return]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def row(text: str, name: str) -> list[str]:
    """The first row of a contestant, without its name."""
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    return next(line[1:] for line in lines if line[0] == name)


def test_report_renders_medians_ratios_and_errors() -> None:
    text = report.render(session())
    assert "Abacus 3000, 2 threads, AVX2 (row kernel: avx2); torch 2.13.0" in text
    assert "**tiny: 64 tokens, H = 32, V = 512, bfloat16, JSD**" in text
    # The median of 4/1, 4/2 and 9/3 is 3, not the ratio of the medians.
    assert row(text, "eager") == ["4000", "3.00x", "4.00", "", "50", "10 %", "30 %", ""]
    assert row(text, "hero") == ["2000", "", "2.00", "2.00", "1", "0.1 %", "1 %", "2 %"]


def test_tables_fit_a_hundred_columns() -> None:
    entry = session()["cases"][0]
    longest = measure.Result(None, [123.456] * 3, 123456 * 2**20, 1.23e-7, [1.23e-7, 1.23e-7])
    entry["results"] = {name: asdict(longest) for name in (*CONTESTANTS, *YARDSTICKS)}
    entry["results"]["hero"]["plan"] = "words " * 40
    text = report.render({"machine": MACHINE, "cases": [entry, entry]})
    assert max(map(len, text.splitlines())) <= 100


def test_the_end_says_what_is_ahead_of_what() -> None:
    text = report.render(session())
    end = text[text.index("**What is ahead of what**") :]
    assert row(end, "eager") == ["2", "2", "3x", "50x", "30x"]
    assert row(end, "chunked") == ["2", "0", "0.5x", "1x", "1x"]
    assert "hero is behind chunked in tiny: 64 tokens" in end
    assert "behind eager" not in end


def test_those_not_measured_stand_in_one_block_at_the_end() -> None:
    text = report.render(session())
    assert text.endswith("Not measured:\n\n- trl-chunked (2 cases): trl cannot be imported\n")
    assert text.count("trl-chunked") == 1


def test_a_busy_machine_is_said() -> None:
    busy = MACHINE | {"cores": 2, "load_average": 1.5}
    assert "load average was 1.5 on 2 cores" in " ".join(report.ending(busy, []))
    assert machine.busy(MACHINE | {"cores": 2, "load_average": 0.1}) is None
    assert machine.busy(MACHINE) is None  # of an older file
    assert machine.describe("cpu")["load_average"] >= 0


def test_uneven_rounds_are_said() -> None:
    results = {"library-gemms": measure.Result(None, [1.0, 1.0, 4.0])}
    text = report.case_table(Case("tiny", 64), results)
    assert "library-gemms once took 4.0 x its median" in text
    assert "Uneven" in report.render(session())  # own-gemms took 2.0 once, and 1.0


def test_sweep_is_summed_up_by_token() -> None:
    gradients = 2 * 512 * 32  # bytes of dW
    cases = [
        (
            Case("tiny", tokens),
            {
                "hero": measure.Result(None, [1e-5 * tokens], gradients + 2**21 + 64 * tokens),
                "library-gemms": measure.Result(None, [5e-6 * tokens]),
            },
        )
        for tokens in (64, 4096)
    ]
    # 10 us a token, of which 5 in products; 2 MiB beside dX and dW, at both lengths.
    assert report.is_sweep(cases)
    assert row(report.sweep(cases), "64") == ["10.00", "5.00", "2"]
    assert row(report.sweep(cases), "4096") == ["10.00", "5.00", "2"]
    assert not report.is_sweep(report.entries_of(session()))


def test_results_survive_json() -> None:
    entry = session()["cases"][0]
    case, results = measure.from_json(entry)
    assert case == Case("tiny", 64)
    assert {name: asdict(result) for name, result in results.items()} == entry["results"]


def test_document_is_filled_from_the_named_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(session()))
    document = f"before\n<!-- results: {path} -->\nstale\n<!-- end -->\nafter\n"
    filled = report.updated(document)
    assert filled.startswith(f"before\n<!-- results: {path} -->\nAbacus 3000")
    assert filled.endswith("<!-- end -->\nafter\n")
    assert "stale" not in filled
    assert report.updated(filled) == filled


def test_headline_has_both_types_in_a_row_and_says_what_was_not_measured() -> None:
    given = session()
    entry = given["cases"][0]
    given["cases"] = [entry, {**entry, "case": {**entry["case"], "dtype": "float32"}}]
    given["machine"]["versions"] |= {"liger-kernel": "7.8.9", "trl": "1.2.3"}
    text = report.headline(given)
    hero = row(text, "**hero_kernels**")
    assert hero == ["**2000 ms**", "**1 MiB**", "**1 %**", "**2000 ms**", "**1 MiB**"]
    assert row(text, "the same under torch.compile") == ["not measured", "", "", "not measured", ""]
    assert "TRL 1.2.3" in text


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    machine.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        machine.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_numerics_tell_the_ways_apart() -> None:
    [jsd, *_] = numerics.measure((24, 32, 512), [5e-4])
    errors = jsd["gradient_error"]
    assert errors["delta"] < 5e-3 < errors["bf16 logits"]


def test_settling_the_memory_is_not_in_the_seconds_of_a_call() -> None:
    held = [[number] for number in range(1_000_000)]  # for the garbage collector to walk
    did = memory.counted(lambda: {"turns": float(len(held))})()
    assert did["turns"] == 1_000_000
    assert did["seconds"] < 0.005
