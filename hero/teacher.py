"""The self-teacher: the student's own context plus hindsight, and the weights that read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hero.config import ModelConfig, TeacherConfig
from hero.packing import Packed
from hero.policy import Policy
from hero.prompts import Hindsight, Prompts
from hero.renderer import Renderer
from hero.shards import fill, local
from hero.types import Diagnosis, Trajectory
from hero.weights import digest_of_frozen


class TeacherContext:
    """Writes the privileged context of a turn."""

    def __init__(self, config: TeacherConfig, renderer: Renderer, prompts: Prompts) -> None:
        self.config = config
        self.renderer = renderer
        self.prompts = prompts

    def hindsight(self, trajectory: Trajectory, turn: int) -> Hindsight:
        """What followed the turn: observation and final reward, as far as the config shows them."""
        config, item = self.config, trajectory.turns[turn]
        after = trajectory.turns[turn : turn + config.look_ahead] if config.observation else []
        seen = [
            None
            if t.observation is None
            else self.renderer.clip(t.observation, config.max_observation_tokens)
            for t in after
        ]
        return Hindsight(
            observation=seen[0] if seen else None,
            later=tuple(observation for observation in seen[1:] if observation is not None),
            reward=trajectory.reward if config.reward else None,
            parse_ok=item.parse_ok,
        )

    def diagnosed(self, hindsight: Hindsight, diagnosis: Diagnosis) -> Hindsight:
        """`hindsight` with those parts of a diagnosis that the config shows."""
        config = self.config
        return replace(
            hindsight,
            necessary=diagnosis.necessary or not config.diagnosis,
            valid=diagnosis.valid or not config.diagnosis,
            failure_cause=diagnosis.failure_cause if config.diagnosis else "",
            hint=diagnosis.hint if config.diagnosis else "",
            corrected_action=diagnosis.corrected_action if config.corrected_action else "",
        )

    def privileged_ids(self, hindsight: Hindsight) -> list[int]:
        """Ids of the privileged context, at most `max_privileged_tokens` (head and tail kept)."""
        text = self.prompts.privileged_context(hindsight)
        return self.renderer.encode(self.renderer.clip(text, self.config.max_privileged_tokens))


class Scorer(Protocol):
    """Weights other than the student's, as the loss asks for them."""

    def states(self, packed: Packed) -> Tensor:
        """[N, H] the states that predict each action token."""

    def own_head(self) -> dict[str, Any]:
        """The head as arguments of hero_kernels; {} if it is the student's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What a teacher made of some rows before the student's passes began."""

    hidden: Tensor
    """[N, H] on the CPU."""
    head: dict[str, Any]
    device: torch.device

    def states(self, packed: Packed) -> Tensor:
        return self.hidden.to(self.device)

    def own_head(self) -> dict[str, Any]:
        return self.head


