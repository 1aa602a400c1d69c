"""Every setting of a run: its default, where the default comes from, and the values it may take.

Marks as in docs/method.md: [P] the paper or public notes on it, [L] its lineage's code, [D] our
decision. YAML recipes and command-line options fill the same fields; the docstring below a field
is its text in `--help`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, ConfigDict

PromptStyle = Literal["standard", "compact"]
Dtype = Literal["auto", "float32", "bfloat16"]
EnvOptions = dict[str, str | int | float | bool | None]

Count = Annotated[int, Gt(0)]
CountOrZero = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Gt(0), Le(1)]


class Settings:
    """Unknown fields, NaN and infinities are mistakes."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def _not_greedy(temperature: float) -> float:
    if temperature <= 0:
        raise ValueError("must be above 0: a greedy action has no probability to learn from")
    return temperature


def _inner_share(beta: float) -> float:
    if not 0 < beta < 1:
        raise ValueError(
            "must be in (0, 1): JSD tends to 0 at both ends; for the KL divergences set "
            "--loss.divergence forward_kl or reverse_kl"
        )
    return beta


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """The student."""

    path: str = "tiny-shop"
    """Folder or hub id of a transformers causal LM; `tiny-shop` is the shipped small agent."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:1, …"""
    dtype: Dtype = "auto"
    """Compute type; auto: bfloat16 on cuda, float32 on cpu. Trained weights stay in float32."""
    train_head: bool = True
    """Train the lm_head, and embeddings tied to it. False: teacher and student share the head."""
    lora_rank: CountOrZero = 0
    """Rank of LoRA adapters, which alone are trained (needs peft); 0 trains all weights."""
    lora_alpha: Count = 32
    """LoRA's alpha. [L]"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""


@dataclass(kw_only=True)
class EnvConfig(Settings):
    """The world."""

    name: str = "shop"
    """shop, or `module:Class` of your own (docs/environments.md)."""
    options: EnvOptions = field(default_factory=dict)
    """Constructor options of the environment, on top of those that a recipe gives it."""
    reward: Literal["score", "success"] = "score"
    """What training pays: the environment's own reward, or 1 for success and 0 for the rest. [D]"""


@dataclass(kw_only=True)
class RolloutConfig(Settings):
    """How the student acts while training."""

    tasks_per_update: Count = 32
    """Tasks drawn for one update. [L]"""
    group_size: Count = 1
    """Episodes of one task: 1 is enough for HERO [P]; GRPO needs more."""
    max_turns: Count = 15
    """Cap of turns per episode."""
    max_turn_tokens: Count = 512
    """Cap of tokens per turn."""
    max_episode_tokens: Count = 4096
    """Cap of the context: an episode that would pass it stops."""
    temperature: Annotated[float, AfterValidator(_not_greedy)] = 1.0
    """Sampling temperature [L]; log-probabilities are taken at it."""
    top_p: Share = 1.0
    """Nucleus sampling; 1.0 is off. [L]"""
    batch_size: Count = 64
    """Sequences decoded together."""


