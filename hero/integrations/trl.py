"""HERO as a TRL trainer: in the place of `GRPOTrainer`, with the same arguments.

    trainer = HeroTrainer(model=..., args=GRPOConfig(...), train_dataset=...,
                          environment_factory=..., reward_funcs=...)

Rollout with tools and environments, vLLM, PEFT, DeepSpeed, logging and checkpoints are TRL's. In
the place of its policy gradient stands the divergence of each turn from a teacher that has seen
what followed (docs/method.md): the reflector reads each finished episode, the algorithm says what
the teacher of a turn is shown, and the loss is that of `hero train`.

Of `GRPOConfig` the shape of the policy gradient (`loss_type`, `epsilon`, `scale_rewards`,
`importance_sampling_level`, ...) has no meaning here, and advantages are only logged. Terms that
would be added to its loss are refused.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import TrainerCallback

try:
    from trl import GRPOTrainer
    from trl import __version__ as trl_version
except ImportError as error:
    raise ImportError(
        f"HeroTrainer needs trl ({error}): pip install 'hero-kernels[trl]', which is trl 1.16.0."
    ) from error

from hero import attention
from hero.algorithms import MODES, Experience
from hero.envs.base import Environment
from hero.files import write_atomic
from hero.integrations.common import MethodConfig, WholeRenderer, checked
from hero.integrations.trl_parts import (
    Generated,
    TrlPolicy,
    TrlSampler,
    episodes,
    kept_weights,
    sampled_logprobs,
    world_of,
    zero_stage,
)
from hero.loss import compute_loss, weigh
from hero.packing import Weighted, micro_batches, pack, plan_rows
from hero.prompts import make_prompts
from hero.reflection import Reflections, Reflector, make_reflector
from hero.state import idle_reason
from hero.teacher import TeacherContext, TeacherWeights
from hero.types import Trajectory

LOGGER = logging.getLogger(__name__)
TEACHER, IDLE = "hero_teacher.safetensors", "hero_idle.json"
"""In a checkpoint: the teacher's weights, where they are not the student's; `idle_updates`."""
FOREIGN_TERMS = {
    "beta": 0.0, "entropy_coef": 0.0, "use_adaptive_entropy": False, "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None, "mask_truncated_completions": False,
}  # fmt: skip
"""Arguments of GRPOConfig that add to its loss or mask it, with the values that do neither."""


class HeroTrainer(GRPOTrainer):  # type: ignore[misc]
    """`GRPOTrainer` with HERO's loss.

    Args:
        method: what is special about HERO; None for the defaults.
        world: an environment of `hero.envs` for the same tasks, which tells the reflector its
            rules and the words of its actions, and diagnoses for `reflection.reflector=rules`
            (episodes bear the dataset's `task_id`). None: rules are the first prompt's system
            message.
        **arguments: of `GRPOTrainer`.

    Raises:
        ValueError: a model, an argument of GRPOConfig or a combination that HERO cannot train
            with; with what to use.
    """

    args: Any
    model: Any
    chat_template_kwargs: Any

    def __init__(
        self, *arguments: Any, method: MethodConfig | None = None, world: Environment | None = None,
        **named: Any,
    ) -> None:  # fmt: skip
        self.method, self.world = checked(method or MethodConfig()), world
        self.idle_updates = 0
        """Batches of episodes in a row of which nothing could be learnt."""
        super().__init__(*arguments, **named)
        self._check()
        self.add_callback(_AfterStep(self))

    def _check(self) -> None:
        method, args = self.method, self.args
        for name, neutral in FOREIGN_TERMS.items():
            if getattr(args, name) != neutral:
                raise ValueError(
                    f"GRPOConfig.{name}={getattr(args, name)!r} changes GRPO's loss, which HERO "
                    f"does not have: leave it at {neutral!r}. For a penalty on the distance from "
                    "the start set MethodConfig.loss.kl_to_start."
                )
        wrong = {
            "images are not supported: use a text model": self._is_vlm,
            "the router's auxiliary loss is not added: set router_aux_loss_coef=0.0":
                self.aux_loss_enabled,
            "weights in shards cannot be exchanged for the teacher's: train with DDP, DeepSpeed "
            "ZeRO 1 or 2, or LoRA, not FSDP or ZeRO 3":
                self.is_fsdp_enabled or zero_stage(self.accelerator) == 3,
            "vLLM samples from the student's weights: set reflection.reflector to self, rules or "
            "openai, not teacher": self.use_vllm and method.reflection.reflector == "teacher",
            "reflection.reflector=rules and reflection.verify need world=, an environment of "
            "hero.envs": self.world is None
            and (method.reflection.reflector == "rules" or method.reflection.verify),
            "processes whose engines work together have to reflect equally often: set "
            "reflection.retries=0 and reflection.episodes='all'":
                self.accelerator.num_processes > 1 and method.reflection.reflector != "rules"
                and (method.reflection.retries > 0 or method.reflection.episodes != "all"),
        }  # fmt: skip
        for what, is_so in wrong.items():
            if is_so:
                raise ValueError(f"HeroTrainer: {what}.")
        if self.model.config._attn_implementation == "sdpa" and not self._is_paged:
            attention.use(self.model)

    @property
    def _is_paged(self) -> bool:
        return bool(getattr(self.args, "use_transformers_continuous_batching", False))

    def begin(self) -> None:
        """Make the teacher from the weights of the start, and say what will be slow."""
        _ = self.teacher, self.start  # made by being asked for
        alone = self.policy.unpacked(1)
        if alone and self.accelerator.is_main_process:
            why = "use_transformers_continuous_batching is on" if self._is_paged else alone
            LOGGER.warning("Rows are computed one by one, several times as long: %s.", why)

    # ---- the method, made when the model is where it is trained --------------------------------

    @cached_property
    def policy(self) -> TrlPolicy:
        """The student, as hero's loss and teacher see it."""
        options = self.chat_template_kwargs
        return TrlPolicy(self, WholeRenderer(self._tokenizer, self.chat_template, options))

    @cached_property
    def teacher(self) -> TeacherWeights:
        """The weights that score with hindsight."""
        return TeacherWeights(self.policy, self.method.teacher)

    @cached_property
    def start(self) -> TeacherWeights | None:
        """The weights at the start, if the loss needs them."""
        frozen = replace(self.method.teacher, weights="frozen", path="")
        return TeacherWeights(self.policy, frozen) if self.method.loss.kl_to_start else None

    @cached_property
    def algorithm(self) -> Any:
        """Says what the teacher of each turn sees."""
        prompts = make_prompts(self.method.prompts)
        context = TeacherContext(self.method.teacher, self.policy.renderer, prompts)
        return MODES[self.method.mode](context, self.method.loss)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """With the teacher of a checkpoint; without one it is made when training begins."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (idle := Path(checkpoint) / IDLE).is_file():
            self.idle_updates = int(idle.read_text(encoding="utf-8"))
        kept = kept_weights(self.teacher, self.start)
        if checkpoint is None or not kept:
            return
        path = Path(checkpoint) / TEACHER
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} holds no {TEACHER}: it is not of a HeroTrainer with teacher.weights="
                f"{self.method.teacher.weights}, and another teacher would be another objective."
            )
        saved = load_file(path, device=str(self.policy.device))
        for name, weights in kept.items():
            prefix = f"{name}."
            own = {n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)}
            weights.load_state_dict(own)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            write_atomic(Path(output_dir) / IDLE, str(self.idle_updates))
        kept = kept_weights(self.teacher, self.start)
        if kept and self.args.should_save:
            tensors = {
                f"{name}.{n}": tensor.contiguous()
                for name, weights in kept.items()
                for n, tensor in weights.state_dict().items()
            }
            write_atomic(Path(output_dir) / TEACHER, save(tensors))

    # ---- from rollouts to samples --------------------------------------------------------------

    def _generate(self, prompts: list[Any]) -> Any:
        """TRL's; what it returns is kept for the reflector."""
        result = super()._generate(prompts)
        self._generated = Generated(
            prompts=prompts, prompt_ids=result[0], completion_ids=result[1], tool_mask=result[2],
            completions=result[3],
        )  # fmt: skip
        return result

    def _calculate_rewards(self, *arguments: Any, **named: Any) -> Tensor:
        """TRL's [episodes of all processes, reward functions], kept for the reflector."""
        self._rewards: Tensor = super()._calculate_rewards(*arguments, **named)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        trajectories = self._trajectories(inputs, batch)
        reflections = self._reflect(trajectories)
        for trajectory, reward in zip(trajectories, self._own_rewards(len(inputs)), strict=True):
            if reward.isnan().all():
                trajectory.fail("no reward function could score it")
        samples = self.algorithm.samples(
            Experience(trajectories=trajectories, diagnoses=reflections.diagnoses, gold={})
        )
        own: list[list[Weighted]] = [[] for _ in trajectories]
        for item in weigh(samples, self.method.loss, self._total):
            own[item.sample.trajectory].append(item)
        batch["hero_samples"] = own
        if mode == "train":
            self._count_idle(sum(map(len, own)), reflections)
        trained = sum(map(len, own)) / max(1, sum(len(t.turns) for t in trajectories))
        self._note(mode, {"turns/trained_rate": trained, **reflections.stats.metrics()})
        return batch

    def _count_idle(self, trained: int, reflections: Reflections) -> None:
        """Take in a batch of which `trained` turns are learnt from, as `hero train` does."""
        asked, read = self._total(reflections.stats.asked), self._total(reflections.stats.read)
        idle = not self._total(trained) or (asked > 0 and not read)
        self.idle_updates = self.idle_updates + 1 if idle else 0

    def _own_rewards(self, number: int) -> Tensor:
        first = self.accelerator.process_index * number
        return self._rewards[first : first + number]

    def _trajectories(self, inputs: list[dict[str, Any]], batch: Any) -> list[Trajectory]:
        weights = self.reward_weights.to(self._rewards.device)
        rewards = (self._own_rewards(len(inputs)) * weights).nansum(1).tolist()
        logprobs = sampled_logprobs(batch)
        of_prompt = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * len(inputs)
        return episodes(
            self._generated, inputs, rewards, self.environments, self.policy.renderer,
            [(first + i) // of_prompt for i in range(len(inputs))],
            None if logprobs is None else logprobs.tolist(),
        )  # fmt: skip

    @cached_property
    def _reflector(self) -> Reflector:
        policy, sampler = self.policy, TrlSampler(self)
        world: Any = self.world or world_of(self._generated.prompts[0], self.tools, policy)
        return make_reflector(
            self.method.reflection, env=world, sampler=sampler, renderer=policy.renderer,
            prompts=make_prompts(self.method.prompts), teacher_weights=self.teacher.applied,
            context=min(policy.context, self.teacher.policy.context),
        )  # fmt: skip

    def _reflect(self, trajectories: list[Trajectory]) -> Reflections:
        if not self.algorithm.needs_reflection:
            return Reflections.none(trajectories)
        return self._reflector.reflect(trajectories, self.args.seed + self._step)

    # ---- loss ----------------------------------------------------------------------------------

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """TRL's, whose loss has to be the one below."""
        self._is_ours = False
        loss: Tensor = super().training_step(*arguments, **named)
        if not self._is_ours:
            raise ValueError(
                f"HeroTrainer: trl {trl_version} has trained with a loss of its own. Leave out "
                "what chooses one (use_liger_kernel in older versions), or install trl 1.16.0."
            )
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """HERO's loss of a micro-batch, in the denominators of the whole optimiser step.

        Processes are averaged after it, and TRL's generation batch may be several steps.
        """
        self._is_ours = True
        items = [item for own in inputs["hero_samples"] for item in own]
        policy, args = self.policy, self.args
        if not items:  # the same calls as elsewhere, so that no process waits for another
            hidden = policy.hidden(inputs["completion_ids"][:1, :1])
            return 0.0 * (hidden.sum() + policy.head_weight.sum())
        config = self.method.loss
        if sampled_logprobs(inputs) is None:
            config = replace(config, is_clip=0.0)  # the importance ratio is 1
        [rows] = micro_batches(plan_rows(items), 2**62)
        output = compute_loss(
            policy, self.teacher, pack(rows, policy.device), config, self.temperature, self.start
        )
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["divergence/mean"].append(float(output.divergence.mean()))
        self._metrics[mode]["entropy"].append(float(output.entropy.mean()))
        scale = float(self.accelerator.num_processes)
        if mode == "train":
            scale *= args.steps_per_generation / self.current_gradient_accumulation_steps
        return scale * output.loss

    def _total(self, own: float) -> float:
        """The sum of a number over the processes."""
        mine = torch.tensor(float(own), dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.gather(mine).sum())

    def _note(self, mode: str, metrics: dict[str, float]) -> None:
        """Log means over the processes."""
        mine = torch.tensor(list(metrics.values()), device=self.accelerator.device)
        means = self.accelerator.gather(mine).view(-1, len(metrics)).mean(0)
        for name, value in zip(metrics, means.tolist(), strict=True):
            self._metrics[mode][name].append(value)


class _AfterStep(TrainerCallback):  # type: ignore[misc]
    """The teacher follows the student after each step that was taken; idle training stops."""

    def __init__(self, trainer: HeroTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.trainer.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        trainer = self.trainer
        if not trainer.accelerator.optimizer_step_was_skipped:
            trainer.teacher.update()
        if reason := idle_reason(trainer.idle_updates, trainer.method.max_idle_updates):
            control.should_training_stop = True
            if trainer.accelerator.is_main_process:
                LOGGER.warning("Training stops: %s.", reason)
