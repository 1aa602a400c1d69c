"""A whole step of the quickstart: 32 episodes, reflections, one optimiser step.

`hero` and `grpo` are the recipes. `plain` is a loop as one writes it first: `model.generate` at
every turn and for every reflection, one forward pass of student and teacher a turn, JSD of whole
logits. `trl` is GRPOTrainer with `environment_factory` on the same model and tasks, without
reflections, if trl is installed. `rate` is turns per second, shares are of the time; `MiB` is the
peak above what was there before: what an allocator keeps from earlier steps is not seen.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import memory
from benchmarks.baselines import torch_divergence
from benchmarks.loops import Call, PerPrompt, generate_per_turn
from benchmarks.machine import clock, device_type
from hero.checks import from_dict
from hero.config import TrainConfig
from hero.loss import weigh
from hero.prompts import make_prompts
from hero.recipes import load_recipe, merge
from hero.reflection import make_reflector
from hero.report.console import Console
from hero.trainer import Trainer
from hero.types import Trajectory

if TYPE_CHECKING:
    from benchmarks.loops import Loops

EPISODES = 32


class Steps:
    """Steps of a recipe, one after the other, as the trainer takes them."""

    def __init__(
        self, recipe: str, folder: Path, objects: dict[str, Any] | None = None, **changes: Any
    ) -> None:
        """`objects` go to the trainer in the place of what the settings would make."""
        size = load_recipe(recipe)["rollout"].get("group_size", 1)
        own = {"rollout": {"tasks_per_update": EPISODES // size}, "eval": {"test_tasks": 0}}
        config: TrainConfig = from_dict(merge(load_recipe(recipe), merge(own, changes)))
        console = Console(io.StringIO(), terminal=False)
        self.trainer = Trainer(config, folder, console=console, **objects or {})
        self.stages, self.learner = self.trainer.stages, self.trainer.learner
        self.config, self.number = config, 0

    def play(self) -> list[Trajectory]:
        return self.stages.play(self.number, self.trainer.state)

    def learn(self, samples: list[Any]) -> int:
        self.learner.learn(samples, self.number)
        return sum(len(s.action_ids) for s in samples if s.distill_weight or s.pg_weight)

    def __call__(self) -> dict[str, float]:
        self.number += 1
        times = [clock()]
        trajectories = self.play()
        times.append(clock())
        reflections = self.stages.reflect(trajectories, self.number)
        times.append(clock())
        trained = self.learn(self.stages.annotate(trajectories, reflections))
        times.append(clock())
        seconds = times[3] - times[0]
        phases = [100 * (end - begin) / seconds for begin, end in pairwise(times)]
        generated = sum(t.num_action_tokens for t in trajectories)
        generated += reflections.stats.generated_tokens
        return {
            "rate": sum(len(t.turns) for t in trajectories),
            "episodes": len(trajectories),
            "turns": sum(len(t.turns) for t in trajectories),
            "generated tokens/s": generated / seconds,
            "trained tokens/s": trained / seconds,
            **dict(zip(("rollout %", "reflection %", "learning %"), phases, strict=True)),
        }


class Plain(Steps):
    """The same step without batches, caches between turns, packing or a fused loss."""

    def __init__(self, folder: Path, objects: dict[str, Any] | None = None, **changes: Any) -> None:
        super().__init__("quickstart", folder, objects, **changes)
        policy, config, stages = self.trainer.policy, self.config, self.stages
        stages.reflector = make_reflector(
            config.reflection, env=stages.env, sampler=PerPrompt(policy), renderer=policy.renderer,
            prompts=make_prompts(config.prompts), teacher_weights=stages.teacher.applied,
            context=policy.context,
        )  # fmt: skip

    def play(self) -> list[Trajectory]:
        tasks, episodes = self.stages.tasks["train"], self.config.rollout.tasks_per_update
        first = episodes * self.number % (len(tasks) - episodes)
        some = tasks[first : first + episodes]
        return generate_per_turn(self.trainer.policy, [self.stages.env], some, self.config.rollout)

    def logits(self, prompt: list[int], action: list[int]) -> torch.Tensor:
        """[len(action), V] before each token of the action."""
        policy = self.trainer.policy
        with policy.autocast():
            whole = policy.model(input_ids=torch.tensor([prompt + action], device=policy.device))
        return whole.logits[0, -len(action) - 1 : -1]

    def learn(self, samples: list[Any]) -> int:
        policy, teacher, trained = self.trainer.policy, self.stages.teacher, 0
        for item in weigh(samples, self.config.loss):
            sample = item.sample
            if not sample.distill_weight:
                continue
            with torch.no_grad(), teacher.applied():
                expected = self.logits(sample.teacher_prompt_ids, sample.action_ids)
            found = self.logits(sample.prompt_ids, sample.action_ids)
            rows = torch_divergence(found, expected, "jsd")
            (item.distill.to(policy.device) * rows).sum().backward()
            trained += len(sample.action_ids)
        torch.nn.utils.clip_grad_norm_(policy.trainable().values(), 1.0)
        self.learner.optimizer.step()
        self.learner.optimizer.zero_grad(set_to_none=True)
        return trained


def trl_step(folder: Path) -> dict[str, float]:
    """One step of GRPOTrainer; making the trainer is not counted."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    import trl_hero as example
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    turns = [0]

    class Counted(example.Shop):
        def _act(self, action: str) -> str:
            turns[0] += 1
            return super()._act(action)

    for name in ("search", "click"):  # tools are the methods that the class itself shows
        setattr(Counted, name, getattr(example.Shop, name))
    tokenizer = AutoTokenizer.from_pretrained(example.SHIPPED["tiny-shop"])
    tokenizer.chat_template, tokenizer.response_template = example.TEMPLATE, example.CALLS
    rows = [
        {"prompt": [{"role": "user", "content": ""}], "task_id": task}
        for task in example.world().tasks("train")
    ]
    args = GRPOConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=EPISODES,
        num_generations=4, max_completion_length=250, max_tool_calling_iterations=7,
        learning_rate=3e-4, report_to=[], save_strategy="no", use_cpu=device_type() == "cpu",
        bf16=device_type() == "cuda",
        gradient_checkpointing=False, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(example.SHIPPED["tiny-shop"]),
        reward_funcs=[example.score], args=args, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, environment_factory=Counted,
    )  # fmt: skip
    began = clock()
    with redirect_stdout(io.StringIO()):
        trainer.train()
    seconds = clock() - began
    return {"seconds": seconds, "rate": turns[0], "episodes": EPISODES, "turns": turns[0]}


def test_step(loops: Loops, tmp_path: Path) -> None:
    calls: dict[str, Call] = {
        "hero": Steps("quickstart", tmp_path),
        "hero, all episodes read": Steps("quickstart", tmp_path, reflection={"episodes": "all"}),
        "grpo": Steps("shop-grpo", tmp_path),
        "plain": Plain(tmp_path),
    }
    if importlib.util.find_spec("trl"):
        calls["trl"] = partial(trl_step, Path(tempfile.mkdtemp(dir=tmp_path)))
    found = loops.measure(
        "a step of the quickstart", {name: memory.counted(call) for name, call in calls.items()}, 3
    )
    assert found["plain"]["ratio"] < 1 / 3


@pytest.mark.parametrize("episodes", [8, 32, 128])
def test_step_by_episodes(loops: Loops, tmp_path: Path, episodes: int) -> None:
    changes = {"rollout": {"tasks_per_update": episodes}}
    step = Steps("quickstart", tmp_path, **changes)
    loops.measure(f"a step of {episodes} episodes", {"hero": memory.counted(step)}, 3)
