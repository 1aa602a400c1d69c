"""The groups of settings of a run, one for each stage.

Marks as in docs/method.md: [P] the paper or public notes on it, [L] its lineage's code, [D] our
decision. The docstring below a field is its text in `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from hero.config.kinds import (
    Chance,
    Count,
    CountOrZero,
    Dtype,
    EnvOptions,
    InnerShare,
    NotNegative,
    Positive,
    Settings,
    Share,
    Shuffle,
    Temperature,
)


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """The student."""

    path: str = "tiny-shop"
    """Folder or hub id of a transformers causal LM; `tiny-shop` is the shipped small agent."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:1, …; under a launcher cuda is a GPU for each
    process."""
    dtype: Dtype = "auto"
    """Compute type; auto: bfloat16 on cuda, float32 on cpu. Trained weights stay in float32."""
    master_weights: bool = False
    """Compute with trained weights in the compute type; the optimiser keeps and changes float32
    copies. Without, each pass casts them: a decoded token then moves four times as many bytes."""
    train_head: bool = True
    """Train the lm_head, and embeddings tied to it. False: teacher and student share the head."""
    lora_rank: CountOrZero = 0
    """Rank of LoRA adapters, which alone are trained (needs peft); 0 trains all weights."""
    lora_alpha: Count = 32
    """LoRA's alpha. [L]"""
    quantize: Literal["none", "4bit"] = "none"
    """4bit: the layers under LoRA in NF4, scales quantised too (QLoRA; needs bitsandbytes)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compile: bool = False
    """Learn with layers by torch.compile; sampling stays as it is."""


@dataclass(kw_only=True)
class EnvConfig(Settings):
    """The world."""

    name: str = "shop"
    """A name that `hero envs` lists, or `module:Class` of your own (docs/environments.md)."""
    options: EnvOptions = field(default_factory=dict)
    """Options of the environment, on top of those of the recipe: `--env.options.NAME VALUE`, or
    pairs of NAME and VALUE; `--env.options` alone drops the recipe's."""
    reward: Literal["score", "success", "failure"] = "score"
    """What training pays: the environment's own reward, or 1 for success and 0 for the rest. [D]
    failure is a control: 0 for success and 1 for the rest."""
    workers: Literal["auto", "inline", "threads", "processes"] = "auto"
    """Who runs it; auto: what the environment says (`workers`), else threads. Inline takes one step
    at a time. A process is replaced when it dies, a thread cannot be stopped. [D]"""
    demonstrations: CountOrZero = 0
    """Worked episodes of the first training tasks, as chat turns before each task. Needs an oracle.

    They stand in the context of student and teacher, and these tasks are not trained on. [D]"""


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
    temperature: Temperature = 1.0
    """Sampling temperature [L]; log-probabilities are taken at it."""
    top_p: Share = 1.0
    """Nucleus sampling; 1.0 is off. [L]"""
    batch_size: Count = 64
    """Sequences decoded together, and environments; of each process."""
    step_timeout: Positive = 300.0
    """Seconds in which an environment must answer; else its episode ends with `env_error`. [D]"""
    max_env_errors: Chance = 0.5
    """The run stops if a larger share of a batch of episodes ends with `env_error`. [D]"""


@dataclass(kw_only=True)
class EngineConfig(Settings):
    """Who computes what the student samples while it trains (docs/integrations.md)."""

    kind: Literal["hero", "transformers", "vllm", "server"] = "hero"
    """hero: the weights that are trained, with kept caches; transformers: its continuous batching;
    vllm: in this process, asleep while the student learns; server: a vLLM server. [D]"""
    max_drift: Positive = 0.1
    """Stop if log-probabilities of sampler and trainer differ by more nats, on average. [D]"""
    base_url: str = ""
    """server: address of its OpenAI protocol, such as http://localhost:8000/v1."""
    model: str = ""
    """server: the model's name there; "" is the one that it serves."""
    api_key_env: str = "VLLM_API_KEY"
    """server: environment variable that holds the key."""
    timeout: Positive = 600.0
    """server: seconds for one answer, retries included."""
    memory_share: Share = 0.3
    """vllm: share of the GPU's memory for its weights, keys and values."""
    weights_dir: str = ""
    """vllm, server: folder through which weights are handed over, which a server must read at the
    same path; "" is a temporary one."""