class TeacherWeights:
    """live: the student's weights; frozen: those at the start; ema: θ_T ← (1-r)·θ_T + r·θ after
    each step; or, with a path, another model that stays as it is.

    frozen and ema keep a copy of *every* trained parameter, lm_head and tied embedding included.

    Raises:
        ValueError: the other model has another vocabulary than the student.
    """

    def __init__(self, policy: Policy, config: TeacherConfig) -> None:
        self.kind = config.weights
        self.rate, self.offload = config.update_rate, config.offload
        self._student = policy.trainable()
        self._teacher: dict[str, Tensor] = {}
        self._head_is_trained = any(p.requires_grad for p in policy.head.parameters())
        self.policy = policy
        """The model that computes within `applied`: the student's own, or the other one."""
        if config.path:
            self.kind, self.policy = "frozen", _other_model(config.path, policy)
            self._head_is_trained = True  # in any case it is another head
        elif self.kind != "live":
            self._teacher = self._copy()

    @torch.no_grad()
    def update(self) -> None:
        """One EMA step; nothing for live and frozen."""
        if self.kind != "ema":
            return
        for name, parameter in self._student.items():
            teacher = local(self._teacher[name])
            teacher.lerp_(local(parameter).to(teacher), self.rate)

    @torch.no_grad()
    def restart(self) -> None:
        """After the student's weights were replaced: an average begins anew at them.

        A live teacher stays at them from here on: one that follows the student collapses again.
        """
        if self.kind == "live":
            self.kind, self._teacher = "frozen", self._copy()
        elif self.kind == "ema":
            self.refresh()

    def _copy(self) -> dict[str, Tensor]:
        def copied(p: Tensor) -> Tensor:
            # An average in 16 bits would stay where it is: its steps are smaller than they can say.
            wide = torch.promote_types(p.dtype, torch.float32) if self.kind == "ema" else p.dtype
            return p.detach().to("cpu" if self.offload else p.device, wide, copy=True)

        return {name: copied(p) for name, p in self._student.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the policy's model computes with the teacher's weights (inference only)."""
        shards = self.policy.shards
        with shards.unsharded(), shards.lent(self._student, self._teacher):
            yield

    @torch.no_grad()
    def states(self, packed: Packed) -> Tensor:
        """[N, H] the states that predict each action token."""
        with self.applied():
            return packed.states(self.policy)[packed.index]

    def scored(self, rows: Sequence[Packed | None]) -> Sequence[Scorer]:
        """Who scores each of these rows.

        Weights that are whole do it when they are asked, and change places at no cost. Those in
        shards or in main memory do it here, so that they are fetched once; then all ranks have to
        come here.
        """
        ranks = self.policy.shards.ranks
        if ranks.size == 1 and not self.offload:
            return [self for _ in rows]

        def score() -> list[Scored]:
            nothing = torch.zeros(0)
            hidden = [
                nothing if packed is None else packed.states(self.policy)[packed.index].cpu()
                for packed in rows
            ]
            return [Scored(hidden=h, head=head, device=self.policy.device) for h in hidden]

        with self.applied(), torch.no_grad():
            head = {
                name: value if value is None else value.clone()
                for name, value in self._head().items()
            }
            return ranks.apart(score)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the student's weights."""
        for name, weight in self._teacher.items():
            local(weight).copy_(local(self._student[name]))

    def own_head(self) -> dict[str, Any]:
        """The teacher's head as arguments of hero_kernels; {} if it is the student's.

        It is where the head is not trained (LoRA, `model.train_head=false`) and with live weights.
        """
        with self.applied():
            return self._head()

    def _head(self) -> dict[str, Any]:
        if self.kind == "live" or not self._head_is_trained:
            return {}
        head, dtype = self.policy.head, self.policy.dtype
        # Copies where weights that are lent are written over those of the model (`Mastered`).
        copied = bool(self._teacher) and dtype != torch.float32
        return {
            "teacher_weight": head.weight.detach().to(dtype, copy=copied),
            "teacher_bias": None if head.bias is None else head.bias.detach().clone(),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self._teacher

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != set(self._teacher):
            raise ValueError(
                f"The checkpoint's teacher has {len(state)} tensors, this run's "
                f"{len(self._teacher)}: teacher.weights or the trained parameters differ "
                "from the run that is resumed."
            )
        for name, value in state.items():
            fill(self._teacher[name], value)


def _other_model(path: str, student: Policy) -> Policy:
    """A model that reads the student's ids and predicts them."""
    device, dtype = str(student.device), str(student.dtype).removeprefix("torch.")
    config = ModelConfig(path=path, device=device, dtype=dtype)  # type: ignore[arg-type]
    other = Policy.load(config)
    other.model.requires_grad_(False)
    other.fixed = digest_of_frozen(other.model, other.tokenizer)
    other.model.to(student.dtype)  # type: ignore[arg-type]
    other.renderer = student.renderer
    other.spread(student.shards.ranks, stays_whole=False)
    own_ids, ids = student.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    for what, own, theirs in (
        ("the vocabularies", own_ids, ids),
        ("rows of the lm_head", len(student.head.weight), len(other.head.weight)),
        ("scale and cap of the logits", student.head_options, other.head_options),
        ("bias of the lm_head", student.head.bias is None, other.head.bias is None),
    ):
        if own != theirs:
            sizes = [f"{len(x)} ids" if x is own_ids or x is ids else x for x in (own, theirs)]
            raise ValueError(
                f"teacher.path={path!r} must score the student's tokens, but {what} differ: "
                f"student {sizes[0]}, teacher {sizes[1]}. Expected a model of the same family "
                "and vocabulary; another one can be a reflector behind an endpoint "
                "(--reflection.reflector openai)."
            )
    return other