@dataclass(kw_only=True)
class ReflectionConfig(Settings):
    """Hindsight: who reads a finished episode and writes a diagnosis of each turn, in one call."""

    reflector: Literal["self", "teacher", "rules", "openai"] = "self"
    """The student's or teacher's weights, the environment's rules, or an OpenAI-like endpoint."""
    temperature: NotNegative = 0.7
    """Decoding temperature. [D]"""
    max_tokens: Count = 1024
    """Cap of one reflection."""
    retries: CountOrZero = 1
    """Further calls for a reflection of which nothing could be read."""
    max_observation_tokens: Count = 400
    """Observations are shortened to this, head and tail kept."""
    max_hint_tokens: CountOrZero = 96
    """A longer hint is dropped."""
    leak_filter: bool = True
    """Drop hints that name ids or numbers which could not be known at that turn."""
    shuffle_hints: bool = False
    """Control experiment: give every turn a hint of another task. It must lose the gain."""
    base_url: str = ""
    """openai: address of the endpoint."""
    model: str = ""
    """openai: model name at the endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """openai: environment variable that holds the key."""


@dataclass(kw_only=True)
class TeacherConfig(Settings):
    """Who scores the student's actions with hindsight, and what it sees."""

    weights: Literal["ema", "live", "frozen"] = "ema"
    """ema [L], live (the student itself) or frozen (as at the start): all trained weights."""
    update_rate: Share = 0.05
    """EMA rate r: teacher = (1-r) teacher + r student after each finite step. [L]"""
    observation: bool = True
    """Show the observation that followed the action. [P]"""
    reward: bool = True
    """Show the final reward. [P]"""
    diagnosis: bool = True
    """Show the turn's failure cause and hint. [P]"""
    corrected_action: bool = True
    """Show the corrected action. [D]"""
    max_observation_tokens: Count = 512
    """Observations are shortened to this, head and tail kept. [D]"""
    max_privileged_tokens: Count = 1024
    """Cap of the whole privileged context. [L]"""
    packing: Literal["tree", "separate"] = "tree"
    """tree: an episode in one pass, as a trunk with branches; separate: each turn is a row."""


@dataclass(kw_only=True)
class LossConfig(Settings):
    """Token-level divergence between student and teacher, and the policy-gradient term."""

    divergence: Literal["jsd", "reverse_kl", "forward_kl"] = "jsd"
    """Jensen-Shannon. [P]"""
    beta: Annotated[float, AfterValidator(_inner_share)] = 0.5
    """Teacher's share in JSD's mixture. [L]"""
    support: Literal["full", "topk"] = "full"
    """Whole vocabulary, or top-k with a tail bucket (SDPO). [D]"""
    top_k: Count = 100
    """k of support=topk. [L]"""
    is_clip: NotNegative = 2.0
    """Clip of the detached importance ratio; 0 switches the ratio off. [L]"""
    loss_aggregation: Literal["token", "turn", "trajectory"] = "token"
    """Mean over tokens; over turns of token means; over trajectories of turn means."""
    skip_first_token: bool = False
    """Leave out the first token of each action: its divergence can explode. [D]"""
    clip_low: NotNegative = 0.2
    """GRPO: lower clip. [L]"""
    clip_high: NotNegative = 0.28
    """GRPO: upper clip. [L]"""
    pg_weight: NotNegative = 1.0
    """hero+grpo: weight of the GRPO term."""
    impl: Literal["auto", "torch", "cpu", "cuda", "triton"] = "auto"
    """Implementation of the divergence (hero_kernels.explain tells which auto takes)."""


@dataclass(kw_only=True)
class OptimConfig(Settings):
    """AdamW."""

    learning_rate: Positive = 1e-6
    """Full fine-tuning 1e-6, LoRA 1e-4 … 3e-4 [L]; small models from scratch far more."""
    warmup_steps: CountOrZero = 10
    """Linear warm-up. [L]"""
    weight_decay: NotNegative = 0.0
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    max_grad_norm: Positive = 1.0
    """Clip of the gradient's norm. [L]"""
    minibatches: Count = 1
    """Optimiser steps a rollout batch is split into (by trajectories)."""
    inner_epochs: Count = 1
    """Passes over each rollout batch. [L]"""
    micro_batch_tokens: Count = 16384
    """Padded tokens in one forward pass. Gradients accumulate: results do not depend on it."""


@dataclass(kw_only=True)
class EvalConfig(Settings):
    """Held-out tasks."""

    every: Count = 5
    """Updates between evaluations on the dev split; the best checkpoint is chosen on it."""
    dev_tasks: Count = 50
    test_tasks: CountOrZero = 100
    """Tasks of the test split in the final table (before and after); 0 skips it."""
    trials: Count = 1
    """Episodes per task."""
    temperature: NotNegative = 1.0
    """Sampling temperature in evaluation; 0 is greedy."""
    min_teacher_lift: float | None = None
    """Stop before training unless the hinted teacher acts better than the student by this share.

    None only reports the lift: the share of right actions on turns with a hint, teacher minus
    student. Needs an environment that diagnoses."""
    stop_drop: NotNegative = 0.3
    """Collapse: dev success falls this far below its best twice in a row, or half as far with
    another sign (docs/method.md)."""
    rescues: CountOrZero = 2
    """Times that a collapsed run goes back to its best weights at half the rate; then it stops."""