@dataclass(kw_only=True)
class ReflectionConfig(Settings):
    """Hindsight: who reads a finished episode and diagnoses its turns, in one call."""

    reflector: Literal["self", "teacher", "rules", "openai"] = "self"
    """The student's or teacher's weights, the environment's rules, or an OpenAI-like endpoint."""
    episodes: Literal["all", "imperfect"] = "all"
    """imperfect: a model does not read episodes with success, reward 1 and no refused turn. [D]"""
    temperature: NotNegative = 0.7
    """Decoding temperature. [D]"""
    max_tokens: Count = 1024
    """Cap of one reflection."""
    retries: CountOrZero = 1
    """Further calls for a reflection of which nothing could be read."""
    max_observation_tokens: Count = 400
    """Observations are shortened to this, head and tail kept."""
    votes: Count = 1
    """Reflections of each episode: hint and corrected action are kept if half of them agree. [D]"""
    verify: bool = False
    """Try corrected actions in the restored state; mask turns where they fail. [D]"""
    min_agreement: Chance | None = None
    """Stop if the reflector agrees less than this with the rules, or without them with itself.

    Measured every `eval.every` updates: `agreement/recall`, or `agreement/consistency`, which costs
    a second reflection of the update's episodes. None only logs the former. [D]"""
    max_hint_tokens: CountOrZero = 96
    """A longer hint is dropped."""
    leak_filter: bool = True
    """Drop hints that name ids or numbers which could not be known at that turn."""
    shuffle_hints: Shuffle = "off"
    """Control experiment, which must lose the gain: give every flagged turn a hint of another task
    (tasks), of another task and cause (causes), or another task's instruction (unrelated)."""
    base_url: str = ""
    """openai: address of the endpoint."""
    model: str = ""
    """openai: model name at the endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """openai: environment variable that holds the key."""


@dataclass(kw_only=True)
class TeacherConfig(Settings):
    """Who scores the student's actions with hindsight, and what it sees."""

    path: str = ""
    """Another, larger model with the same vocabulary as teacher; "" is the student's own. [D]"""
    weights: Literal["ema", "live", "frozen"] = "frozen"
    """ema [L], live (the student itself) or frozen (as at the start): all trained weights. [D]

    docs/results.md has why: on the tiny desk an ema lost what had been learnt."""
    update_rate: Share = 0.05
    """EMA rate r: teacher = (1-r) teacher + r student after each finite step. [L]"""
    offload: bool = False
    """Keep the teacher's copy in main memory; it is on the GPU while it scores, once a step, where
    gradients are later. The copies of kl_to_start and eval.select=averaged likewise."""
    refresh: Literal["never", "gated"] = "never"
    """gated: copy the student to a frozen teacher when dev success has risen beyond noise. [L]"""
    observation: bool = True
    """Show the observation that followed the action. [P]"""
    look_ahead: Count = 1
    """Turns whose observations are shown: the next one alone [P], or what came later too. [D]"""
    reward: bool = True
    """Show the final reward. [P]"""
    diagnosis: bool = True
    """Show what the turn's diagnosis says, and its hint. [P]"""
    corrected_action: bool = True
    """Show the corrected action. [D]"""
    max_observation_tokens: Count = 512
    """Observations are shortened to this, head and tail kept. [D]"""
    max_privileged_tokens: Count = 1024
    """Cap of the whole privileged context. [L]"""


@dataclass(kw_only=True)
class LossConfig(Settings):
    """Token-level divergence between student and teacher, and the policy-gradient term."""

    divergence: Literal["jsd", "reverse_kl", "forward_kl"] = "jsd"
    """Jensen-Shannon. [P]"""
    beta: InnerShare = 0.5
    """Teacher's share in JSD's mixture. [L]"""
    support: Literal["full", "topk"] = "full"
    """Whole vocabulary, or top-k with a tail bucket (SDPO). [D]"""
    top_k: Count = 100
    """k of support=topk. [L]"""
    is_clip: NotNegative = 2.0
    """Clip of the detached importance ratio; 0 switches the ratio off. [L]"""
    loss_aggregation: Literal["token", "turn", "trajectory"] = "token"
    """Mean over tokens; over turns of token means; over trajectories of turn means."""
    turns: Literal["hinted", "from_first_fault", "all"] = "all"
    """hero: clean turns trained beside those with a hint: none [P], those after the first, all. [D]

    docs/results.md has why: from 30 to 58 % on the shop's rarest start."""
    clean_turn_weight: Share = 1.0
    """Weight of these clean turns, whose teacher sees observation and reward. [D]"""
    observation_weight: NotNegative = 0.0
    """λ of the cross-entropy of the observations that followed; 0.05 to 0.2 in ECHO. [L]"""
    kl_to_start: NotNegative = 0.0
    """Weight of KL(student, starting weights) on the actions of all turns. [D]"""
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

    kind: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """8bit: moments in 8 bits; paged: in main memory where the GPU is full (bitsandbytes)."""
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
    """Tokens in one forward pass. Gradients accumulate: results do not depend on it."""


@dataclass(kw_only=True)
class EvalConfig(Settings):
    """Held-out tasks."""

    every: Count = 5
    """Updates between evaluations on the dev split."""
    select: Literal["best", "last", "averaged"] = "best"
    """Weights that the run ends with: best on dev, the last, or an average of the last ones.

    Both the last and the selected ones are played on the test split. [D]"""
    dev_tasks: Count = 100
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
    watch_teacher: bool = False
    """Measure the lift at every evaluation, not only before training.

    Costs a reflection of the dev episodes and two answers to at most 128 of their turns. [D]"""
    stop_drop: NotNegative = 0.3
    """Collapse: dev success falls this far below its best twice in a row, or half as far with
    another sign (docs/method.md). 1 or more: a run is never taken for collapsed."""
    rescues: CountOrZero = 2
    """Times that a collapsed run goes back to its best weights at half the rate; then it stops."""
