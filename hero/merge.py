"""A LoRA adapter and its base as one plain model."""

from __future__ import annotations

from pathlib import Path

from hero.files import new_folder
from hero.models import existing_model

ADAPTER = "adapter_config.json"


def adapter_of(run: Path) -> Path:
    """The selected or best adapter of a run, or the adapter in the folder itself.

    Raises:
        ValueError: there is none.
    """
    folders = (run / "selected", run / "best", run)
    source = next((folder for folder in folders if (folder / ADAPTER).is_file()), None)
    if source is None:
        raise ValueError(
            f"{run} holds no adapter: expected the folder of a run with --model.lora-rank, or one "
            f"with {ADAPTER}. A run that trains all weights has a plain model in its best/ already."
        )
    return source


def merge(run: Path, out: Path) -> Path:
    """Write the model of a LoRA run, W + (alpha / rank) B A for each adapted weight, to `out`.

    Summed in float32 and written in the type of the base's own files.

    Args:
        run: folder of a run (its selected or best adapter), or of an adapter.
        out: new folder.

    Raises:
        ValueError: there is no adapter, its base cannot be loaded, or something is in `out`.
    """
    source = adapter_of(run)
    import torch  # here, so that a mistake is answered at once
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from hero.weights import import_peft

    peft = import_peft()
    with new_folder(out) as new:
        try:
            base = existing_model(
                str(peft.PeftConfig.from_pretrained(source).base_model_name_or_path)
            )
            dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            merged = peft.PeftModel.from_pretrained(model, source).merge_and_unload()
        except Exception as error:  # hub, file, format and config errors of many classes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"Cannot put {source} on top of its base model: {reason}\nThe base is named in "
                f"{source / ADAPTER}; a relative path there counts from this folder."
            ) from error
        merged.to(dtype).save_pretrained(new)
        AutoTokenizer.from_pretrained(source).save_pretrained(new)
    return out