@dataclass(kw_only=True)
class TrainConfig(Settings):
    """A training run."""

    mode: str = "hero"
    """What the teacher sees and which turns are trained: hero, grpo, ... (docs/method.md)."""
    prompts: PromptStyle = "standard"
    """Wording of what teachers and reflectors read: compact is for the shipped small model."""
    model: ModelConfig = field(default_factory=ModelConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reflection: ReflectionConfig = field(default_factory=ReflectionConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    updates: Count = 100
    """Rollout batches. [L]"""
    max_env_turns: Count | None = None
    """Budget of environment turns of the whole run, never exceeded; None for no limit."""
    seed: int = 0
    threads: Count | None = None
    """CPU threads; None leaves torch's default."""
    output_dir: str = ""
    """Folder of the run; "" makes runs/NAME-DATE."""
    resume: str = "never"
    """never, auto (go on if output_dir holds a checkpoint), or the folder of a run."""
    save_every: Count = 10
    """Updates between checkpoints for resuming; the last state is always saved."""
    save_trajectories: CountOrZero = 8
    """Trajectories of each update that are kept for `hero view`."""
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
    """Besides metrics.jsonl, which is always written."""


@dataclass(kw_only=True)
class ScratchConfig(Settings):
    """Shape of a small model made from nothing."""

    width: Count = 128
    layers: Count = 3
    heads: Count = 4
    context: Count = 1024
    init_std: Positive = 0.1
    """transformers' 0.02 is far too small at this width."""


@dataclass(kw_only=True)
class SftConfig(Settings):
    """A warm start."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(path=""))
    """The model to start from; path "" is a new one of `scratch`'s shape."""
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    prompts: PromptStyle = "standard"
    """Wording of what teachers and reflectors read."""
    max_turns: Count = 8
    """Cap of turns per episode."""
    demonstrator_episodes: CountOrZero = 1500
    """Episodes of the imperfect demonstrator: plain targets, and a part of the others."""
    coverage_episodes: CountOrZero = 1500
    """Near-perfect and noisy episodes: hindsight and diagnosis targets only."""
    coverage_noise: Annotated[list[Annotated[float, Ge(0), Le(1)]], MinLen(1)] = field(
        default_factory=lambda: [0.0, 0.15, 0.4]
    )
    """Share of random actions of the coverage episodes, in turn."""
    steps: Count = 3000
    """Optimiser steps."""
    batch_size: Count = 4
    """Episodes of each kind in a step."""
    learning_rate: Positive = 5e-3
    warmup_steps: CountOrZero = 50
    seed: int = 0
    threads: Count | None = None
    """CPU threads; None leaves torch's default."""
    output_dir: str = "models/sft"
    """New folder for model and tokenizer."""


URL_SECRETS = re.compile(
    r"(?<=://)[^/\s@]+(?=@)|(?<=[?&])((?:api_?|access_)?(?:key|token)=)[^&\s]+"
)
SECRET_NAME = re.compile(r"(^|_)(api_?key|key|token|password|secret)$", re.IGNORECASE)


def redacted(value: Any) -> Any:
    """What may be shown or stored of a text or of (nested) settings: passwords and keys are ***."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, str):
        return URL_SECRETS.sub(lambda match: f"{match[1] or ''}***", value)
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    if isinstance(value, dict):
        return {
            name: "***" if isinstance(item, str) and item and SECRET_NAME.search(name)
            else redacted(item)
            for name, item in value.items()
        }  # fmt: skip
    return value
