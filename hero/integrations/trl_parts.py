"""What HERO's pipeline needs of a TRL trainer: its model, its engine and its episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hero.integrations.common import spans
from hero.policy import Policy
from hero.renderer import Renderer
from hero.sampling import Completion, Sampling
from hero.teacher import TeacherWeights
from hero.types import FeedbackKind, StopReason, Trajectory, Turn
from hero_kernels.integrations.transformers import hidden_and_head, with_head


class TrlPolicy(Policy):
    """TRL's model as trunk and head. It is called through its wrapper, so that DDP, DeepSpeed and
    PEFT do their work, and is neither moved nor cast."""

    def __init__(self, trainer: Any, renderer: Renderer) -> None:
        self.trainer, self.renderer, self.tokenizer = trainer, renderer, renderer.tokenizer
        self.device, self.adapter = trainer.accelerator.device, None
        self.model = trainer.accelerator.unwrap_model(trainer.model)
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self.dtype = kinds.get(trainer.accelerator.mixed_precision, self.model.dtype)

    def hidden(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Last hidden states [B, T, H]; without dropout where no gradient is wanted (teachers)."""
        training = self.model.training
        if not torch.is_grad_enabled():
            self.model.eval()
        try:
            with self.trainer.accelerator.autocast():
                states = hidden_and_head(self.trainer.model_wrapped, input_ids, **inputs)
        finally:
            self.model.train(training)
        return states.hidden.to(self.dtype)

    @property
    def head_weight(self) -> Tensor:
        """The lm_head's weight in the compute type, differentiable, [V, H]."""
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        return with_head(self.model, nothing).weight.to(self.dtype)


class TrlSampler:
    """Samples with TRL's engine: transformers, its continuous batching or vLLM.

    Random numbers are TRL's (`args.seed`); `Sampling.seed` has no part in them.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """One completion for each prompt, in order, without log-probabilities."""
        with self._set(sampling):
            answers, _ = self.trainer._generate_single_turn(list(prompts), None, {}, 1)
        return [Completion(ids=list(ids), logprobs=[]) for ids in answers]

    @contextmanager
    def _set(self, sampling: Sampling) -> Iterator[None]:
        """Length and temperature in place of those of the episodes."""
        if self.trainer.use_vllm:
            engine, changed = self.trainer.vllm_generation, {
                "max_completion_length": sampling.max_tokens, "temperature": sampling.temperature,
            }  # fmt: skip
        else:
            config = copy(self.trainer.generation_config)
            config.max_new_tokens, config.do_sample = sampling.max_tokens, sampling.temperature > 0
            config.temperature = sampling.temperature or 1.0
            engine, changed = self.trainer, {"generation_config": config}
        before = {name: getattr(engine, name) for name in changed}
        vars(engine).update(changed)
        try:
            yield
        finally:
            vars(engine).update(before)


@dataclass(kw_only=True, slots=True)
class Generated:
    """What TRL's `_generate` returned, and for which prompts."""

    prompts: list[Any]
    """Messages, with what the environment's `reset` said."""
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    """Actions and, where `tool_mask` is 0, what the tools answered in the template's words."""
    tool_mask: list[list[int]] | None
    completions: list[Any]
    """Messages of assistant and tools."""


def episodes(
    generated: Generated, rows: Sequence[dict[str, Any]], rewards: Sequence[float],
    environments: Sequence[Any] | None, renderer: Renderer, group_of: Sequence[int],
    logprobs: Sequence[Sequence[float]] | None,
) -> list[Trajectory]:  # fmt: skip
    """TRL's rollouts as trajectories; a turn is what the model wrote before the tools answered.

    An environment may say what followed the last answer in its attribute `_feedback`.

    Args:
        generated: B rollouts.
        rows: of the dataset; `task_id` names a task.
        rewards: one for each rollout; a reward of at least 1 is success.
        environments: of each rollout, as they are after the rewards were computed.
        renderer: ids to text.
        group_of: number of each rollout's prompt.
        logprobs: of each completion token when it was sampled; None if they are the present ones.

    Raises:
        ValueError: messages and ids do not have the same turns.
    """
    found = []
    for i, completion in enumerate(generated.completions):
        prompt, ids = generated.prompt_ids[i], generated.completion_ids[i]
        mask = generated.tool_mask[i] if generated.tool_mask else [1] * len(ids)
        answers = [
            "\n".join(str(message["content"]) for message in of_tools)
            for is_tool, of_tools in groupby(completion, key=lambda m: m["role"] == "tool")
            if is_tool
        ]
        actions = spans(mask)
        feedback = getattr(environments[i], "_feedback", None) if environments else None
        if feedback is not None and len(answers) == len(actions) - 1:
            answers.append(str(feedback))
        if len(answers) not in (len(actions) - 1, len(actions)):
            raise ValueError(
                f"A rollout has {len(actions)} answers of the model and {len(answers)} of tools "
                "between them: this version of TRL writes them in another way than trl 1.16.0."
            )
        turns = []
        for number, (start, end) in enumerate(actions):
            seen = answers[number] if number < len(answers) else None
            refused = seen is not None and seen.startswith("{'error':")
            turns.append(Turn(
                prompt_ids=prompt + ids[:start], action_ids=ids[start:end],
                sampled_logprobs=[0.0] * (end - start) if logprobs is None
                else list(logprobs[i][start:end]),
                action_text=renderer.decode(ids[start:end]), observation=seen, is_error=refused,
                feedback_kind=FeedbackKind.INVALID_ACTION if refused else FeedbackKind.OK,
            ))  # fmt: skip
        cut = ids[-1] not in renderer.stop_ids
        found.append(Trajectory(
            id=f"{group_of[i]}-{i}", group_id=str(group_of[i]), turns=turns,
            task_id=str(rows[i].get("task_id", group_of[i])), reward=rewards[i],
            instruction=str(generated.prompts[i][-1]["content"]), success=rewards[i] >= 1.0,
            stop_reason=StopReason.MAX_TOKENS if cut else StopReason.DONE,
        ))  # fmt: skip
    return found


def sampled_logprobs(batch: dict[str, Any]) -> Tensor | None:
    """[B, C] as vLLM sampled, else as TRL scored before the first step on them; None where TRL
    scores nothing, as the weights are still the same."""
    old: Tensor | None = batch.get("old_per_token_logps")
    sampled: Tensor | None = batch.get("sampling_per_token_logps")
    if sampled is None or old is None:
        return old if sampled is None else sampled
    return torch.where(sampled.isnan(), old, sampled)


def kept_weights(*weights: TeacherWeights | None) -> dict[str, TeacherWeights]:
    """Those that hold tensors of their own."""
    named = zip(("teacher", "start"), weights, strict=True)
    return {name: own for name, own in named if own is not None and own.state_dict()}


def zero_stage(accelerator: Any) -> int:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.zero_stage)


def world_of(prompt: Any, tools: list[Callable[..., Any]], policy: TrlPolicy) -> Any:
    """What a reflector asks an environment: the system message, and tools where the template's
    calls can be written."""
    from transformers.utils import get_json_schema

    rules = "\n".join(str(m["content"]) for m in prompt if m["role"] == "system")
    if policy.renderer.tool_format == "react":  # a format that hero.toolcalls does not know
        return SimpleNamespace(system_prompt=rules)
    schemas = [get_json_schema(tool) for tool in tools]
    return SimpleNamespace(
        system_prompt=rules, tools=lambda: schemas, tool_format=policy.renderer.tool_format
    )
