"""How far a teacher with hindsight is from its student, column by column.

    python -m benchmarks.log_ratios MODEL [--json FILE]

Row kernels have a shorter way for columns whose log ratio log p_s - log p_t is small, taken by a
group of columns if it is small in all of them. MODEL, a folder or hub id, reads one action behind a
task, and as its own teacher behind the same task and a hint or an observation. Printed is the share
of groups within a limit: of 64 columns, as the C++ kernel groups them, and of 256, as CUDA does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import describe, write_json

TASK = (
    "You are shopping. The user wants a navy blue cotton shirt in size large below 40 dollars. "
    "Act step by step.\n"
)
CONTEXTS = {
    "a few words": "Please. ",
    "a hint": "Hint: before buying, check that every option the user named is selected; the last "
    "attempt forgot the size.\n",
    "an observation": "Observation: the reward was 0.5, the color was wrong and the episode failed "
    "since you bought too early.\n",
}
ACTION = (
    "search[red cotton shirt] Then click the first product, choose the size large and the color "
    "navy blue, compare its price with the budget, and click buy now when everything the user "
    "asked for is selected."
)
LIMITS = (1.0, 2.0, 3.0, 3.5, 4.0)
GROUPS = (64, 256)


@torch.no_grad()
def main() -> None:
    """Print the shares; see the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    action = tokenizer(ACTION, return_tensors="pt").input_ids

    def log_probs(context: str) -> torch.Tensor:
        """[tokens of the action, V]"""
        ids = torch.cat([tokenizer(context, return_tensors="pt").input_ids, action], 1)
        logits: torch.Tensor = model(ids).logits[0, -action.shape[1] - 1 : -1]
        return logits.log_softmax(-1)

    student, rows = log_probs(TASK), {}
    for name, context in CONTEXTS.items():
        teacher = log_probs(TASK + context)
        ratio = (student - teacher).abs()
        found = {"KL, nats a token": -((student - teacher) * teacher.exp()).sum(-1).mean().item()}
        for group in GROUPS:
            columns = ratio.shape[1] // group * group
            largest = ratio[:, :columns].unflatten(1, (-1, group)).amax(-1)
            for limit in LIMITS:
                share = (largest <= limit).float().mean().item()
                found[f"{group} columns within {limit}"] = round(share, 3)
        rows[name] = found
        print(name, found)
    if arguments.json:
        write_json(arguments.json, {"machine": describe("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
