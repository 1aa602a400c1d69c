"""Loops as one writes them first, for comparison, and how whole loops are timed.

`generate_per_turn` reads the whole prompt at every turn, by transformers' `generate`: of one
episode after the other, or of all that are under way in one padded batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import clock, describe, device_type, write_json
from hero.config import RolloutConfig
from hero.envs import border
from hero.envs.base import Environment
from hero.policy import Policy
from hero.sampler import Completion, Sampling
from hero.types import StopReason, Trajectory, Turn

Call = Callable[[], dict[str, float]]
"""One run of a contestant: what it did, `rate` being what is compared by the second."""


@torch.inference_mode()
def generate_per_turn(
    policy: Policy, envs: Sequence[Environment], tasks: Sequence[str], config: RolloutConfig
) -> list[Trajectory]:
    """Episodes as lists of turns; as many run at once as there are environments."""
    done: list[Trajectory] = []
    for start in range(0, len(tasks), len(envs)):
        some = list(zip(envs, tasks[start : start + len(envs)], strict=False))
        prompts, active = [], []
        for env, task in some:
            begun = border.begin(env, task, policy.renderer.tool_format, None)
            rules = [{"role": "system", "content": begun.rules}] if begun.rules else []
            told = [*rules, {"role": "user", "content": begun.observation}]
            prompts.append(policy.renderer.start(told))
            done.append(Trajectory(
                id=task, group_id=task, task_id=task, instruction=begun.instruction, turns=[],
                reward=0.0, success=False, stop_reason=StopReason.MAX_TURNS,
            ))  # fmt: skip
            active.append(len(done) - 1)
        for _ in range(config.max_turns):
            rows = [i - start for i in active]
            answers = _generate(policy, [prompts[row] for row in rows], config.max_turn_tokens)
            for i, row, (ids, logprobs) in zip(list(active), rows, answers, strict=True):
                if _act(policy, done[i], some[row][0], prompts[row], ids, logprobs):
                    active.remove(i)
                else:
                    turn = done[i].turns[-1]
                    prompts[row] = prompts[row] + ids
                    prompts[row] += policy.renderer.observe(ids, "user", str(turn.observation))
            if not active:
                break
    return done


def _generate(
    policy: Policy, prompts: list[list[int]], max_tokens: int, temperature: float = 1.0
) -> list[Any]:
    """(ids, log-probabilities) after each prompt."""
    width, pad = max(map(len, prompts)), policy.renderer.end_id
    ids = [[pad] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    with policy.autocast():
        found: Any = policy.model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(ids, device=policy.device),
            attention_mask=torch.tensor(mask, device=policy.device), max_new_tokens=max_tokens,
            do_sample=temperature > 0, temperature=temperature or None, top_k=0, top_p=1.0,
            eos_token_id=policy.renderer.stop_ids, pad_token_id=pad, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    sampled = found.sequences[:, width:]
    logits = torch.stack(found.logits, 1).float().log_softmax(-1)
    logprobs = logits.gather(2, sampled[:, :, None]).squeeze(2)
    answers = []
    for row, of_row in zip(sampled.tolist(), logprobs.tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token in policy.renderer.stop_ids]
        length = ends[0] + 1 if ends else len(row)
        answers.append((row[:length], of_row[:length]))
    return answers


class PerPrompt:
    """A sampler that answers one prompt after the other."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        with torch.inference_mode():
            answers = [
                _generate(self.policy, [p], sampling.max_tokens, sampling.temperature)[0]
                for p in prompts
            ]
        return [Completion(ids=ids, logprobs=logprobs) for ids, logprobs in answers]


def _act(
    policy: Policy, trajectory: Trajectory, env: Environment, prompt: list[int], ids: list[int],
    logprobs: list[float],
) -> bool:  # fmt: skip
    """Take a sampled action; returns whether the episode is over."""
    text = policy.renderer.decode(ids)
    step = border.step(env, text, trajectory.task_id, len(trajectory.turns))
    trajectory.turns.append(Turn(
        prompt_ids=prompt, action_ids=ids, sampled_logprobs=logprobs, action_text=text,
        observation=step.observation, feedback_kind=step.feedback_kind, is_error=not step.valid,
        parse_ok=step.parse_ok,
    ))  # fmt: skip
    trajectory.reward += step.reward
    trajectory.success = step.success
    return step.terminated or step.truncated


@dataclass
class Loops:
    """Measures contestants in rounds, each once in turn, and prints and keeps what came out."""

    say: Callable[[str], None]
    results: Path | None

    def measure(self, title: str, calls: dict[str, Call], rounds: int) -> dict[str, Any]:
        """Medians of what each contestant reports; `ratio` compares its rate with the first's."""
        machine, seen = describe(device_type()), dict[str, list[dict[str, float]]]()
        for number in range(rounds):
            names = list(calls)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                began = clock()
                did = calls[name]()
                seconds = did.pop("seconds", clock() - began)
                did["rate"] /= seconds
                seen.setdefault(name, []).append({"seconds": seconds} | did)
        first = next(iter(calls))
        found: dict[str, Any] = {}
        for name in calls:
            rows = seen[name]
            found[name] = {key: median(row[key] for row in rows) for key in rows[0]}
            found[name]["ratio"] = median(
                row["rate"] / own["rate"] for row, own in zip(rows, seen[first], strict=True)
            )
        self.say(table(title, found))
        if self.results:
            kept = json_of(self.results)
            kept[title] = {"machine": machine, "rounds": rounds, "contestants": found}
            write_json(self.results, kept)
        return found


def json_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def table(title: str, found: dict[str, dict[str, float]]) -> str:
    """Markdown: one row for each contestant."""
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines = [f"**{title}**", "", *head]
    for name, row in found.items():
        cells = [f"{row[column]:.4g}" if column in row else "-" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
