"""What the teacher's pass over an episode costs: packed in a tree, beside scoring each turn alone.

    python -m benchmarks.packing [--json FILE] [--rounds N]

A small random Llama; 15 turns, in each a privileged context and an action of 60 tokens. For each
length of the episode the median over rounds, in passes of the student over the same episode (the
forward pass; all in turn within a round; seconds of the processor, with one thread): the tree as
hero computes it, the tree behind a dense mask, and every turn in a row of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import describe, write_json
from hero import attention
from hero.packing import Branch, Packed, Row, to_tensors

TURNS, BRANCH = 15, 60
LENGTHS = (1024, 2048, 4096)


class Model:
    """What packing asks of a policy; `dense` turns spans into a mask of all tokens."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2 * LENGTHS[-1],
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval()
        attention.use(self.model)
        self.dense = False

    def takes_spans(self, length: int) -> bool:
        return True

    def hidden(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        if self.dense:
            inputs["attention_mask"] = dense_mask(inputs["attention_mask"])
        decoder = self.model.get_decoder()
        return decoder(input_ids, use_cache=False, **inputs).last_hidden_state


def dense_mask(spans: torch.Tensor) -> torch.Tensor:
    """[1, 1, T, T] what the spans say."""
    numbers = spans[0, 0].tolist()
    mask = torch.zeros(numbers[-1][3], numbers[-1][3], dtype=torch.bool)
    for first, last, start, end in numbers:
        mask[start:end, first:last] = True
        mask[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    return mask[None, None]


def episode(length: int) -> dict[str, Packed]:
    """An episode of `length` tokens as rows of the student and of the teacher."""
    ids = torch.randint(1, 1000, (length,)).tolist()
    ends = [(turn + 1) * length // TURNS for turn in range(TURNS)]
    branches = [Branch(end, ids[:BRANCH], BRANCH // 2) for end in ends]
    rows = {
        "student": [Row(trunk=ids, actions=[(1, 2)])],
        "tree": [Row(trunk=ids, branches=branches)],
        "separate": [Row(trunk=ids[:end] + ids[:BRANCH], actions=[(1, 2)]) for end in ends],
    }
    return {name: to_tensors(own, torch.device("cpu")) for name, own in rows.items()}


@torch.no_grad()
def measure(model: Model, length: int, rounds: int) -> dict[str, Any]:
    """Seconds of the student's pass, and the others in such passes."""
    packed = episode(length)
    ratios: dict[str, list[float]] = {"tree": [], "tree, dense mask": [], "separate": []}
    seconds = []
    for _ in range(rounds):
        for name, times in {"student": seconds, **ratios}.items():
            model.dense = name.endswith("dense mask")
            start = time.process_time()
            packed[name.split(",")[0]].states(model)
            times.append(
                (time.process_time() - start) / (seconds[-1] if times is not seconds else 1)
            )
    return {
        "tokens": length,
        "tokens of the tree": sum(packed["tree"].lengths),
        "student, ms": 1e3 * statistics.median(seconds),
        "in student passes": {name: statistics.median(times) for name, times in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine, model = describe("cpu"), Model()
    measure(model, 256, 1)  # warm
    cases = []
    print("| tokens | of the tree | student, ms | tree | tree, dense mask | separate |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in LENGTHS:
        cases.append(case := measure(model, length, options.rounds))
        cells = [f"{ratio:.2f}" for ratio in case["in student passes"].values()]
        cells = [str(length), str(case["tokens of the tree"]), f"{case['student, ms']:.0f}", *cells]
        print("| " + " | ".join(cells) + " |", flush=True)
    if options.json:
        write_json(options.json, {"machine": machine, "cases": cases})


if __name__ == "__main__":
    main()
