"""`hero view`: one static HTML file that shows a person what a run learnt, and from what.

The page needs no network: styles, the few lines of script and the charts (SVG) are inside it. Texts
of agents and environments are data and pass through jinja2's autoescape.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hero.algorithms import MODES, Algorithm
from hero.files import write_atomic
from hero.report.charts import Chart, draw
from hero.report.comparison import compare
from hero.report.tracking import METRICS, TRAJECTORIES, read_jsonl
from hero.text import in_words

MAX_TRAJECTORIES = 200
FULL_RED = math.log(2)
"""Divergence in nats that is painted in full colour: no Jensen-Shannon divergence is larger."""
GAP_SHOWN = 0.2
"""Log-probability gap in nats, teacher against student, from which a token is underlined."""
NO_HINT = "no hint: not trained"

CHARTS = (
    Chart("Success on held-out dev tasks", {"dev/success": "dev"}, percent=True),
    Chart("Reward in training", {"rewards/mean": "mean reward"}),
    Chart("Turns per episode", {"rollout/turns_mean": "training", "dev/turns": "dev"}),
    Chart("Divergence from the teacher, nats", {
        "divergence/error_turns": "turns followed by an error",
        "divergence/clean_turns": "clean turns",
    }),
    Chart("Does the divergence find the faults?", {
        "divergence/auc": "AUC for turns followed by an error",
        "divergence/pushed_down": "tokens of clean turns pushed down",
    }, percent=True),
    Chart("Reflections", {
        "reflection/parsed_rate": "with a diagnosis",
        "reflection/non_empty_rate": "with a hint",
        "reflection/leaked_rate": "hint leaked",
    }, percent=True),
    Chart("Sampler and trainer, nats apart", {
        "drift/mean": "mean", "drift/max": "largest", "drift/kl": "KL, estimated",
    }),
    Chart("Entropy of the student, nats", {"entropy": "entropy"}),
    Chart("Tokens a turn", {"completions/mean_length": "training"}),
    Chart("Norm of the gradient", {"grad_norm": "norm"}),
    Chart("Loss", {"loss": "loss"}),
    Chart("Seconds per update", {
        "seconds/rollout": "rollout", "seconds/reflection": "reflection",
        "seconds/annotation": "annotation", "seconds/train": "learning",
        "seconds/evaluation": "evaluation",
    }),
)  # fmt: skip


def render(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run, finished or not.

    Args:
        run_dir: folder of the run. `config.json` and `summary.json` may be missing.
        out: file to write; default `run_dir/report.html`.

    Returns:
        The file written.

    Raises:
        ValueError: the folder holds neither metrics nor trajectories, or a file in it is broken.
    """
    metrics = _read_if_there(run_dir / METRICS)
    records = _read_if_there(run_dir / TRAJECTORIES)
    if not metrics and not records:
        raise ValueError(
            f"{run_dir} holds nothing to show: expected lines in {METRICS} or {TRAJECTORIES}. "
            "Give the folder that `hero train` printed, such as runs/quickstart-..."
        )
    config = _read_json(run_dir / "config.json")
    summary = _read_json(run_dir / "summary.json")
    before, after = summary.get("before"), summary.get("after")
    algorithm = MODES.get(config.get("mode", ""), Algorithm)
    shown = _select(records, MAX_TRAJECTORIES)
    try:
        trajectories = [trajectory_view(record, algorithm) for record in shown]
    except KeyError as error:
        raise ValueError(
            f"{run_dir / TRAJECTORIES}: a trajectory lacks the field {error}."
        ) from error

    turns = [turn for item in trajectories for turn in item["turns"]]
    page = templates().get_template("report.html.j2")
    html = page.render(
        title=summary.get("recipe") or run_dir.resolve().name,
        facts=_facts(run_dir, config, summary, metrics),
        comparison=compare(before, after) if before and after else [],
        finished=bool(summary),
        charts=[
            svg for chart in CHARTS if (svg := draw(chart, metrics, summary.get("best_update")))
        ],
        trajectories=_most_telling_first(trajectories),
        left_out=len(records) - len(shown),
        has_teacher=any(turn["heat"] is not None for turn in turns),
        teacher_saw=algorithm.teacher_saw or "more than the agent had",
        needs_hint=any(turn["masked_reason"] == NO_HINT for turn in turns),
        swatches=[
            (f"{nats:.2f}", f"{_heat(nats):.2f}") for nats in (0.0, 0.02, 0.1, 0.3, FULL_RED)
        ],
        gap_factor=f"{math.exp(GAP_SHOWN):.1f}",
        config=json.dumps(config, indent=2, ensure_ascii=False) if config else "",
    )
    out = out or run_dir / "report.html"
    # Agents can produce lone surrogates, which no file may hold; they show as question marks.
    write_atomic(out, html.encode("utf-8", errors="replace"))
    return out


