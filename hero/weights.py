"""What libraries do for weights: adapters (peft), and with bitsandbytes frozen weights in 4 bits
and AdamW's moments in 8 bits or in pages; and a digest of those that are frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from hero.config import ModelConfig, OptimConfig

KINDS = {"adamw_8bit": (8, False), "paged_adamw": (32, True), "paged_adamw_8bit": (8, True)}
"""Bits of a moment, and whether it moves to main memory where the GPU is full."""
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / 256), "paged_adamw": 0, "paged_adamw_8bit": 0}
"""Bytes of both moments of a parameter that a GPU has to have; a scale for 256 of 8 bits."""
WEIGHT = 0.5 + (1 + 4 / 256) / 64
"""Bytes of a weight in 4 bits: a scale of 8 bits for 64, and one of 32 for 256 of these."""
SAMPLED = 64


def bitsandbytes(setting: str) -> Any:
    """The package.

    Raises:
        ValueError: it cannot be imported; `setting` is what needs it.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError) as error:  # OSError: a library of CUDA that it does not find
        raise ValueError(
            f"{setting} needs bitsandbytes, which cannot be imported ({error}): pip install "
            "'hero-kernels[bitsandbytes]', or leave it out."
        ) from error
    return bitsandbytes


def make_optimizer(parameters: Sequence[nn.Parameter], config: OptimConfig) -> Any:
    """AdamW over float32 parameters, with moments as the settings want them.

    Raises:
        ValueError: bitsandbytes is missing, or has pages on a CUDA device only.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.weight_decay,
    }  # fmt: skip
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    (bits, paged), device = KINDS[config.kind], parameters[0].device
    package = bitsandbytes(f"optim.kind={config.kind}")
    if paged and device.type != "cuda":
        raise ValueError(
            f"optim.kind={config.kind} moves moments between a GPU and main memory, and this run "
            f"is on {device}: set --optim.kind adamw."
        )
    return package.optim.AdamW(parameters, optim_bits=bits, is_paged=paged, **settings)


def in_4_bits(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model whose linear layers are in NF4, head excepted.

    Raises:
        ValueError: bitsandbytes is missing, or nothing could be trained.
    """
    if not config.lora_rank:
        raise ValueError(
            "model.quantize=4bit freezes the weights, and what is trained are LoRA adapters on "
            "top; got model.lora_rank=0: set --model.lora-rank 16, or --model.quantize none."
        )
    bitsandbytes("model.quantize=4bit")
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    return {"quantization_config": how, "dtype": dtype, "device_map": {"": device}}


def keep_gradients(model: nn.Module) -> None:
    """Let layers in 4 bits stay as they are: in evaluation bitsandbytes lays them out anew on CPUs
    with AVX512-BF16, and no gradient passes through them from then on."""
    layer = bitsandbytes("model.quantize=4bit").nn.Linear4bit
    for module in model.modules():
        if isinstance(module, layer):
            module.training = True  # has no other meaning there


def check_types(model: PreTrainedModel, config: ModelConfig, dtype: torch.dtype) -> None:
    """Refuse types of weights other than the settings'."""
    found = "4bit" if getattr(model, "is_loaded_in_4bit", False) else "none"
    if found != config.quantize:
        raise ValueError(
            f"model.quantize={config.quantize}, but the weights are quantised as {found!r}: "
            "expected a pretrained --model.path in a floating-point type, which --model.quantize "
            "4bit quantises while it is read."
        )
    if config.master_weights and dtype == torch.float32:
        raise ValueError(
            "model.master_weights keeps float32 copies of weights in a smaller type, and passes "
            "compute in float32: set --model.dtype bfloat16, or leave it out."
        )


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("LoRA needs peft: pip install 'hero-kernels[lora]'.") from error
    return peft


def add_lora(model: PreTrainedModel, config: ModelConfig) -> Any:
    """The model with adapters on all linear layers but the head."""
    peft = import_peft()
    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, lora)


def digest_of_frozen(model: nn.Module, tokenizer: Any) -> str:
    """Of the tokenizer and of `SAMPLED` numbers of each frozen weight, wherever it lies."""
    found = hashlib.sha256(f"{len(tokenizer)} {tokenizer.chat_template}".encode())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            numbers = parameter.detach().flatten()
            some = numbers[:: max(1, len(numbers) // SAMPLED)].double().cpu()
            found.update(f"{name} {list(parameter.shape)} {some.tolist()}".encode())
    return found.hexdigest()
