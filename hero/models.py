"""Where a model is, known before anything heavy is loaded."""

from __future__ import annotations

import json
import queue
import threading
from functools import cache
from pathlib import Path

SHIPPED = {
    name: Path(__file__).parent / "assets" / name
    for name in ("tiny-shop", "tiny-shop-1", "tiny-desk")
}
"""`tiny-shop-1` is the first one of the shop, where the studies start."""
CONFIGS = ("config.json", "adapter_config.json")
"""Files that a folder with a model, or with a LoRA adapter, holds."""
HUB_SECONDS = 3.0
"""In which the hub must have answered, the search for its address included."""


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
        elif not _in_cache(path):
            _on_hub(path)
    except Exception as error:  # of the hub's classes, of its connection's, or of files
        raise cannot_load(name, error) from error
    return path


def revision(path: str) -> str:
    """The commit of a hub's model that loading takes: the newest, or that of the cache where the
    hub does not answer; "" if there is none."""
    try:
        return _on_hub(path)
    except Exception:  # of the hub's classes or of its connection's: loading goes on without it too
        return _in_cache(path)


def _in_cache(path: str) -> str:
    """The commit of a hub's model that was downloaded before, or ""."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(path, name) for name in CONFIGS)
    # Neither None nor the mark of a file that is known to be missing.
    return next((Path(file).parent.name for file in found if isinstance(file, str)), "")


@cache
def _on_hub(path: str) -> str:
    """The newest commit of a hub's model."""
    from huggingface_hub import model_info

    answers: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(str(model_info(path, timeout=HUB_SECONDS).sha))
        except Exception as error:
            answers.put(error)

    # In a thread, as no time limit of the client's holds for the resolver.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=HUB_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"the hub has not answered within {HUB_SECONDS:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _look_into(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("the folder holds no config.json") from None
    if isinstance(config, dict) and "rollout" in config:
        best = [folder / name for name in ("selected", "best") if (folder / name).is_dir()]
        if best:
            raise ValueError(f"it is the folder of a run, whose model is in {best[0]}: name that")
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
