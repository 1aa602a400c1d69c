"""From a transformers model to what the loss takes; transformers itself is not imported."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hero_kernels import kinds
from hero_kernels.integrations.fsdp import whole_head


class LMStates(NamedTuple):
    """Hidden states and head of a causal language model; its logits are
    softcap · tanh(logit_scale · (hidden @ weight.T + bias) / softcap), without `softcap`
    logit_scale · (hidden @ weight.T + bias)."""

    hidden: Tensor
    """[B, L, H] what the head reads."""
    weight: Tensor
    """[V, H], differentiable; an adapter on the head is within."""
    bias: Tensor | None
    """[V]."""
    softcap: float | None
    logit_scale: float

    def student_head(self) -> dict[str, Any]:
        """All but the hidden states, as keywords of `fused_linear_divergence`."""
        return {
            "student_weight": self.weight, "student_bias": self.bias,
            "softcap": self.softcap, "logit_scale": self.logit_scale,
        }  # fmt: skip

    def logits(self) -> Tensor:
        """[B, L, V] after all, for what needs them whole."""
        logits = nn.functional.linear(self.hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def hidden_and_head(model: nn.Module, input_ids: Tensor | None = None, **inputs: Any) -> LMStates:
    """Run a causal LM once, without its logits: one position of each sequence is all it makes.

    The model is called as a whole, so that wrappers do their work: pass the one that is trained
    (DistributedDataParallel, PeftModel, after `fully_shard` the model itself). Once a step is
    best: under FSDP2 each call gathers the head.

    Args:
        model: a transformers causal LM, or a wrapper of one.
        input_ids: [B, L].
        **inputs: more of its arguments, such as `attention_mask`; no `labels`.

    Raises:
        TypeError: no model with a head.
        ValueError: a head that cannot be served as one differentiable tensor (4-bit, ZeRO-3,
            DoRA, LoRA with dropout, ...), or logits that are not what this head gives.
    """
    causal_lm: Any = _unwrapped(model)
    if "labels" in inputs:
        raise ValueError("Leave labels out: the loss is computed from what this returns.")
    if input_ids is not None:
        inputs["input_ids"] = input_ids
    output: Any = model(
        **inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1, return_dict=True
    )
    states = with_head(causal_lm, output.hidden_states[-1])
    if not torch.compiler.is_compiling():
        _compare(states, output.logits)
    return states


def with_head(model: Any, hidden: Tensor) -> LMStates:
    """Hidden states [B, L, H] that the caller has already, with the head of their model. Nothing
    compares them with the model's logits, as `hidden_and_head` does.

    Raises:
        ValueError: a head that cannot be served as one differentiable tensor.
    """
    weight, bias = _head_tensors(model.get_output_embeddings(), hidden.dtype)
    return LMStates(hidden, weight, bias, **logit_transform(model.config))


def logit_transform(config: Any) -> dict[str, Any]:
    """`softcap` and `logit_scale` by the names that transformers' configs give them: Gemma's
    final_logit_softcapping, Cohere's logit_scale, Falcon-H1's lm_head_multiplier, Granite's
    logits_scaling, which divides."""
    config = config.get_text_config()
    names = ("logit_scale", "lm_head_multiplier")
    scale = next((s for name in names if (s := getattr(config, name, None)) is not None), 1.0)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return {
        "softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": float(scale) / float(divisor),
    }


def _unwrapped(model: Any) -> Any:
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "The model is wrapped by FSDP1, which keeps no [V, H] weight between its forward and "
            "backward passes: use FSDP2, torch.distributed.fsdp.fully_shard."
        )
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise TypeError(
            f"{type(model).__name__} has no output embeddings: expected a transformers causal LM, "
            "such as AutoModelForCausalLM gives."
        )
    return model


def _head_tensors(head: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The head's weight [V, H] and bias, adapters included, whole and differentiable."""
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        use_original = head.disable_adapters or not head.active_adapters
        saved = head.modules_to_save
        head = head.original_module if use_original else saved[head.active_adapters[0]]
    deltas = []
    if hasattr(head, "base_layer"):
        if not head.disable_adapters and not head.merged:
            deltas = [_delta(head, name, dtype) for name in head.active_adapters]
        head = head.base_layer
    kinds.no_stand_in("The lm_head", head.weight)
    bias = getattr(head, "bias", None)
    weight = _whole(head.weight, dtype)
    for delta in deltas:
        weight = weight + delta.to(weight.dtype)
    return weight, None if bias is None else _whole(bias, dtype)


def _whole(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return whole_head(tensor, dtype) if hasattr(tensor, "full_tensor") else tensor


def _delta(head: Any, name: str, dtype: torch.dtype) -> Tensor:
    """What a LoRA adapter adds to the weight."""
    kind = type(head).__name__
    if name not in getattr(head, "lora_A", ()):
        if any(name in getattr(head, field) for field in head.adapter_layer_names):
            raise ValueError(
                f"The adapter {name!r} on lm_head is {type(head).__module__}.{kind}, which is not "
                "LoRA: train the head by modules_to_save=['lm_head'], or merge the adapter."
            )
        return torch.zeros((), device="cpu")  # it is of other layers
    dropout = head.lora_dropout[name]
    obstacles = {
        f"{type(head.lora_variant.get(name)).__name__}": name in head.lora_variant,
        "lora_bias": head.lora_bias[name],
        "lora_dropout while training": head.training and getattr(dropout, "p", 0.0) > 0,
    }
    if what := [obstacle for obstacle, there in obstacles.items() if there]:
        raise ValueError(
            f"The adapter {name!r} on lm_head has {' and '.join(what)}, which no weight [V, H] can "
            "express: use plain LoRA with lora_dropout=0 there, leave lm_head out of "
            "target_modules, or train it by modules_to_save=['lm_head']."
        )
    a, b = (_whole(part[name].weight, dtype) for part in (head.lora_A, head.lora_B))
    delta: Tensor = head.scaling[name] * (b @ a)
    return delta.t() if head.fan_in_fan_out else delta


@torch.no_grad()
def _compare(states: LMStates, logits: Tensor) -> None:
    """Refuse a model that makes its logits in another way: the loss would be wrong silently."""
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    got = nn.functional.linear(states.hidden[:1, -1], states.weight, states.bias)
    eps = max(torch.finfo(t.dtype).eps for t in (got, logits))
    got = got.float() * states.logit_scale
    if states.softcap is not None:
        got = states.softcap * torch.tanh(got / states.softcap)
    expected = logits[:1, -1].float()
    error = float((got - expected).abs().max())
    if not error <= max(4 * eps, 1e-3) * float(expected.abs().max()) + 1e-6:  # NaN is unlike too
        raise ValueError(
            f"The model's logits differ by {error:.3g} from what its last hidden states, its "
            f"lm_head, soft cap ({states.softcap}) and logit scale ({states.logit_scale}) give: it "
            "does something else between them, and the loss would be wrong. Compute the logits "
            "and call divergence_from_logits."
        )
