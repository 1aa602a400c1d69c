"""Every mistake gets a message with what was got, what was expected and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hero_kernels import (
    FusedLinearDivergence,
    KernelOptions,
    divergence_from_logits,
    fused_linear_divergence,
    linear_logprobs,
)

N, H, V = 4, 6, 20
LONG = torch.zeros(N, dtype=torch.long)


def call(**changes: Any) -> Any:
    """A call that is right, with some arguments changed."""
    arguments: dict[str, Any] = {
        "student_hidden": torch.randn(N, H),
        "student_weight": torch.randn(V, H),
        "teacher_hidden": torch.randn(N, H),
        **changes,
    }
    return fused_linear_divergence(**arguments)


def test_the_unchanged_call_is_right() -> None:
    assert call().isfinite()


OWN = {"teacher_weight": torch.randn(V, H)}
TOPK = (torch.zeros(N, 3, dtype=torch.long), torch.full((N, 3), -2.0))
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "hidden size": ({"student_weight": torch.randn(V, 7)}, r"\[4, 6\].*\[20, 7\].*same H"),
    "dtype": (
        {"student_weight": torch.randn(V, H).bfloat16()},
        "torch.float32.*torch.bfloat16.*autocast",
    ),
    "integer hidden": ({"student_hidden": LONG[:, None].expand(N, H)}, "one type of float32"),
    "meta": (
        {"student_weight": torch.randn(V, H, device="meta")},
        "student_weight is on the meta device, without data",
    ),
    "sparse": (
        {"student_weight": torch.randn(V, H).to_sparse()},
        r"student_weight is torch\.sparse_coo.*dense.*to_dense",
    ),
    "target -100": (
        {"target_ids": torch.tensor([3, -100, 2, 1])},
        "between 0 and 19; got values from -100 to 3",
    ),
    "float8": (
        {"student_weight": torch.randn(V, H).to(torch.float8_e4m3fn)},
        r"student_weight is torch\.float8_e4m3fn",
    ),
    "float8 bias": (
        {"student_bias": torch.randn(V).to(torch.float8_e4m3fn)},
        r"student_bias is \[20\] of torch\.float8_e4m3fn",
    ),
    "float8 token weights": (
        {"token_weights": torch.ones(N).to(torch.float8_e4m3fn)},
        r"token_weights is torch\.float8_e4m3fn; expected real numbers",
    ),
    "H of 0": (
        {
            name: torch.randn(size, 0)
            for name, size in (("student_hidden", N), ("student_weight", V), ("teacher_hidden", N))
        },
        "neither V nor H being 0",
    ),
    "V of 0": ({"student_weight": torch.randn(0, H)}, "neither V nor H being 0"),
    "student bias": (
        {"student_bias": torch.randn(3)},
        r"student_bias is \[3\] of .*; expected \[20\]",
    ),
    "teacher shape": (
        {"teacher_hidden": torch.randn(5, H)},
        r"got \[5, 6\].*expected \[4, 6\].*teacher_weight",
    ),
    "teacher rows": ({"teacher_hidden": torch.randn(5, H), **OWN}, "same leading shape"),
    "teacher dtype": (
        {"teacher_hidden": torch.randn(N, H).half(), **OWN},
        "teacher_hidden is torch.float16 and teacher_weight is torch.float32: expected one type",
    ),
    "teacher precision": (
        {
            name: torch.randn(V if "weight" in name else N, H).double()
            for name in ("teacher_hidden", "teacher_weight")
        },
        "student_hidden is torch.float32 and teacher_hidden torch.float64",
    ),
    "teacher grad": (
        {"teacher_hidden": torch.randn(N, H, requires_grad=True)},
        r"pass teacher_hidden\.detach\(\)",
    ),
    "teacher head grad": (
        {"teacher_weight": torch.randn(V, H, requires_grad=True)},
        r"pass teacher_weight\.detach\(\)",
    ),
    "teacher bias alone": ({"teacher_bias": torch.randn(V)}, "teacher_bias needs teacher_weight"),
    "vocabularies": (
        {"teacher_weight": torch.randn(24, H)},
        "20 tokens and the teacher 24.*vocab_size",
    ),
    "vocab_size": ({"vocab_size": 21}, "between 1 and 20.*got 21"),
    "no teacher": ({"teacher_hidden": None}, "teacher_hidden or teacher_topk; got neither"),
    "two teachers": ({"teacher_topk": TOPK}, "teacher_hidden or teacher_topk; got both"),
    "server shape": (
        {"teacher_hidden": None, "teacher_topk": (TOPK[0][:2], TOPK[1]), "support": "topk"},
        r"ids \[2, 3\].*logprobs \[4, 3\].*expected both \[4, 'k'\]",
    ),
    "server support": (
        {"teacher_hidden": None, "teacher_topk": TOPK},
        "teacher_topk needs support='topk'",
    ),
    "server head": (
        {"teacher_hidden": None, "teacher_topk": TOPK, "support": "topk", **OWN},
        "no use beside teacher_topk",
    ),
    "server ids": (
        {"teacher_hidden": None, "teacher_topk": (TOPK[0] + V, TOPK[1]), "support": "topk"},
        r"teacher_topk\[0\].*between 0 and 19.*20 to 20",
    ),
    "divergence": ({"divergence": "kl"}, "'jsd', 'forward_kl', 'reverse_kl'; got 'kl'"),
    "a list": ({"divergence": ["jsd"]}, r"must be one of 'jsd'.*got \['jsd'\]"),
    "beta": ({"beta": 1.0}, "between 0 and 1, got 1.0.*reverse_kl"),
    "temperature": ({"temperature": 0.0}, "temperature must be a finite number above 0; got 0.0"),
    "softcap": ({"softcap": -1.0}, "softcap must be.*or None to switch it off; got -1.0"),
    "top_k missing": ({"support": "topk"}, "top_k between 1 and 20.*got None"),
    "top_k too large": ({"support": "topk", "top_k": 21}, "top_k between 1 and 20.*got 21"),
    "top_k idle": ({"top_k": 3}, "top_k=3 belongs to support='topk'"),
    "top_k source": (
        {"support": "topk", "top_k": 3, "top_k_source": "me"},
        "'student', 'teacher'; got 'me'",
    ),
    "sampled": (
        {"support": "sampled", "target_ids": LONG},
        "divergence='reverse_kl'; got divergence='jsd'",
    ),
    "sampled ids": ({"support": "sampled", "divergence": "reverse_kl"}, "needs target_ids"),
    "is_clip": ({"is_clip": 2.0, "target_ids": LONG}, "is_clip needs old_logprobs"),
    "old_logprobs": ({"old_logprobs": torch.zeros(N)}, "old_logprobs needs target_ids"),
    "old nan": (
        {"old_logprobs": torch.full((N,), torch.nan), "target_ids": LONG},
        "old_logprobs has 4 entries that are NaN",
    ),
    "target shape": ({"target_ids": LONG[:3]}, r"target_ids is \[3\]; expected \[4\]"),
    "target type": ({"target_ids": torch.zeros(N)}, "expected int64 indices"),
    "target range": ({"target_ids": LONG + V}, "between 0 and 19; got values from 20 to 20"),
    "target masked": ({"target_ids": LONG - 100}, "Give the other tokens weight 0"),
    "weights shape": (
        {"token_weights": torch.ones(N, 1)},
        r"token_weights is \[4, 1\]; expected \[4\]",
    ),
    "weights nan": (
        {"token_weights": torch.tensor([1, torch.nan, torch.inf, 1])},
        "2 entries that are NaN or inf",
    ),
    "weights grad": (
        {"token_weights": torch.ones(N, requires_grad=True)},
        r"token_weights\.detach\(\)",
    ),
    "turn weights": ({"turn_weights": torch.ones(2)}, "turn_weights needs turn_ids"),
    "turn weights nan": (
        {"turn_weights": torch.tensor([torch.nan]), "turn_ids": LONG},
        "turn_weights has 1 entries",
    ),
    "turn range": (
        {"turn_weights": torch.ones(2), "turn_ids": LONG + 2},
        "turn_ids must be less than 2.*got 2",
    ),
    "turn mean": ({"loss_aggregation": "turn"}, "needs turn_ids"),
    "trajectory mean": ({"loss_aggregation": "trajectory"}, "needs trajectory_ids"),
    "aggregation": ({"loss_aggregation": "batch"}, "'token', 'turn', 'trajectory'; got 'batch'"),
    "reduction": ({"reduction": "avg"}, "'mean', 'sum', 'none'; got 'avg'"),
    "num_items": ({"num_items": torch.ones(2)}, r"num_items is \[2\]; expected.*one element"),
    "temperature nan": ({"temperature": float("nan")}, "temperature must be a finite.*got nan"),
    "impl": ({"impl": "cublas"}, "Unknown impl 'cublas'.*'auto', 'torch', 'cpu', 'cuda', 'triton'"),
    "impl device": ({"impl": "triton"}, "impl='triton' cannot serve.*runs on cuda"),
    "impl dtype": (
        {
            "impl": "cpu",
            "student_hidden": torch.randn(N, H).double(),
            "student_weight": torch.randn(V, H).double(),
            "teacher_hidden": torch.randn(N, H).double(),
        },
        "impl='cpu' cannot serve.*torch.float64",
    ),
    "impl support": (
        {"impl": "cpu", "support": "topk", "top_k": 2},
        "support='topk' is implemented by 'torch'",
    ),
    "split support": (
        {"options": KernelOptions(tile_columns=8), "support": "topk", "top_k": 2},
        "options.tile_columns needs support='full', got support='topk'",
    ),
    "split impl": (
        {"options": KernelOptions(tile_columns=8), "impl": "cpu"},
        "impl='cpu' cannot serve .* the vocabulary is split",
    ),
    "budget": (
        {"options": KernelOptions(memory_budget=1000)},
        "memory_budget=1000 bytes is too small for 4 rows of 20 logits: the least is",
    ),
    "num_items of a sum": ({"num_items": 3.0, "reduction": "sum"}, "num_items is the divisor"),
    "num_items of none": ({"num_items": 3.0, "reduction": "none"}, "num_items is the divisor"),
    "num_items negative": ({"num_items": -1.0}, "num_items must be .*0 or more.*got -1.0"),
    "num_items nan": ({"num_items": torch.tensor(torch.nan)}, "num_items must be .*finite.*nan"),
    "signed token weights": (
        {"token_weights": torch.tensor([1.0, -1.0, 1.0, 1.0])},
        "token_weights has negative entries.*num_items.*reduction='sum'",
    ),
    "signed turn weights": (
        {"turn_weights": torch.tensor([1.0, -1.0]), "turn_ids": LONG},
        "turn_weights has negative entries",
    ),
    "turn in two trajectories": (
        {
            "turn_ids": torch.tensor([0, 1, 1, 2]),
            "trajectory_ids": torch.tensor([0, 0, 1, 1]),
            "loss_aggregation": "trajectory",
        },
        "turn_ids has 1 in more than one trajectory",
    ),
    "temperature of a token": (
        {"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])},
        "temperature must be above 0 for every token; got 0.0",
    ),
    "temperature shape": ({"temperature": torch.ones(3)}, r"temperature is \[3\]; expected \[4\]"),
    "temperature infinite": (
        {"temperature": torch.tensor([1.0, torch.inf, 1.0, 1.0])},
        "temperature has 1 entries that are NaN or infinite",
    ),
    "learnable divisor": (
        {"num_items": torch.tensor(1.0, requires_grad=True)},
        r"num_items requires grad.*num_items\.detach\(\)",
    ),
    "learnable temperature": (
        {"temperature": torch.tensor(1.0, requires_grad=True)},
        r"temperature requires grad.*temperature\.detach\(\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_rows": 0}, "tile_rows must be at least 1.*got 0"),
        ({"tile_columns": 0}, "tile_columns must be at least 1.*got 0"),
        ({"memory_budget": 0}, "memory_budget must be at least 1.*got 0"),
        ({"max_active_rows": -3}, "max_active_rows must be at least 1.*got -3"),
        ({"memory_budget": 9, "tile_rows": 8}, "memory_budget chooses the tile"),
        ({"memory_budget": 9, "tile_columns": 8}, "memory_budget chooses the tile"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelOptions(**options)


def test_settings_of_a_module_are_fixed() -> None:
    module = FusedLinearDivergence(beta=0.3)
    with pytest.raises(TypeError, match="beta: fixed when the module was made"):
        module(torch.randn(N, H), torch.randn(V, H), torch.randn(N, H), beta=0.5)


def test_settings_that_cannot_learn() -> None:
    """A tensor would get no gradient, silently."""
    for name in ("logit_scale", "softcap", "beta"):
        with pytest.raises(TypeError, match=f"{name} must be a number, got a tensor"):
            call(**{name: torch.tensor(0.5, requires_grad=True)})
    with pytest.raises(TypeError, match="temperature must be a number for linear_logprobs"):
        linear_logprobs(torch.randn(N, H), torch.randn(V, H), LONG, temperature=torch.ones(N))


def test_a_divisor_is_a_number() -> None:
    for value in (True, "3", [3]):
        with pytest.raises(TypeError, match=r"num_items must be a number.*got"):
            call(num_items=value)


@pytest.mark.parametrize("of", ["hidden", "logits", "logprobs"])
def test_transforms_that_differentiate_are_refused_by_name(of: str) -> None:
    weight, teacher = torch.randn(V, H), torch.randn(N, H)
    losses = {
        "hidden": lambda x: fused_linear_divergence(x, weight, teacher),
        "logits": lambda x: divergence_from_logits(x @ weight.T, teacher @ weight.T),
        "logprobs": lambda x: linear_logprobs(x, weight, LONG).sum(),
    }
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with pytest.raises(RuntimeError, match=r"(hidden|logits).*transform of torch\.func"):
            transform(losses[of])(torch.randn(N, H))


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "target_ids", "token_mask"])
def test_tensors_of_inference_mode_are_named(name: str) -> None:
    given = {
        "hidden": torch.randn(N, H, requires_grad=True), "bias": torch.randn(V),
        "weight": torch.randn(V, H, requires_grad=True), "target_ids": LONG,
        "token_mask": torch.ones(N),
    }  # fmt: skip
    with torch.inference_mode():
        made = given[name].detach().clone()
    if name == "token_mask":  # only which tokens count is kept of it
        linear_logprobs(**(given | {name: made})).sum().backward()
        return
    with pytest.raises(ValueError, match=f"{name} was made under torch.inference_mode"):
        linear_logprobs(**(given | {name: made}), return_entropy=True)
    for side in ("student_", "teacher_") if name in ("hidden", "weight", "bias") else ():
        tensors = {
            f"{whose}{what}": given[what].detach().requires_grad_(whose == "student_")
            for whose in ("student_", "teacher_") for what in ("hidden", "weight", "bias")
        }  # fmt: skip
        tensors[side + name] = made
        with pytest.raises(ValueError, match=f"{side}{name} was made under torch.inference_mode"):
            fused_linear_divergence(**tensors, reduction="none")
        fused_linear_divergence(**tensors).backward()  # keeps nothing of them
    with torch.no_grad():
        linear_logprobs(**(given | {name: made}))
