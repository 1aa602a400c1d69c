"""TRL's distillation trainers with their divergence computed by `hero_kernels`.

    from trl.experimental.gkd import GKDTrainer
    trainer = fused(GKDTrainer)(model=model, teacher_model=teacher, args=args, ...)

`fused` derives a class; nothing of TRL is replaced, and data, generation, logging and saving stay
TRL's. The first micro-batch is computed by TRL's own loss as well, and training stops with both
values if they differ: so another version of TRL cannot train on another objective unseen.

TRL is not imported here: what is derived from brings it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hero_kernels.functional import fused_linear_divergence
from hero_kernels.integrations import constant, named_divergence
from hero_kernels.integrations.transformers import LMStates, hidden_and_head, with_head
from hero_kernels.integrations.trl import one_scaling
from hero_kernels.objective import DivergenceOutput

TOLERANCE = {torch.float32: (1e-3, 1e-6), torch.float64: (1e-6, 1e-9)}
"""(relative, absolute in nats) of the parity check; TRL rounds logits to 16 bits where the model
has 16 bits, and then its own value is good for about a tenth."""
SIXTEEN_BITS = (0.1, 1e-3)


def fused(trainer: type[Any]) -> type[Any]:
    """The same trainer with fused divergences: a new class, used like the old one.

    Its attribute `parity_check` is True until the first micro-batch was compared with TRL's own
    loss; set it to False to leave that out.

    Args:
        trainer: TRL's `DistillationTrainer`, `GKDTrainer`, `SDFTTrainer`, `SDPOTrainer`, or a class
            derived from one of them that keeps its loss.

    Raises:
        ValueError: another trainer, or one that overrides the loss that would be replaced.
    """
    for base in trainer.__mro__:
        if base.__name__ in MIXINS and base.__module__.startswith("trl."):
            break
    else:
        raise ValueError(
            f"{trainer.__name__} is none of TRL's trainers whose divergence is served: "
            f"{', '.join(MIXINS)}. Call generalized_jsd_loss or chunked_divergence of "
            "hero_kernels.integrations.trl in a loss of your own."
        )
    mixin = MIXINS[base.__name__]
    if missing := [name for name in mixin.replaces if not hasattr(base, name)]:
        raise ValueError(
            f"The installed {base.__name__} has no method {missing[0]}: trl 1.16.0 has it."
        )
    changed = [name for name in mixin.replaces if getattr(trainer, name) != getattr(base, name)]
    if changed:
        raise ValueError(
            f"{trainer.__name__} has a {changed[0]} of its own, which would be replaced, and its "
            f"objective lost: derive it from fused({base.__name__}) instead."
        )
    return type(f"Fused{trainer.__name__}", (mixin, trainer), {"__module__": trainer.__module__})


class ParityError(RuntimeError):
    """TRL's loss and ours differ: the installed TRL computes something else."""


