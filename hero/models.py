"""Where a model is, known before anything heavy is loaded."""

from __future__ import annotations

import json
from pathlib import Path

SHIPPED = {"tiny-shop": Path(__file__).parent / "assets" / "tiny-shop"}


def find_model(name: str) -> str:
    """Folder of a shipped or fetched model; any other name is passed on as it is."""
    if name in SHIPPED:
        return str(SHIPPED[name])
    fetched = Path("models") / name
    return str(fetched) if fetched.is_dir() else name


def existing_model(name: str) -> str:
    """As `find_model`, after a look whether it is there: in the folder, the cache, or on the hub.

    The hub is asked once and briefly: loading would ask it for a minute.

    Raises:
        ValueError: there is no such model.
    """
    path = find_model(name)
    try:
        if Path(path).is_dir():
            _look_into(Path(path))
            return path
        from huggingface_hub import model_info, try_to_load_from_cache

        if not try_to_load_from_cache(path, "config.json"):
            model_info(path, timeout=5)
    except Exception as error:  # of the hub's classes, of its connection's, or of files
        raise cannot_load(name, error) from error
    return path


def _look_into(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("the folder holds no config.json") from None
    if isinstance(config, dict) and "rollout" in config:
        raise ValueError("it is the folder of a run without a best/ model: train it further")
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError("its config.json is not that of a transformers model")


def cannot_load(name: str, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"Cannot load the model {name!r}: {reason}\n"
        "Expected a folder with a transformers causal LM and its tokenizer, a hub id, or "
        f"one of {sorted(SHIPPED)}. For SmolLM2-135M-Instruct: hero model smollm2-135m."
    )
