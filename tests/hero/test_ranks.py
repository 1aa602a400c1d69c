"""Runs on two processes (gloo, FSDP2). Oracle: the same run on one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hero import cli
from hero.checks import check_ranks
from hero.interrupt import Interrupt, Stopped
from hero.memory import predict, sizes
from hero.ranks import ManyRanks, Ranks, open_ranks
from hero.report.tracking import read_jsonl
from tests.hero.on_ranks import run, varied
from tests.hero.short_runs import settings

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The runs of on_ranks.py, and of one process: (folder of all, what torchrun ended with)."""
    root = tmp_path_factory.mktemp("ranks")
    run(varied(model_path), root / "one")
    run(varied(model_path, updates=1), root / "one-two")
    run(varied(model_path, model={"lora_rank": 4}, updates=1), root / "lora-one")
    program = str(Path(__file__).with_name("on_ranks.py"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         program, str(model_path), str(root)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (root / "died").is_dir(), done.stderr[-5000:]
    run(varied(model_path, resume=str(root / "two-one")), root / "two-one")
    return root, done


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """A step moves a weight by up to 1e-3; rounding of its gradient by 1e-6 of that."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-6)


def test_weights_and_teacher_are_those_of_one_process(job: Any) -> None:
    one, two = (job[0] / name / "checkpoint" for name in ("one", "two"))
    for file in ("student", "teacher"):
        assert_close(*(load_file(run / f"{file}.safetensors") for run in (one, two)))
    best = [load_file(job[0] / name / "best" / "model.safetensors") for name in ("one", "two")]
    assert_close(*best)


def test_each_process_holds_half_of_weights_moments_and_teacher(job: Any, model_path: Path) -> None:
    held = json.loads((job[0] / "bytes.json").read_text())
    size = sizes(str(model_path))
    one, two = (predict(varied(model_path), "cpu", size, n).always for n in (1, 2))
    for name in held[0]:
        both = [of_rank[name] for of_rank in held]
        assert sum(both) == one[name]  # each tensor is on one of them
        assert max(both) == pytest.approx(two[name], rel=0.1)  # its rows may be odd


def test_so_are_an_adapter_and_its_teacher(job: Any) -> None:
    one, two = (job[0] / name / "checkpoint" for name in ("lora-one", "lora-two"))
    for file in ("student", "teacher"):
        assert_close(*(load_file(run / f"{file}.safetensors") for run in (one, two)))
    names = ("lora-one", "lora-two")
    best = [load_file(job[0] / name / "best" / "adapter_model.safetensors") for name in names]
    assert_close(*best)


def test_gradients_and_loss_are_those_of_one_process(job: Any) -> None:
    """AdamW's first moment is a mean of the gradients: here of magnitude 1e-3 to 1e-6."""
    one, two = (torch.load(job[0] / run / "checkpoint" / "optimizer.pt") for run in ("one", "two"))
    moments = [saved["optimizer"]["state"] for saved in (one, two)]
    assert len(moments[0]) > 3
    for number, of_one in moments[0].items():
        got = moments[1][number]["exp_avg"]
        scale = float(of_one["exp_avg"].abs().max())
        torch.testing.assert_close(got, of_one["exp_avg"], rtol=0, atol=1e-3 * scale + 1e-12)
    lines = [read_jsonl(job[0] / name / "metrics.jsonl") for name in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) == 4
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        # The clock's numbers differ, and so does rounding itself, which is what drift measures.
        numbers = {n: x for n, x in ours.items() if "second" not in n and "drift" not in n}
        assert all(theirs[name] < 1e-5 for name in ours if "drift" in name)
        assert numbers == pytest.approx({name: theirs[name] for name in numbers}, rel=1e-4)
    assert lines[0][-1]["reflection/generated_tokens"] > 0 and lines[0][-1]["grad_norm"] > 0


def test_episodes_are_those_of_one_process(job: Any) -> None:
    def played(name: str) -> list[Any]:
        return [
            (
                r["update"],
                r["split"],
                r["id"],
                [(t["action_text"], t["trained"]) for t in r["turns"]],
            )
            for r in read_jsonl(job[0] / name / "trajectories.jsonl")
        ]

    assert len(played("one")) == 4 + 3 * 4 + 4
    assert played("one") == played("two")


@pytest.mark.parametrize("name", ["one-two", "two-one", "stopped"])
def test_any_number_of_processes_goes_on(job: Any, name: str) -> None:
    """From one to two, from two to one, and after a signal from two to two."""
    one, parts = (job[0] / run / "checkpoint" for run in ("one", name))
    for file in ("student", "teacher"):
        assert_close(*(load_file(run / f"{file}.safetensors") for run in (one, parts)))
    steps = [line["step"] for line in read_jsonl(job[0] / name / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3]


def test_a_signal_to_one_process_stops_all_and_they_save(job: Any) -> None:
    told = (job[0] / "stopped" / "told.txt").read_text()
    assert told == f'[{signal.SIGTERM}, {signal.SIGTERM}] {{"update": 1'


def test_an_error_of_one_process_ends_all_and_they_save(job: Any) -> None:
    told = (job[0] / "failed" / "told.txt").read_text()
    assert told.startswith("['RuntimeError: no room left', 'Fault: Rank 0 has ended the run: ")
    assert told.endswith('RuntimeError: no room left\'] {"update": 1')


def test_processes_with_different_models_are_refused(job: Any) -> None:
    assert (job[0] / "unlike.txt").read_text().startswith("Rank 1 has read other weights than")


def test_processes_that_part_are_told_apart(job: Any) -> None:
    said = (job[0] / "parted.txt").read_text()
    assert "rank 1 is at parted.<locals>.other, rank 0 at parted.<locals>.one" in said


def test_a_process_that_dies_ends_the_job(job: Any) -> None:
    root, done = job
    assert done.returncode != 0
    assert "Rank 0 of 2 has lost the others" in done.stderr
    assert not (root / "died" / "summary.json").exists()
    assert json.loads((root / "died" / "checkpoint" / "state.json").read_text())["update"] == 0


def test_shares_are_even_and_leave_nothing_out() -> None:
    sizes = [9, 1, 1, 7, 3, 2, 2, 5]
    ranks = [object.__new__(ManyRanks) for _ in range(3)]
    shares = []
    for number, each in enumerate(ranks):
        each.rank, each.size = number, 3
        shares.append(each.share(sizes))
    assert sorted(i for share in shares for i in share) == list(range(8))
    assert sorted(sum(sizes[i] for i in share) for share in shares) == [10, 10, 10]
    assert Ranks().share(sizes) == list(range(8))


def test_a_signal_waits_until_all_have_heard_of_it() -> None:
    with Interrupt(agreed=True) as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.pending == signal.SIGTERM
        with interrupt.deferred():
            assert interrupt.told(signal.SIGTERM) is None
        with pytest.raises(Stopped), interrupt.live():
            raise AssertionError("not reached")
        with pytest.raises(Stopped), interrupt.live():
            os.kill(os.getpid(), signal.SIGTERM)
        assert not interrupt.torn and not interrupt.pending
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)  # the second one does not wait
        assert interrupt.torn


def test_more_processes_than_episodes_are_refused(model_path: Path) -> None:
    check_ranks(settings(model_path), 4)
    with pytest.raises(ValueError, match=r"5 processes share .* are 4: raise .* at least 5"):
        check_ranks(settings(model_path), 5)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two GPUs")
@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", r"2 processes on this machine and [01] GPUs"), ("cuda:0", "one GPU for all 2")],
)
def test_each_process_needs_a_gpu_of_its_own(launched: None, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_ranks(device)


def test_a_launcher_that_shards_is_refused(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"configured for FSDP, .* --multi_gpu"):
        open_ranks("cpu")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"mixed precision fp16, .* --model\.dtype"):
        open_ranks("cpu")


def test_other_commands_run_in_one_process(
    launched: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["recipes"]) == 1
    assert "[rank 1] error: 2 processes were started" in capsys.readouterr().err


def test_a_port_in_use_is_said(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        names = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        run = str(tmp_path / "run")
        words = ["train", "quickstart", "--model.path", str(model_path), "--output-dir", run]
        assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert f"do not meet at 127.0.0.1:{port}" in said and "--master-port" in said
    assert not Path(run).exists()
