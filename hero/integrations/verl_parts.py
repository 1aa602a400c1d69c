"""HERO inside verl: what each turn of a rollout is scored behind, and the loss of that.

verl's own worker asks a teacher server for the log-probabilities of a finished rollout as it
stands. `HindsightTeacher` takes the place of that one method: the rollout becomes a trajectory, a
reflector reads it, and the teacher scores each turn behind its own privileged context. verl itself
is not imported here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import torch
from torch import Tensor

from hero.algorithms import MODES, Experience
from hero.config import LossConfig
from hero.integrations.common import MethodConfig, WholeRenderer, checked, spans
from hero.prompts import make_prompts
from hero.reflection import Reflections, make_reflector
from hero.sampling import Completion, Sampling
from hero.teacher import TeacherContext
from hero.types import Sample, StopReason, Trajectory, Turn


class ServedSampler:
    """Samples from verl's rollout servers; called from another thread than that of `loop`."""

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.client, self.loop = client, loop

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """One completion for each prompt, in order, without log-probabilities."""
        settings = {
            "max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": 1.0,
        }  # fmt: skip
        waiting = [
            asyncio.run_coroutine_threadsafe(
                self.client.generate(
                    request_id=uuid4().hex, prompt_ids=prompt, sampling_params=dict(settings)
                ),
                self.loop,
            )
            for prompt in prompts
        ]
        return [Completion(ids=list(w.result().token_ids), logprobs=[]) for w in waiting]


