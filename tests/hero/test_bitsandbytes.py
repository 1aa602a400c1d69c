"""Moments in 8 bits and weights in 4, against float32 and the weights read out of the 4 bits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hero.config import ModelConfig, OptimConfig
from hero.policy import Policy
from hero.weights import make_optimizer


def test_moments_in_8_bits_step_as_adamw_does(wide_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    moved, ids = [], torch.arange(40).view(2, 20)
    for kind in ("adamw", "adamw_8bit"):
        own = Policy.load(ModelConfig(path=str(wide_path), device="cpu"))
        start = {name: p.detach().clone() for name, p in own.trainable().items()}
        optim = OptimConfig(learning_rate=1e-3, weight_decay=0.1, kind=kind)  # type: ignore[arg-type]
        optimizer = make_optimizer(own.to_train(), optim)
        for _ in range(5):
            hidden = own.hidden(ids[:, :-1]).flatten(0, 1)
            (-own.logprobs(hidden, ids[:, 1:].flatten())[0].mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(torch.cat([(p - start[n]).flatten() for n, p in own.trainable().items()]))
    moments = [t for state in optimizer.state.values() for t in state.values()
               if isinstance(t, Tensor) and t.numel() >= 4096]  # fmt: skip
    assert len(moments) > 20 and all(t.dtype == torch.uint8 for t in moments)
    assert torch.cosine_similarity(moved[0], moved[1], dim=0) > 0.95
    assert 0.9 < moved[1].norm() / moved[0].norm() < 1.1


def test_weights_in_4_bits_under_lora(wide_path: Path) -> None:
    """Against adapters on the weights as they are read out of the 4 bits."""
    bnb, _ = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")

    def load(quantize: str) -> Policy:
        torch.manual_seed(0)
        model = ModelConfig(path=str(wide_path), device="cpu", lora_rank=4, quantize=quantize)  # type: ignore[arg-type]
        policy = Policy.load(model)
        for name, parameter in policy.trainable().items():
            torch.manual_seed(len(name))
            nn.init.normal_(parameter, std=0.1)
        return policy

    own, plain = load("4bit"), load("none")
    assert own.trainable().keys() == plain.trainable().keys()
    layers = {n: m for n, m in own.model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == 14 and not isinstance(own.head, bnb.nn.Linear4bit)
    off = 0.0
    for name, layer in layers.items():
        read = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        into = plain.model.get_submodule(name).weight
        off = max(off, float((into - read).detach().abs().max()))
        into.data.copy_(read)
    assert off > 1e-3  # something was rounded
    ids = torch.arange(9)[None]
    with torch.no_grad():
        own.hidden(ids)  # as the sampler reads
    states = [policy.hidden(ids) for policy in (own, plain)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)
    for hidden in states:
        hidden.square().sum().backward()
    for name, parameter in plain.trainable().items():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            own.trainable()[name].grad, parameter.grad, rtol=0, atol=1e-3 * scale
        )


@pytest.mark.parametrize("setting", ["optim.kind=adamw_8bit", "model.quantize=4bit"])
def test_without_bitsandbytes(
    setting: str, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=rf"{setting} needs bitsandbytes.*pip install"):
        if setting.startswith("optim"):
            make_optimizer([nn.Parameter(torch.zeros(2))], OptimConfig(kind="adamw_8bit"))
        else:
            Policy.load(ModelConfig(path=str(model_path), quantize="4bit", lora_rank=4))


def test_pages_need_a_gpu() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"between a GPU and main memory.*set --optim.kind adamw"):
        make_optimizer([nn.Parameter(torch.zeros(2))], OptimConfig(kind="paged_adamw"))
