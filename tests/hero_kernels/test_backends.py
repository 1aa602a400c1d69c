"""Which implementation is chosen, what is said about it, and what an import pulls in."""

from __future__ import annotations

import pytest
import torch
from hero_kernels.layout import chunk_sizes

from hero_kernels import backends, explain, linear_logprobs, supports
from hero_kernels.backends import IMPLEMENTATIONS, Implementation, Request, choose, chunk_rows
from hero_kernels.gemm import takes_16_bit


def request(
    dtype: torch.dtype = torch.float32, support: str = "full", device: str = "cpu"
) -> Request:
    return Request(torch.device(device), dtype, support, False)


def test_torch_serves_everything() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for support in ("full", "topk", "sampled"):
            assert supports("torch", dtype=dtype, support=support) is None
    assert supports("torch", device="cuda") is None
    assert "torch.int64" in (supports("torch", dtype=torch.int64) or "")


def test_reasons() -> None:
    assert supports("triton") == "it runs on cuda, the tensors are on cpu"
    assert supports("cpu", device="cuda") == "it runs on cpu, the tensors are on cuda"
    assert supports("cpu", support="topk") == "support='topk' is implemented by 'torch' only"
    assert supports("cpu", pointwise_clip=0.1) == "pointwise_clip is implemented by 'torch' only"
    with pytest.raises(ValueError, match="Unknown impl 'gpu'"):
        supports("gpu")
    with pytest.raises(ValueError, match="function must be one of 'fused_linear_divergence'"):
        supports("cpu", function="cross_entropy")


def test_every_function_has_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation of the divergence need not have kernels for the log-probabilities."""
    asked = {"function": "linear_logprobs"}
    assert supports("torch", dtype=torch.float64, **asked) is None
    assert supports("cpu", **asked) == supports("cpu")
    assert supports("cpu", device="cuda", **asked) == ("it runs on cpu, the tensors are on cuda")
    monkeypatch.setitem(
        IMPLEMENTATIONS, "own", Implementation("hero_kernels.rows", None, (torch.float32,), True)
    )
    assert supports("own") is None
    assert supports("own", **asked) == "it has no kernels for linear_logprobs"
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert choose("auto", request()) == "own"
    assert linear_logprobs(hidden, weight, torch.zeros(3).long()).isfinite().all()
    with pytest.raises(
        ValueError, match=r"impl='own' cannot serve .* no kernels for linear_logprobs"
    ):
        linear_logprobs(hidden, weight, torch.zeros(3).long(), impl="own")


def test_reasons_of_designs() -> None:
    fused = {"design": "fused", "dtype": torch.bfloat16}
    assert supports("triton", **fused) == "it runs on cuda, the tensors are on cpu"
    assert "not those of impl='cpu'" in str(supports("cpu", **fused))
    assert "support='full'" in str(supports("auto", **fused, support="topk"))
    assert supports("torch", design="sliced") is None
    assert "it sees whole rows only" in str(supports("cpu", design="sliced"))
    assert "support='full'" in str(supports("torch", design="sliced", support="sampled"))
    assert "sliced" in str(supports("torch", design="sliced", function="linear_logprobs"))
    with pytest.raises(ValueError, match=r"design must be one of .*; got 'rows'"):
        supports("torch", design="rows")


def test_reasons_of_designs_by_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a device."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(backends, "refusal", lambda *_: None)
    asked = {"design": "fused", "device": "cuda", "dtype": torch.bfloat16}
    assert "8.0 or newer, got 7.5" in str(supports("triton", **asked))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert supports("triton", **asked) is None
    assert "bfloat16 or float16" in str(supports("triton", **asked | {"dtype": torch.float32}))
    assert "2^24" in str(supports("triton", **asked, vocab_size=1 << 24))


def test_auto_takes_the_special_one_where_it_serves() -> None:
    built = supports("cpu") is None
    assert choose("auto", request()) == ("cpu" if built else "torch")
    assert choose("auto", request(support="topk")) == "torch"
    assert choose("auto", request(torch.float64)) == "torch"
    assert choose("torch", request()) == "torch"
    with pytest.raises(ValueError, match=r"No implementation takes torch\.int32"):
        choose("auto", request(torch.int32))


def test_explain_adds_up() -> None:
    """(2048, 576, 49152) in bf16 on CPU: two fp32 chunks of 256 rows; without bf16 products the
    gradient takes the place of one and dW is summed in fp32."""
    text = explain(2048, 576, 49152, dtype=torch.bfloat16)
    assert "rows at once: 256, 8 chunk(s) for 2048 rows" in text
    assert "head GEMMs: 4 (teacher logits, h_s - h_t, dX, dW), 116.0 GFLOP each" in text
    assert "workspace: 96.0 MiB of logits" in text
    if takes_16_bit(torch.device("cpu"), torch.bfloat16):
        assert "their gradient 192.0 MiB (8 chunk(s) held)" in text and "sum of dW" not in text
    else:
        assert "108.0 MiB for the float32 sum of dW" in text
    assert "not triton: it runs on cuda, the tensors are on cpu" in text
    frozen = explain(2048, 576, 49152, trainable_head=False, shared_head=False, impl="torch")
    assert "head GEMMs: 3 (teacher logits, student logits, dX)" in frozen
    assert frozen.startswith("implementation: torch") and "sum of dW" not in frozen
    with pytest.raises(ValueError, match=r"impl=.triton. cannot serve"):
        explain(1, 1, 1, impl="triton")


def test_explain_knows_cuda_without_having_it() -> None:
    text = explain(8192, 4096, 151936, device="cuda", dtype=torch.bfloat16, impl="torch")
    assert "held as: teacher float32, student float32, gradient bfloat16" in text
    assert "options.max_active_rows lets them be dropped" in text


@pytest.mark.parametrize(("rows", "size"), [(0, 4), (1, 4), (4, 4), (9, 4), (2049, 256)])
def test_chunks_are_even_and_complete(rows: int, size: int) -> None:
    sizes = chunk_sizes(rows, size)
    assert sum(sizes) == rows
    assert all(0 < part <= size for part in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_chunk_rows_follow_the_device() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert chunk_rows(cpu, 49152) == 256
    assert chunk_rows(cuda, 151936) * 151936 * 8 <= 3 << 30
    assert chunk_rows(cuda, 49152) >= 4096
