"""Two processes that share the vocabulary. Oracle: the fp64 reference on the whole head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import DIVERGENCES, Problem, make_problem, relative_error, truth
from ranks import WORLD_SIZE, on_ranks
from torch import Tensor

from hero_kernels import (
    DivergenceOutput,
    KernelOptions,
    fused_linear_divergence,
    linear_logprobs,
    reference,
)

ROWS, HIDDEN, SHARD = 13, 6, 300
VOCAB = WORLD_SIZE * SHARD
MASK = torch.tensor([0.5, 0.0, 1.0, 2.0, 0.0, 1.0, 0.3, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])

CASES: dict[str, dict[str, Any]] = {
    **{f"{name}-{red}": {"divergence": name, "reduction": red}
       for name in DIVERGENCES for red in ("mean", "none")},
    "own_head": {"shared": False, "bias": True, "reduction": "none"},
    "bias": {"bias": True, "softcap": 5.0, "temperature": 0.7, "logit_scale": 1.3},
    "padded": {"vocab_size": 460, "divergence": "reverse_kl"},
    "rank_of_padding": {"vocab_size": 300, "bias": True},
    "ratio": {"old_logprobs": torch.full((ROWS,), -6.0), "is_clip": 2.0},
    "masked": {"token_weights": MASK, "reduction": "none", "divergence": "forward_kl"},
    "all_masked": {"token_weights": torch.zeros(ROWS)},
    "nearby": {"distance": 1e-4},
    "temperatures": {"temperature": torch.linspace(0.5, 2.0, ROWS)},
}  # fmt: skip
TILES: dict[str, dict[str, Any]] = {
    "whole": {"tile_rows": 5},
    "split": {"tile_columns": 128},
}


def problem_of(case: str) -> tuple[Problem, dict[str, Any]]:
    torch.manual_seed(3)
    settings = dict(CASES[case])
    made = {name: settings.pop(name) for name in ("shared", "bias", "distance") if name in settings}
    problem = make_problem(ROWS, HIDDEN, VOCAB, **made)
    settings["target_ids"] = torch.randint(0, settings.get("vocab_size", VOCAB), (ROWS,))
    return problem, settings


def shard_of(problem: Problem, rank: int, dtype: torch.dtype) -> Problem:
    part = slice(rank * SHARD, (rank + 1) * SHARD)
    cut = {
        name: value[part] if value is not None and name.endswith(("weight", "bias")) else value
        for name, value in vars(problem).items()
    }
    return Problem(**cut).to("cpu", dtype)


def call(
    problem: Problem, settings: dict[str, Any], **options: Any
) -> tuple[DivergenceOutput, dict[str, Tensor]]:
    output = fused_linear_divergence(
        *problem.positional(),
        **problem.biases(),
        **settings,
        return_stats=True,
        options=KernelOptions(**options),
    )
    assert isinstance(output, DivergenceOutput)
    upstream_sum(output.loss).backward()
    return output, problem.gradients()


def upstream_sum(loss: Tensor) -> Tensor:
    """[] with an upstream gradient of 1, 2, 3, ... for the entries of `loss`."""
    return (loss * torch.arange(1.0, 1.0 + loss.numel()).view(loss.shape)).sum()


def results_of_all_cases(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for tile, options in TILES.items():
        for case in CASES:
            problem, settings = problem_of(case)
            shard = shard_of(problem, rank, torch.float32)
            output, grads = call(shard, settings, process_group=dist.group.WORLD, **options)
            detached = {k: v.detach() for k, v in output._asdict().items() if v is not None}
            results[f"{case}-{tile}"] = detached, grads
        problem, settings = problem_of("jsd-mean")
        shard = shard_of(problem, rank, torch.bfloat16)
        _, grads = call(shard, settings, process_group=dist.group.WORLD, **options)
        results[f"bf16-{tile}"] = grads
    alone = dist.new_group([rank], use_local_synchronization=True)
    problem, settings = problem_of("jsd-mean")
    output, _ = call(problem.to("cpu", torch.float32), settings, process_group=alone)
    results["group_of_one"] = output.loss.detach()
    return results


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return on_ranks(results_of_all_cases)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", CASES)
def test_shards_add_up_to_the_whole(by_rank: list[dict[str, Any]], case: str, tile: str) -> None:
    problem, settings = problem_of(case)
    exact = problem.to("cpu", torch.float64)
    expected = reference.fused_linear_divergence(*exact.positional(), **exact.biases(), **settings)
    upstream_sum(expected.loss).backward()
    results = [results[f"{case}-{tile}"] for results in by_rank]
    active = settings.get("token_weights", torch.ones(ROWS)) != 0
    for name, value in expected._asdict().items():
        assert (name in results[0][0]) == (value is not None), name
        if value is not None:
            value = value.where(active, 0.0) if value.shape == active.shape else value
            assert relative_error(results[0][0][name], value) < 2e-5, name
    for name, value in exact.gradients().items():
        shards = [grads[name] for _, grads in results]
        ours = shards[0] if name == "student_hidden" else torch.cat(shards)
        assert relative_error(ours, value) < 1e-4, name


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_to_the_bit(by_rank: list[dict[str, Any]], case: str, tile: str) -> None:
    (first, first_grads), (second, second_grads) = (r[f"{case}-{tile}"] for r in by_rank)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert torch.equal(first_grads["student_hidden"], second_grads["student_hidden"])


@pytest.mark.parametrize("tile", TILES)
def test_bf16_summands_are_not_rounded(by_rank: list[dict[str, Any]], tile: str) -> None:
    """dX of two ranks is as exact as that of one: its summands travel in fp32."""
    problem, settings = problem_of("jsd-mean")
    rounded = problem.to("cpu", torch.bfloat16)
    _, exact = truth(rounded, **settings)
    ours = by_rank[0][f"bf16-{tile}"]["student_hidden"]
    assert relative_error(ours, exact.gradients()["student_hidden"]) < 3e-3


def test_group_of_one_counts_as_none(by_rank: list[dict[str, Any]]) -> None:
    problem, settings = problem_of("jsd-mean")
    output, _ = call(problem.to("cpu", torch.float32), settings, tile_rows=256)
    for results in by_rank:
        torch.testing.assert_close(results["group_of_one"], output.loss)


def message(**changes: Any) -> str:
    """What is raised for a call with the given departures from one that is right."""
    torch.manual_seed(0)
    group = changes.pop("group", dist.group.WORLD)
    rows, hidden, shard = (
        changes.pop(k, v) for k, v in (("rows", 4), ("hidden", 3), ("shard", 10))
    )
    dtype = changes.pop("dtype", torch.float32)
    h_s, h_t = torch.randn(2, rows, hidden, dtype=dtype)
    weight = torch.randn(shard, hidden, dtype=dtype)
    options = KernelOptions(process_group=group, **changes.pop("options", {}))
    try:
        fused_linear_divergence(h_s, weight, h_t, **changes, options=options)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def messages(rank: int) -> dict[str, str]:
    of_rank_0 = dist.new_group([0])
    return {
        "right": message(),
        "shard": message(shard=10 + rank),
        "again": message(),
        "rows": message(rows=4 + rank),
        "hidden": message(hidden=3 + rank),
        "dtype": message(dtype=(torch.float32, torch.bfloat16)[rank]),
        "vocab_size": message(vocab_size=19 - rank),
        "validated": message(options={"validate": True}),
        "member": message(group=of_rank_0),
        "type": message(group="tp"),
        "support": message(support="topk", top_k=3),
        "teacher": message(teacher_weight=torch.randn(11, 3), vocab_size=20),
        "padding": message(vocab_size=21),
        "impl": message(impl="cpu"),
    }


def test_errors_name_both_sides() -> None:
    first, second = on_ranks(messages)
    assert first["right"] == first["again"] == first["validated"] == ""
    assert second["right"] == second["again"] == second["validated"] == ""
    for name, theirs in {
        "shard": "rank 1 has student_weight [11, 3] float32, 4 rows",
        "rows": "rank 1 has student_weight [10, 3] float32, 5 rows",
        "hidden": "rank 1 has student_weight [10, 4] float32, 4 rows",
        "dtype": "rank 1 has student_weight [10, 3] bfloat16, 4 rows",
        "vocab_size": "4 rows without gradient, vocab_size 18",
    }.items():
        assert first[name] == second[name]
        assert theirs in first[name] and "rank 0 has student_weight [10, 3] float32" in first[name]
        assert "Pad the vocabulary to a multiple" in first[name]
    assert first["member"] == "" and "rank 1 is not a member" in second["member"]
    for name, text in {
        "type": "must be a ProcessGroup, got str: of a DeviceMesh pass mesh.get_group()",
        "support": "options.process_group needs support='full', got support='topk': leave it None",
        "teacher": "student_weight has 10 tokens on this rank, teacher_weight 11",
        "padding": "vocab_size must be between 1 and 20, the smaller head; got 21",
        "impl": "impl='cpu' cannot serve this call: it sees whole rows only, and here",
    }.items():
        assert text in first[name] and text in second[name], (name, first[name])


def test_group_without_torch_distributed() -> None:
    hidden, weight = torch.randn(3, 2), torch.randn(5, 2)
    options = KernelOptions(process_group=object())
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialised: call"):
        fused_linear_divergence(hidden, weight, hidden, options=options)
    with pytest.raises(ValueError, match="linear_logprobs has no process_group"):
        linear_logprobs(hidden, weight, torch.zeros(3, dtype=torch.int64), options=options)