class HindsightTeacher:
    """Put before verl's `AgentLoopWorker` in a class' bases.

    Turns without hindsight get NaN for the teacher's log-probability, which the loss `hero` leaves
    out, and are taken out of `output.response_mask`, by which verl's V1 trainer divides.

    Raises:
        ValueError: at the first rollout, if `hero.loss` asks for what verl's loss does not do.
    """

    hero = MethodConfig()
    """Its teacher's weights are those of verl's teacher server. Of `loss` only `turns` has a
    meaning, and a `clean_turn_weight` of 0, which is turns=hinted."""
    tokenizer: Any
    llm_client: Any
    teacher_server_manager: Any
    teacher_key: str
    distillation_enabled: bool

    async def _compute_teacher_logprobs(
        self, output: Any, prompt_ids: list[int], response_ids: list[int], validate: bool,
        sample_kwargs: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if not self.distillation_enabled or validate:
            return
        row = sample_kwargs or {}
        trajectory = trajectory_of(output, prompt_ids, response_ids, row, self._renderer)
        rules = "\n".join(m["content"] for m in row.get("raw_prompt", []) if m["role"] == "system")
        loop = asyncio.get_running_loop()
        samples = await asyncio.to_thread(self._annotated, trajectory, rules, loop)
        scored = await asyncio.gather(
            *(
                self.teacher_server_manager.compute_teacher_logprobs_single(
                    sequence_ids=sample.teacher_prompt_ids + sample.action_ids,
                    routing_key=_plain(row.get(self.teacher_key)),
                )
                for sample in samples
            )
        )
        length = len(prompt_ids) + len(response_ids)
        ids = torch.zeros(length, 1, dtype=torch.int32)
        logprobs = torch.full((length, 1), float("nan"))
        mask = [0] * len(response_ids)
        for sample, (_, found) in zip(samples, scored, strict=True):
            if found.shape[1] != 1:
                raise ValueError(
                    f"The teacher gives {found.shape[1]} log-probabilities a token: HERO in verl "
                    "needs distillation.distillation_loss.loss_mode=hero, which takes one."
                )
            number, start = len(sample.action_ids), len(sample.prompt_ids)
            behind = len(sample.teacher_prompt_ids)
            # verl's row i is about token i + 1
            logprobs[start - 1 : start - 1 + number] = found[behind - 1 : behind - 1 + number]
            first = start - len(prompt_ids)
            mask[first : first + number] = [1] * number
        output.extra_fields["teacher_ids"], output.extra_fields["teacher_logprobs"] = ids, logprobs
        output.response_mask = mask

    def _annotated(
        self, trajectory: Trajectory, rules: str, loop: asyncio.AbstractEventLoop
    ) -> list[Sample]:
        reflections = Reflections.none([trajectory])
        if self._algorithm.needs_reflection:
            world = cast(Any, SimpleNamespace(system_prompt=rules))
            reflector = make_reflector(
                self.hero.reflection, env=world, sampler=ServedSampler(self.llm_client, loop),
                renderer=self._renderer, context=2**31,
                prompts=make_prompts(self.hero.prompts), teacher_weights=_no_weights,
            )  # fmt: skip
            reflections = reflector.reflect([trajectory], 0)
        seen = Experience(trajectories=[trajectory], diagnoses=reflections.diagnoses, gold={})
        return [sample for sample in self._algorithm.samples(seen) if sample.distill_weight]

    @cached_property
    def _renderer(self) -> WholeRenderer:
        return WholeRenderer(self.tokenizer, None, {})

    @cached_property
    def _algorithm(self) -> Any:
        checked(replace(self.hero, loss=LossConfig()))  # whose own check is stricter
        _check(self.hero.loss)
        context = TeacherContext(self.hero.teacher, self._renderer, make_prompts(self.hero.prompts))
        return MODES[self.hero.mode](context, self.hero.loss)


def trajectory_of(
    output: Any, prompt_ids: list[int], response_ids: list[int], row: Mapping[str, Any],
    renderer: WholeRenderer,
) -> Trajectory:  # fmt: skip
    """verl's rollout as a trajectory; a turn is a run of ones in `output.response_mask`."""
    mask = list(output.response_mask)
    actions = spans(mask)
    ends = [start for start, _ in actions[1:]] + [len(response_ids)]
    turns = []
    for (start, end), following in zip(actions, ends, strict=True):
        action = response_ids[start:end]
        seen = renderer.decode(response_ids[end:following]).strip()
        turns.append(Turn(
            prompt_ids=prompt_ids + response_ids[:start], action_ids=action,
            sampled_logprobs=[0.0] * len(action), action_text=renderer.decode(action),
            observation=seen or None,
        ))  # fmt: skip
    said = [m["content"] for m in row.get("raw_prompt", []) if m["role"] == "user"]
    reward = float(output.reward_score or 0.0)
    cut = response_ids[-1] not in renderer.stop_ids
    return Trajectory(
        id=uuid4().hex, group_id=str(row.get("uid", "")), task_id=str(row.get("index", "")),
        instruction=str(said[-1]) if said else renderer.decode(prompt_ids), turns=turns,
        reward=reward, success=reward >= 1.0,
        stop_reason=StopReason.MAX_TOKENS if cut else StopReason.DONE,
    )  # fmt: skip


def sampled_reverse_kl(
    student: Tensor, teacher: Tensor, old: Tensor | None = None, *, is_clip: float = 2.0,
    policy_gradient: bool = False,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """Reverse KL of each token in its score-function form, `support="sampled"` of hero_kernels.

        min(S/old, is_clip) · (log S - log T) · log S,  the first two factors without gradient

    Args:
        student: [B, R] log S(y), differentiable.
        teacher: [B, R] log T(y); NaN for tokens that are not trained.
        old: [B, R] log-probabilities when y was sampled; None if they are the student's.
        is_clip: bound of the importance ratio.
        policy_gradient: return the gap log S - log T alone, whose negative is an advantage.

    Returns:
        [B, R] losses, 0 where the teacher is NaN, and metrics of the tokens that are trained.
    """
    trained = ~teacher.isnan()
    gap = (student.detach() - teacher).masked_fill(~trained, 0.0)
    seen = gap[trained]
    metrics = {
        "hero/trained_rate": float(trained.float().mean()),
        "hero/reverse_kl": float(seen.mean()) if len(seen) else 0.0,
    }
    if policy_gradient:
        return gap, metrics
    ratio = torch.ones_like(gap) if old is None else (student.detach() - old).exp()
    return (ratio.clamp(max=is_clip) * gap * student).masked_fill(~trained, 0.0), metrics


def _check(loss: LossConfig) -> None:
    """verl's loss weighs all turns alike and has no further terms."""
    served = replace(LossConfig(), turns=loss.turns)
    if loss in (served, replace(served, clean_turn_weight=0.0)):
        return
    wrong = [
        f"loss.{item.name}={getattr(loss, item.name)!r} (expected {getattr(served, item.name)!r})"
        for item in fields(loss)
        if getattr(loss, item.name) != getattr(served, item.name)
    ]
    raise ValueError(
        f"The loss hero in verl does not know {', '.join(wrong)}: leave all but loss.turns at "
        "their defaults, or train with hero train or HeroTrainer."
    )


def _no_weights() -> Any:
    raise ValueError(
        "reflection.reflector=teacher: verl's teacher server only scores. Set it to self or openai."
    )


def _plain(value: Any) -> Any:
    """A value of a numpy object array as itself."""
    return value.item() if hasattr(value, "item") else value
