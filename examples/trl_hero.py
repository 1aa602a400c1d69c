"""HERO in TRL: GRPOTrainer's rollout, tools, logging; one class name changed. Two CPU minutes.

The shipped agent of 0.6M parameters shops: `search[...]` and `click[...]` are tools, buying is its
final answer. It reflects on its own episodes with the weights of the start and learns from that.

    pip install 'hero-kernels[trl]'
    python examples/trl_hero.py
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig

from hero.config import ReflectionConfig, TeacherConfig
from hero.envs.base import make_env
from hero.integrations.trl import HeroTrainer, MethodConfig
from hero.models import SHIPPED

UPDATES, PROMPTS = 6, 32

TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>' + m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ call.function.name ~ call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALLS = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"(?P<name>search|click)\[(?!buy now)",
            "close": "]",
            "repeats": True,
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": {"text": "{content}"}},
            },
        },
        "content": {"close": "<|end|>"},
    },
}
"""How transformers finds the calls in an answer; models with a known template need neither."""


def world() -> Any:
    return make_env("shop", profile="tiny", mode="feedback", hints="answer")


class Shop:
    """One shopper's shop, as TRL's `environment_factory` makes them."""

    def __init__(self) -> None:
        self._world = world()
        self._feedback = ""
        self._score = 0.0

    def reset(self, task_id: str, **row: Any) -> str:
        self._feedback, self._score = "", 0.0
        said, _ = self._world.reset(task_id)
        return str(said)

    def search(self, text: str) -> str:
        """Search the shop.

        Args:
            text: what to look for
        """
        return self._act(f"search[{text}]")

    def click(self, text: str) -> str:
        """Click on what the page shows.

        Args:
            text: what to click on
        """
        return self._act(f"click[{text}]")

    def _act(self, action: str) -> str:
        said, reward, *_ = self._world.step(action)
        self._score += reward
        return str(said)


def score(completions: list[Any], environments: list[Shop], **row: Any) -> list[float]:
    """Play the final answers, which no tool has seen; the reward is the shop's."""
    for messages, shop in zip(completions, environments, strict=True):
        if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            shop._feedback = shop._act(messages[-1]["content"])
    return [shop._score for shop in environments]


def success(completions: list[Any], environments: list[Shop], **row: Any) -> list[float]:
    """Logged beside the score, with weight 0."""
    return [float(shop._score >= 1.0) for shop in environments]


class Line(TrainerCallback):
    """One line for each update."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "reward" in logs:
            print(
                f"update {state.global_step:2d}  success {logs['rewards/success/mean']:.0%}  "
                f"score {logs['reward']:.2f}  divergence {logs['divergence/mean']:.3f}  "
                f"turns trained {logs['turns/trained_rate']:.0%}",
                flush=True,
            )


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["tiny-shop"])
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, CALLS
    rows = [
        {"prompt": [{"role": "user", "content": ""}], "task_id": task}
        for task in world().tasks("train")
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, max_steps=UPDATES, per_device_train_batch_size=2 * PROMPTS,
            num_generations=2, max_completion_length=250, max_tool_calling_iterations=7,
            learning_rate=3e-4, lr_scheduler_type="constant", warmup_steps=5,
            reward_weights=[1.0, 0.0], logging_steps=1, report_to=[], save_strategy="no",
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = HeroTrainer(
            model=AutoModelForCausalLM.from_pretrained(SHIPPED["tiny-shop"]),
            reward_funcs=[score, success], args=args, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, environment_factory=Shop, callbacks=[Line()],
            world=world(),
            method=MethodConfig(
                prompts="compact", teacher=TeacherConfig(weights="frozen"),
                reflection=ReflectionConfig(
                    reflector="teacher", temperature=0.0, max_tokens=256, retries=0
                ),
            ),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
