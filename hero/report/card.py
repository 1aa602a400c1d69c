"""The model card of a run's weights: what `push_to_hub` and `hf upload` show of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hero.config import TrainConfig, redacted
from hero.files import write_atomic
from hero.report.facts import versions
from hero.text import in_words

CARD = "README.md"
DEV = {"dev/success": "success", "dev/score": "score", "dev/turns": "turns"}


def write_card(
    folder: Path, config: TrainConfig, update: int, dev: Mapping[str, float],
    summary: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """README.md of a folder with saved weights.

    Args:
        folder: with model or adapter and tokenizer.
        config: of the run.
        update: after which the weights are these.
        dev: metrics of their evaluation on the dev tasks.
        summary: `world`; and, if the run has ended, its evaluation of them on the test tasks.
    """
    results = {name: dev[of_dev] for of_dev, name in DEV.items() if of_dev in dev}
    split, rows = "dev", [("dev", results)]
    if summary and "after" in summary:
        split, results = "test", {name: summary["after"][name] for name in DEV.values()}
        rows += [("test, before training", summary["before"]), ("test", results)]
    header = {
        "library_name": "peft" if config.model.lora_rank else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hero", "self-distillation", "agents", config.env.name],
        "model-index": [_index(config, split, results)] if results else [],
    }
    base, is_here = config.model.path, Path(config.model.path).exists()
    if "/" in base and not is_here:
        header["base_model"] = base
    table = "\n".join(
        f"| {name} | " + " | ".join(f"{row[key]:.4g}" for key in DEV.values()) + " |"
        for name, row in rows
        if row
    )
    played = in_words((summary or {}).get("world", {}))
    settings = yaml.safe_dump(redacted(config), sort_keys=False, allow_unicode=True)
    text = TEXT.format(
        base=Path(base).name if is_here else base, mode=config.mode,
        environment=config.env.name, update=update, table=table, settings=settings.strip(),
        world=f"\nPlayed in: {played}." if played else "",
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
    )  # fmt: skip
    front = yaml.safe_dump(header, sort_keys=False)
    write_atomic(folder / CARD, f"---\n{front}---\n\n{text}")


TEXT = """\
# An agent trained by hero

`{base}` after {update} updates of mode `{mode}` in the environment `{environment}`.

| tasks | success | score | turns |
|---|---:|---:|---:|
{table}

Success and score are means over held-out tasks, of one run: no interval is given here.{world}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

Settings of the run, in full:

```yaml
{settings}
```

Versions: {versions}.
"""


def _index(config: TrainConfig, split: str, results: Mapping[str, float]) -> dict[str, Any]:
    return {
        "name": f"{config.mode} in {config.env.name}",
        "results": [{
            "task": {"type": "text-generation"},
            "dataset": {"name": f"{config.env.name}, {split} tasks", "type": config.env.name},
            "metrics": [
                {"type": name, "name": name, "value": round(float(value), 6)}
                for name, value in results.items()
            ],
        }],
    }  # fmt: skip