def templates() -> Environment:
    return Environment(
        loader=PackageLoader("hero.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _read_if_there(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.is_file() else []


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON: {error}. Remove it to see the rest."
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}.")
    return data


def _facts(
    run_dir: Path, config: dict[str, Any], summary: dict[str, Any], metrics: list[dict[str, Any]]
) -> dict[str, str]:
    """Name and value of what is known about the run, in the order shown."""
    files = [path for path in (run_dir / METRICS, run_dir / TRAJECTORIES) if path.is_file()]
    last_written = max(path.stat().st_mtime for path in files)
    seconds = summary.get("seconds")
    loss, env, best = config.get("loss", {}), config.get("env", {}), summary.get("best_update")
    probe = {
        key[6:]: value for line in metrics for key, value in line.items() if key[:6] == "probe/"
    }
    facts = {
        "Mode": config.get("mode"),
        "Model": config.get("model", {}).get("path"),
        "Environment": " ".join(
            [
                env.get("name", ""),
                *(f"{key}={value}" for key, value in env.get("options", {}).items()),
            ]
        ),
        "World": in_words(summary.get("world", {})),
        "Seed": config.get("seed"),
        "Learning rate": config.get("optim", {}).get("learning_rate"),
        "Divergence": loss.get("divergence"),
        "Teacher": config.get("teacher", {}).get("weights"),
        "Reflector": summary.get("reflector") or config.get("reflection", {}).get("reflector"),
        "Why this one": summary.get("reflector_reason"),
        "Device": summary.get("device"),
        "Date": datetime.fromtimestamp(last_written).strftime("%Y-%m-%d %H:%M"),
        "Duration": _duration(seconds) if seconds else None,
        "Ended because": summary.get("stopped"),
        "Best update": "0: training did not help" if best == 0 else best,
        "Right actions before training": (
            f"{probe['student_right']:.0%} without hindsight, {probe['teacher_right']:.0%} with "
            f"it: a lift of {probe['teacher_lift']:+.2f}"
        )
        if "teacher_lift" in probe
        else None,
        "Faults found as the environment does": (
            f"{probe['diagnosis_agreement']:.0%} of turns"
            if "diagnosis_agreement" in probe
            else None
        ),
        "Versions": ", ".join(f"{name} {v}" for name, v in summary.get("versions", {}).items()),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _select(records: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The newest `limit` records, newest first.

    Each split has an equal claim, so that training never crowds out the episodes before it.
    """
    newest_first = sorted(records, key=lambda record: record["update"], reverse=True)
    seen: Counter[str] = Counter()
    ranked = []
    for order, record in enumerate(newest_first):
        ranked.append((seen[record["split"]], order, record))
        seen[record["split"]] += 1
    kept = sorted(ranked, key=lambda item: item[:2])[:limit]
    return [record for _, _, record in sorted(kept, key=lambda item: item[1])]


def trajectory_view(record: dict[str, Any], algorithm: type[Algorithm]) -> dict[str, Any]:
    """What the template needs of one trajectory record."""
    split = "" if record["update"] is None else record["split"]
    turns = [_turn_view(turn, split, algorithm) for turn in record["turns"]]
    return {
        "id": record["id"],
        "task_id": record["task_id"],
        "instruction": record["instruction"],
        "split": record["split"],
        "when": _when(record),
        "success": record["success"],
        "reward": "unknown" if record["reward"] is None else f"{record['reward']:.2f}",
        "stop_reason": ": ".join(filter(None, (record["stop_reason"], record.get("error")))),
        "turns": turns,
    }


def _when(record: dict[str, Any]) -> str:
    split, update = record["split"], record["update"]
    if split in ("before", "after"):
        return f"{split} training"
    return f"{split} task" if update is None or split != "train" else f"update {update}"


def _turn_view(turn: dict[str, Any], split: str, algorithm: type[Algorithm]) -> dict[str, Any]:
    divergence = [nats for nats in turn["divergence"] or [] if nats is not None]
    mean = sum(divergence) / len(divergence) if divergence else None
    return {
        "tokens": _token_views(turn),
        "observation": turn["observation"],
        "feedback_kind": turn["feedback_kind"].replace("_", " "),
        "parse_ok": turn["parse_ok"],
        "is_error": turn["is_error"],
        "diagnosis": turn["diagnosis"],
        "trained": turn["trained"],
        "masked_reason": _masked_reason(turn, split, algorithm),
        "mean": mean,
        "heat": None if mean is None else f"{_heat(mean):.2f}",
    }


def _token_views(turn: dict[str, Any]) -> list[dict[str, Any]]:
    unknown = [None] * len(turn["tokens"])
    views = []
    for text, nats, gap in zip(
        turn["tokens"], turn["divergence"] or unknown, turn["logprob_gap"] or unknown, strict=True
    ):
        facts = []
        if nats is not None:
            facts.append(f"divergence {nats:.3f} nats")
        if gap is not None:
            facts.append(
                f"teacher finds it {math.exp(min(gap, 50.0)):.2g} times as likely ({gap:+.2f} nats)"
            )
        moved = gap is not None and abs(gap) >= GAP_SHOWN
        views.append(
            {
                # A line break is a token that can be judged too: give it a body to colour.
                "text": text.replace("\n", "↵\n"),
                "heat": "" if nats is None else f"{_heat(nats):.2f}",
                "move": "" if not moved else "up" if gap > 0 else "down",
                "title": "; ".join(facts),
            }
        )
    return views


def _masked_reason(turn: dict[str, Any], split: str, algorithm: type[Algorithm]) -> str:
    """Why a turn of a training episode was not trained; "" if it was, or could not be."""
    if turn["trained"] or split != "train":
        return ""
    hint = (turn["diagnosis"] or {}).get("hint")
    return NO_HINT if algorithm.needs_reflection and not hint else "not trained"


def _heat(nats: float) -> float:
    """Colour strength in [0, 1]: the square root keeps small divergences visible."""
    return min(1.0, max(0.0, nats) / FULL_RED) ** 0.5


def _most_telling_first(trajectories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Move the training episode with the most disputed turn to the front: the page opens it."""

    def dispute(item: dict[str, Any]) -> float:
        if item["split"] != "train":
            return -1.0
        return max((turn["mean"] or 0.0 for turn in item["turns"] if turn["trained"]), default=-1.0)

    if not trajectories:
        return []
    telling = max(trajectories, key=dispute)
    return [telling, *(item for item in trajectories if item is not telling)]