class _Guarded:
    """What the mixins share: the comparison with TRL's own loss."""

    replaces: tuple[str, ...] = ()
    """Methods of the trainer that are taken over."""
    parity_check = True

    def _guarded(self: Any, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Any:
        """`ours()`; in the first micro-batch of training beside `theirs()`, in which random numbers
        (dropout) are the same."""
        if not (self.parity_check and self.model.training):
            return ours()
        device = self.accelerator.device
        logged = copy.deepcopy(getattr(self, "_metrics", None))
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            expected = _loss_of(theirs())
        if logged is not None:  # else the first micro-batch would count twice in TRL's means
            self._metrics = logged
        result = ours()
        got, wanted = float(_loss_of(result).detach()), float(expected)
        dtypes = (self.accelerator.unwrap_model(self.model).dtype, self._compute_dtype())
        relative, absolute = max(TOLERANCE.get(dtype, SIXTEEN_BITS) for dtype in dtypes)
        if not abs(got - wanted) <= relative * abs(wanted) + absolute:
            raise ParityError(
                f"The loss of the first micro-batch is {got:.8g} by hero_kernels and {wanted:.8g} "
                f"by {type(self).__mro__[2].__name__}; they may differ by {relative:.0e} of it. "
                "Train with TRL's own class, or use trl 1.16.0, and please report this."
            )
        self.parity_check = False
        return result

    def _compute_dtype(self: Any) -> torch.dtype:
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return kinds.get(self.accelerator.mixed_precision, torch.float32)


def _loss_of(result: Any) -> Tensor:
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    return loss


class _FusedGKD(_Guarded):
    """`GKDTrainer`: hidden states in place of whole logits. Who asks for outputs (an evaluation
    with metrics) gets TRL's own loss, which has the logits."""

    replaces = ("compute_loss",)

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:  # fmt: skip
        theirs = partial(super().compute_loss, model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if return_outputs:
            return theirs()
        return self._guarded(partial(self._loss, model, inputs, num_items_in_batch), theirs)

    def _loss(self: Any, model: Any, inputs: Any, num_items: Any) -> Tensor:
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            student = hidden_and_head(model, **ids)
            self.teacher_model.eval()
            with torch.no_grad():
                teacher = hidden_and_head(self.teacher_model, **ids)
            # Of GKDConfig's temperature TRL samples with it only: the divergence is taken at 1.
            loss = divergence(
                student, teacher, self.beta, num_items=num_items,
                token_weights=F.pad(inputs["labels"][:, 1:] != -100, (0, 1)),
            )  # fmt: skip
        assert isinstance(loss, Tensor)
        return loss


class _FusedDistillation(_Guarded):
    """`DistillationTrainer`: the same hidden states, our divergence."""

    replaces = ("_compute_loss",)

    def _compute_loss(self: Any, unwrapped_student: Any, inputs: Any, num_items: Any) -> Any:
        arguments = (unwrapped_student, inputs, num_items)
        theirs = partial(super()._compute_loss, *arguments)  # type: ignore[misc]
        return self._guarded(partial(self._loss, *arguments), theirs)

    def _loss(self: Any, student: Any, inputs: Any, num_items: Any) -> tuple[Tensor, ...]:
        """Loss, sum of the student's entropies, number of trained tokens."""
        trained = inputs["completion_mask"] != 0
        if "tool_mask" in inputs:
            trained = trained & (inputs["tool_mask"] != 0)
        of_images = inspect.signature(self._get_last_hidden_state).parameters
        passed = (
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            trained.shape[1],
        )
        images = {name: inputs[name] for name in of_images if name in inputs}
        hidden = self._get_last_hidden_state(student, *passed, **images)
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():  # through its wrapper, which may hold it in shards
            teacher_hidden = self._forward_redirection(
                self.teacher_model, teacher, self._get_last_hidden_state, teacher, *passed, **images
            )
        output = divergence(
            with_head(student, hidden), with_head(teacher, teacher_hidden), self.beta,
            temperature=self.temperature, token_weights=trained, num_items=num_items,
            return_stats=True,
        )  # fmt: skip
        assert isinstance(output, DivergenceOutput)
        entropy = output.student_entropy.masked_fill(~trained, 0.0).sum()
        return output.loss, entropy, trained.sum()


class _FusedSelfDistillation(_Guarded):
    """`SDFTTrainer` and `SDPOTrainer`: where TRL hands logits on, hidden states and head go by."""

    replaces = (
        "compute_loss", "_forward_logits", "_compute_teacher_student_logits",
        "_compute_self_distillation_loss",
    )  # fmt: skip
    _whole_logits = False
    """TRL's own loss is computed."""
    _wants_states = False

    def compute_loss(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Tensor:
        ours = partial(super().compute_loss, model, inputs, *rest, **named)  # type: ignore[misc]

        def theirs() -> Any:
            with _set(self, "_whole_logits", True):
                return ours()

        if getattr(self, "use_teacher_server", False):
            raise ValueError(
                "use_teacher_server=True: the teacher's logits are on a server, and only TRL's "
                "own class reads them there. Use it, or a teacher in this process."
            )
        loss: Tensor = self._guarded(ours, theirs)
        return loss

    def _compute_teacher_student_logits(self: Any, *arguments: Any, **named: Any) -> Any:
        with _set(self, "_wants_states", not self._whole_logits):
            return super()._compute_teacher_student_logits(*arguments, **named)  # type: ignore[misc]

    def _forward_logits(
        self: Any, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
    ) -> Any:
        if not self._wants_states:
            forward = super()._forward_logits  # type: ignore[misc]
            return forward(model, input_ids, attention_mask, logits_to_keep)
        with self.accelerator.autocast():
            states = hidden_and_head(model, input_ids, attention_mask=attention_mask)
        return states._replace(hidden=states.hidden[:, -logits_to_keep - 1 : -1])

    def _compute_policy_loss(self: Any, inputs: Any, student_logits: Any) -> Tensor:
        """SDPO's other term, which reads whole logits."""
        if isinstance(student_logits, LMStates):
            student_logits = student_logits.logits() / self.temperature
        loss: Tensor = super()._compute_policy_loss(inputs, student_logits)  # type: ignore[misc]
        return loss

    def _compute_self_distillation_loss(self: Any, model: Any, inputs: Any, given: Any) -> Tensor:
        """Mean over sequences of their token means, as TRL takes it."""
        if self._whole_logits:
            loss: Tensor = super()._compute_self_distillation_loss(model, inputs, given)  # type: ignore[misc]
            return loss
        args, trained = self.args, given.loss_mask != 0
        ratio = {}
        if args.distillation_is_clip is not None and "old_per_token_logps" in inputs:
            ratio = {
                "old_logprobs": inputs["old_per_token_logps"],
                "is_clip": args.distillation_is_clip,
            }
        sampled = args.distillation_mode == "sampled_token"
        with self.accelerator.autocast():
            per_token = divergence(
                given.student_logits, given.teacher_logits, args.distillation_alpha,
                temperature=self.temperature, token_weights=trained, reduction="none",
                target_ids=given.completion_ids if sampled or ratio else None,
                **_support(args), **ratio,
            )  # fmt: skip
        assert isinstance(per_token, Tensor)
        mean = per_token.detach().sum() / trained.sum().clamp(min=1)
        mode = "train" if model.training else "eval"
        self._log_self_distillation_metric(mode, self.accelerator.gather(mean).mean().item())
        return (per_token.sum(-1) / trained.sum(-1).clamp(min=1)).mean()


def _support(args: Any) -> dict[str, Any]:
    """TRL's `distillation_mode` in our words."""
    if args.distillation_mode == "full_logits":
        return {}
    if args.distillation_mode == "sampled_token":
        return {"support": "sampled"}
    if args.distillation_mode == "topk_logits" and args.distillation_topk is not None:
        return {
            "support": "topk", "top_k": args.distillation_topk,
            "top_k_tail": args.distillation_add_tail,
        }  # fmt: skip
    raise ValueError(
        f"distillation_mode={args.distillation_mode!r} with "
        f"distillation_topk={args.distillation_topk}: expected 'full_logits', 'sampled_token', or "
        "'topk_logits' with distillation_topk."
    )


def divergence(
    student: LMStates, teacher: LMStates, beta: float, **options: Any
) -> Tensor | DivergenceOutput:
    """`fused_linear_divergence` between two models' states; `beta` as TRL means it.

    Raises:
        ValueError: logit scales or soft caps of the two models differ.
    """
    one_scaling((student.logit_scale, student.softcap), (teacher.logit_scale, teacher.softcap))
    return fused_linear_divergence(
        student.hidden,
        **student.student_head(),
        teacher_hidden=teacher.hidden.detach(),
        teacher_weight=constant(teacher.weight, student.weight),
        teacher_bias=constant(teacher.bias, student.bias),
        **named_divergence(beta),
        **options,
    )


@contextmanager
def _set(trainer: Any, name: str, value: bool) -> Iterator[None]:
    before = getattr(trainer, name)
    setattr(trainer, name, value)
    try:
        yield
    finally:
        setattr(trainer, name, before)


MIXINS: dict[str, type[_Guarded]] = {
    "DistillationTrainer": _FusedDistillation,
    "GKDTrainer": _FusedGKD,
    "SDFTTrainer": _FusedSelfDistillation,
    "SDPOTrainer": _FusedSelfDistillation,
}
