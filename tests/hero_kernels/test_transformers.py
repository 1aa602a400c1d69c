"""From a model to hidden states and head. Oracle: the model's own logits, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import WORLD_SIZE, on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hero_kernels import fused_linear_divergence
from hero_kernels.integrations.transformers import LMStates, hidden_and_head

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
V, H = 61, 16
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 4, "experts_implementation": "eager"}  # grouped ones know no fp64
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "soft cap": ("Gemma2", {"final_logit_softcapping": 3.0}),
    "scale": ("Cohere", {"logit_scale": 0.25}),
    "divisor": ("Granite", {"logits_scaling": 5.0}),
    "bias": ("Phi", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3 moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 8, **EXPERTS}),
    "gemma3": ("Gemma3", {}),
    "smollm3": ("SmolLM3", {}),
    "mistral": ("Mistral", {}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, **EXPERTS}),
}


def made(kind: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    family, options = KINDS[kind]
    of_text = getattr(transformers, f"{family}TextConfig", None)  # Gemma 3, which sees images too
    config = (of_text or getattr(transformers, f"{family}Config"))(**SIZES, **options)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)


def ids_of(rank: int = 0) -> Tensor:
    return torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(rank))


def teacher_of(states: LMStates) -> Tensor:
    noise = torch.randn(states.hidden.shape, generator=torch.Generator().manual_seed(9))
    return states.hidden.detach() + 0.1 * noise.to(states.hidden)


def logits_of(states: LMStates, hidden: Tensor | None = None) -> Tensor:
    hidden = states.hidden if hidden is None else hidden
    logits = nn.functional.linear(hidden, states.weight, states.bias) * states.logit_scale
    return logits if states.softcap is None else states.softcap * (logits / states.softcap).tanh()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): p.grad.full_tensor()
        if isinstance(p.grad, DTensor)
        else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def jsd(logits_s: Tensor, logits_t: Tensor) -> Tensor:
    s, t = logits_s.log_softmax(-1), logits_t.log_softmax(-1)
    m = ((s.exp() + t.exp()) / 2).log()
    return 0.5 * (s.exp() * (s - m) + t.exp() * (t - m)).sum(-1).mean()


def same_as_dense(model: Any) -> None:
    """Loss and gradients against those of the model's logits, all of them."""
    states = hidden_and_head(model, ids_of())
    teacher = teacher_of(states)
    loss = fused_linear_divergence(states.hidden, **states.student_head(), teacher_hidden=teacher)
    assert isinstance(loss, Tensor)
    loss.backward()
    fused = gradients(model)
    model.zero_grad()
    logits = model(ids_of()).logits
    torch.testing.assert_close(logits_of(states), logits)
    expected = jsd(logits, logits_of(states, teacher).detach())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert fused.keys() == gradients(model).keys()
    for name, value in gradients(model).items():
        assert value.norm() > 0, name
        torch.testing.assert_close(fused[name], value, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_the_models(kind: str) -> None:
    model = made(kind)
    if kind == "bias":
        nn.init.normal_(model.lm_head.bias)
    same_as_dense(model)


@pytest.mark.parametrize("where", ["lm_head", "lm_head and layers", "modules_to_save", "other"])
def test_adapters_are_trained(where: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = {"lm_head": ["lm_head"], "lm_head and layers": ["q_proj", "lm_head"]}
    saved = ["lm_head"] if where == "modules_to_save" else None
    config = peft.LoraConfig(
        r=3, target_modules=targets.get(where, ["q_proj"]), modules_to_save=saved,
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(made(), config, autocast_adapter_dtype=False)
    same_as_dense(model)
    with model.disable_adapter(), torch.no_grad():
        states = hidden_and_head(model, ids_of())
        torch.testing.assert_close(logits_of(states), model(ids_of()).logits)
        torch.testing.assert_close(logits_of(states), made()(ids_of()).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_dora": True}, "Dora"), ({"lora_dropout": 0.1}, "lora_dropout while training")],
)
def test_adapters_that_no_weight_expresses_are_refused(options: Any, message: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=3, target_modules=["lm_head"], **options)
    model = peft.get_peft_model(made(), config).train()
    with pytest.raises(ValueError, match=message):
        hidden_and_head(model, ids_of())


def test_a_head_with_an_adapter_is_not_sent_to_its_base_weight() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(made(), peft.LoraConfig(r=3, target_modules=["lm_head"]))
    head: Any = model.get_output_embeddings()
    hidden = torch.randn(2, head.weight.shape[1])
    with pytest.raises(
        TypeError, match=r"leave out the adapter \(LoRA\) on it: use hidden_and_head"
    ):
        fused_linear_divergence(hidden, head, hidden)


def test_other_adapters_on_the_head_are_refused() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(made(), peft.LoHaConfig(r=3, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"loha.*modules_to_save"):
        hidden_and_head(model, ids_of())


class Partitioned(nn.Module):
    """A head whose weight is elsewhere, while its forward pass works: as ZeRO-3 leaves it."""

    def __init__(self, weight: Tensor, stand_in: Tensor) -> None:
        super().__init__()
        self.kept, self.weight = [weight], nn.Parameter(stand_in, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.kept[0].t()


def test_heads_that_are_elsewhere_or_packed_are_refused() -> None:
    model = made()
    whole = model.lm_head.weight
    model.lm_head = Partitioned(whole, torch.empty(0))
    model.lm_head.weight.ds_shape = whole.shape
    with pytest.raises(ValueError, match=r"partitioned by ZeRO-3: \[0\] is here of \[61, 16\]"):
        hidden_and_head(model, ids_of())
    with pytest.raises(ValueError, match="student_weight is partitioned by ZeRO-3"):
        fused_linear_divergence(torch.zeros(2, H), model.lm_head.weight, torch.zeros(2, H))
    model.lm_head = Partitioned(whole, torch.empty(V * H // 2, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="4-bit"):
        hidden_and_head(model, ids_of())


def test_logits_made_in_another_way_are_refused() -> None:
    model = made()
    model.lm_head.register_forward_hook(lambda module, args, logits: 1.1 * logits)
    with pytest.raises(ValueError, match="something else between them"):
        hidden_and_head(model, ids_of())
    with pytest.raises(TypeError, match="Linear has no output embeddings"):
        hidden_and_head(nn.Linear(2, 2), ids_of())
    with pytest.raises(ValueError, match="Leave labels out"):
        hidden_and_head(made(), ids_of(), labels=ids_of())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_working_precision_and_under_autocast(dtype: torch.dtype) -> None:
    model = made("tied", dtype)
    states = hidden_and_head(model, ids_of())
    assert states.hidden.dtype == states.weight.dtype == dtype
    torch.testing.assert_close(logits_of(states), model(ids_of()).logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = hidden_and_head(model, ids_of())
        teacher = teacher_of(states).to(states.hidden.dtype)
        loss = fused_linear_divergence(
            states.hidden, **states.student_head(), teacher_hidden=teacher
        )
    exact = jsd(*(h.double() @ states.weight.double().t() for h in (states.hidden, teacher)))
    torch.testing.assert_close(loss.double(), exact, rtol=0.05, atol=0.0)


VARIANTS = ["ddp", "ddp tied", "fsdp2", "fsdp2 tied", "fsdp2 resharded", "fsdp2 whole"]


def wrapped(name: str) -> nn.Module:
    model: nn.Module = made("tied" if "tied" in name else "llama")
    if name.startswith("ddp"):
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in [] if "whole" in name else model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward="resharded" in name)


def gradients_of_rank(rank: int) -> dict[str, dict[str, Tensor]]:
    results = {}
    for name in VARIANTS:
        model = wrapped(name)
        states = hidden_and_head(model, ids_of(rank))
        fused_linear_divergence(
            states.hidden, **states.student_head(), teacher_hidden=teacher_of(states)
        ).backward()
        results[name] = gradients(model)
    return results


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, dict[str, Tensor]]]:
    return on_ranks(gradients_of_rank)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_have_the_gradients_of_one(by_rank: Any, name: str) -> None:
    model = made("tied" if "tied" in name else "llama")
    for rank in range(WORLD_SIZE):
        states = hidden_and_head(model, ids_of(rank))
        loss = jsd(logits_of(states), logits_of(states, teacher_of(states)).detach())
        (loss / WORLD_SIZE).backward()
    expected = gradients(model)
    for results in by_rank:
        assert results[name].keys() == expected.keys()
        for parameter, value in expected.items():
            torch.testing.assert_close(results[name][parameter], value)
