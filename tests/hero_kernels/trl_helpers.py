"""Tiny models, data and trainers for what stands beside an installed package."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
QUIET: dict[str, Any] = {
    "report_to": [], "use_cpu": True, "save_strategy": "no", "bf16": False,
    "gradient_checkpointing": False, "disable_tqdm": True, "optim": "sgd",
}  # fmt: skip


def installed(package: str, wanted: str, module: str) -> Any:
    """A module of a package, if the version is the one that the drop-ins are written for."""
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "none"
    if found != wanted:
        pytest.skip(f"{package}=={wanted} is needed, found {found}: pip install -e '.[bench]'")
    return importlib.import_module(module)


def tiny_tokenizer() -> Any:
    """32 words, ids 0 to 2 for padding, end and unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    return tokenizer


def tiny_llama(seed: int = 0, **options: Any) -> Any:
    """One layer of width 16 over 32 words; another seed, another model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
        max_position_embeddings=256, initializer_range=0.3, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def gkd_trainer(kind: Any, folder: Path, **options: Any) -> Any:
    """A GKDTrainer, or what is derived from one, on given answers."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig

    rows = [
        [
            {"role": "user", "content": f"w{i}"},
            {"role": "assistant", "content": f"w{i + 1} w{i + 2}"},
        ]
        for i in range(8)
    ]
    settings = {
        **QUIET, "max_steps": 2, "per_device_train_batch_size": 2, "lmbda": 0.0,
        "gradient_accumulation_steps": 2, "max_length": 32, "learning_rate": 3.0, **options,
    }  # fmt: skip
    return kind(
        model=tiny_llama(0), teacher_model=tiny_llama(1),
        args=GKDConfig(output_dir=str(folder), **settings), processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_dict({"messages": rows}),
    )  # fmt: skip
