"""Which implementation is chosen, and what is said about it."""

from __future__ import annotations

import pytest
import torch
from problems import missing

from hero_kernels import explain, supports
from hero_kernels.backends import IMPLEMENTATIONS, Request, choose


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_implementation_is_tested_here(impl: str) -> None:
    """By the tests that take the fixture of this name, or it is said why not."""
    if reason := missing(impl):
        pytest.skip(f"{impl}: {reason}")


def test_torch_serves_everything() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for support in ("full", "topk", "sampled"):
            assert supports("torch", dtype=dtype, support=support) is None
    assert supports("torch", split=True) is None
    assert supports("torch", device="cuda") is None
    assert supports("torch", dtype=torch.float64, function="linear_logprobs") is None
    assert "torch.int64" in (supports("torch", dtype=torch.int64) or "")


def test_reasons() -> None:
    assert supports("triton") == "it runs on cuda, the tensors are on cpu"
    assert supports("cpu", device="cuda") == "it runs on cpu, the tensors are on cuda"
    assert supports("cpu", dtype=torch.float64) == "it does not take torch.float64"
    assert supports("cpu", support="topk") == "support='topk' is implemented by 'torch' only"
    assert "the vocabulary is split" in str(supports("cpu", split=True))
    assert supports("cpu", function="linear_logprobs") == "it has no kernels for linear_logprobs"
    assert "No implementation takes torch.int32" in str(supports("auto", dtype=torch.int32))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"impl": "gpu"}, "Unknown impl 'gpu': expected one of 'auto', 'torch', 'cpu'"),
        ({"function": "cross_entropy"}, "function must be one of 'fused_linear_divergence'"),
        ({"support": "half"}, "support must be one of 'full', 'topk', 'sampled'; got 'half'"),
        ({"divergence": "kl"}, "divergence must be one of 'jsd', 'forward_kl', 'reverse_kl'"),
    ],
)
def test_names_that_are_unknown(asked: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        supports(**{"impl": "torch", **asked})


def test_auto_takes_the_special_one_where_it_serves() -> None:
    request = Request("cpu", torch.float32)
    special = "cpu" if supports("cpu") is None else "torch"
    assert choose("auto", request) == special
    assert choose("torch", request) == "torch"
    for change in (
        {"support": "topk"},
        {"dtype": torch.float64},
        {"split": True},
        {"function": "linear_logprobs"},
    ):
        assert choose("auto", request._replace(**change)) == "torch"
    with pytest.raises(ValueError, match=r"No implementation takes torch\.int32"):
        choose("auto", request._replace(dtype=torch.int32))


def test_explain_names_all_that_were_not_taken() -> None:
    text = explain(2048, 576, 49152, impl="torch")
    assert text.startswith("implementation: torch\n")
    assert "not triton: it runs on cuda, the tensors are on cpu" in text
    if supports("cpu") is None:
        assert "not cpu: torch was named" in text
    with pytest.raises(ValueError, match="support must be one of"):
        explain(1, 1, 1, support="half")
    with pytest.raises(ValueError, match=r"impl=.triton. cannot serve"):
        explain(1, 1, 1, impl="triton")
    with pytest.raises(TypeError, match="hidden_size must be a whole number, got a Tensor"):
        explain(2, torch.zeros(2, 2), 2)  # type: ignore[arg-type]
