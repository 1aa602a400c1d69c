"""Every setting of a run, with its default and where the default comes from.

Marks as in docs/method.md: [P] the paper or public notes on it, [L] its lineage's code, [D] our
decision. A run is `TrainConfig`; YAML recipes and dotted command-line overrides fill the same
fields. Docstrings below fields become the text of `--help`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

STRICT = ConfigDict(extra="forbid", strict=False)

Mode = Literal[
    "hero", "env_only", "reflection_only", "terminal", "full_demo", "sdpo", "grpo", "hero+grpo"
]
EnvOption = str | int | float | bool | None


@dataclass(kw_only=True)
class ModelConfig:
    """The student."""

    __pydantic_config__ = STRICT
    path: str = "tiny-shop"
    """Folder or hub id of a transformers causal LM; `tiny-shop` is the shipped small agent."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:1, …"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; trained weights are always kept in float32. auto: bfloat16 on cuda, float32 on
    cpu."""
    train_head: bool = True
    """Train the lm_head (with tied embeddings: these too). False saves a quarter of the loss'
    GEMMs."""
    lora_rank: int = 0
    """0 trains all weights; > 0 trains LoRA adapters of this rank (needs peft) and freezes the
    rest."""
    lora_alpha: int = 32
    """LoRA's alpha. [L]"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""


@dataclass(kw_only=True)
class EnvConfig:
    """The world."""

    __pydantic_config__ = STRICT
    name: str = "shop"
    """shop, desk, or `package.module:Class` of your own (docs/environments.md)."""
    options: dict[str, EnvOption] = field(default_factory=dict)
    """Constructor options of the environment."""


@dataclass(kw_only=True)
class RolloutConfig:
    """How the student acts while training."""

    __pydantic_config__ = STRICT
    tasks_per_update: int = 32
    """Tasks drawn for one update. [L]"""
    group_size: int = 1
    """Episodes of one task: 1 is enough for HERO [P]; GRPO needs more."""
    max_turns: int = 15
    """Cap of turns an episode."""
    max_turn_tokens: int = 512
    """Cap of tokens a turn."""
    max_episode_tokens: int = 4096
    """Cap of the context: an episode that would pass it stops."""
    temperature: float = 1.0
    """Sampling temperature [L]; log-probabilities are taken at it."""
    top_p: float = 1.0
    """Nucleus sampling; 1.0 is off. [L]"""
    batch_size: int = 64
    """Sequences decoded together."""


@dataclass(kw_only=True)
class ReflectionConfig:
    """Hindsight: who reads the finished episode and writes a diagnosis of each turn. One call an
    episode."""

    __pydantic_config__ = STRICT
    reflector: Literal["self", "teacher", "rules", "openai"] = "self"
    """self: the student's weights now; teacher: the teacher's weights; rules: the environment's own
    diagnosis; openai: any OpenAI-compatible endpoint."""
    temperature: float = 0.7
    """Decoding temperature. [D]"""
    max_tokens: int = 1024
    """Cap of one reflection."""
    retries: int = 1
    """Further calls for a reflection of which nothing could be read."""
    max_observation_tokens: int = 400
    """Observations are shortened to this, head and tail kept."""
    max_hint_tokens: int = 96
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
class TeacherConfig:
    """Who scores the student's actions with hindsight, and what it sees."""

    __pydantic_config__ = STRICT
    weights: Literal["ema", "live", "frozen"] = "ema"
    """ema [L], live (the student itself) or frozen (the starting weights). The lm_head is the
    student's. [D]"""
    update_rate: float = 0.05
    """EMA rate r: teacher = (1-r) teacher + r student after each finite step. [L]"""
    observation: bool = True
    """Show the observation that followed the action. [P]"""
    reward: bool = True
    """Show the final reward. [P]"""
    diagnosis: bool = True
    """Show the turn's failure cause and hint. [P]"""
    corrected_action: bool = True
    """Show the corrected action. [D]"""
    max_observation_tokens: int = 512
    """Observations are shortened to this, head and tail kept. [D]"""
    max_privileged_tokens: int = 1024
    """Cap of the whole privileged context. [L]"""
    packing: Literal["tree", "separate"] = "tree"
    """tree: all turns of an episode in one forward pass, trunk once and a branch a turn; separate:
    a row a turn."""


@dataclass(kw_only=True)
class LossConfig:
    """Token-level divergence between student and teacher, and the policy-gradient term."""

    __pydantic_config__ = STRICT
    divergence: Literal["jsd", "reverse_kl", "forward_kl"] = "jsd"
    """Jensen-Shannon. [P]"""
    beta: float = 0.5
    """Teacher's share in JSD's mixture. [L]"""
    support: Literal["full", "topk"] = "full"
    """Whole vocabulary, or top-k with a tail bucket (SDPO). [D]"""
    top_k: int = 100
    """k of support=topk. [L]"""
    is_clip: float = 2.0
    """Clip of the detached importance ratio; 0 switches the ratio off. [L]"""
    loss_aggregation: Literal["token", "turn", "trajectory"] = "token"
    """Mean over tokens; over turns of token means; over trajectories of turn means."""
    skip_first_token: bool = False
    """Leave out the first token of each action, whose divergence can explode after the generation
    prompt. [D]"""
    clip_low: float = 0.2
    """GRPO: lower clip. [L]"""
    clip_high: float = 0.28
    """GRPO: upper clip. [L]"""
    pg_weight: float = 1.0
    """hero+grpo: weight of the GRPO term."""
    impl: Literal["auto", "torch", "cpu", "cuda", "triton"] = "auto"
    """Implementation of the divergence (hero_kernels.explain tells which auto takes)."""


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW."""

    __pydantic_config__ = STRICT
    learning_rate: float = 1e-6
    """Full fine-tuning 1e-6, LoRA 1e-4 … 3e-4 [L]; small models from scratch far more."""
    warmup_steps: int = 10
    """Linear warm-up. [L]"""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    """Clip of the gradient's norm. [L]"""
    minibatches: int = 1
    """Optimiser steps a rollout batch is split into (by trajectories)."""
    inner_epochs: int = 1
    """Passes over each rollout batch. [L]"""
    micro_batch_tokens: int = 16384
    """Padded tokens in one forward pass; gradients accumulate, with one denominator for the whole
    minibatch."""


@dataclass(kw_only=True)
class EvalConfig:
    """Held-out tasks."""

    __pydantic_config__ = STRICT
    every: int = 5
    """Updates between evaluations on the dev split; the best checkpoint is chosen on it."""
    dev_tasks: int = 50
    test_tasks: int = 100
    """Tasks of the test split in the final table (before and after); 0 skips it."""
    trials: int = 1
    """Episodes a task."""
    temperature: float = 1.0
    """Sampling temperature in evaluation; 0 is greedy."""
    min_teacher_lift: float | None = None
    """Gate: stop before training if the hinted teacher does not act better than the student by this
    much (share of right actions on turns with a hint); None only reports. Needs an environment that
    diagnoses."""
    stop_drop: float = 0.3
    """Stop when dev success falls this far below its best twice in a row (collapse)."""


@dataclass(kw_only=True)
class TrainConfig:
    """A training run."""

    __pydantic_config__ = STRICT
    mode: Mode = "hero"
    """Which method: they differ in what the teacher sees and which turns are trained
    (docs/method.md)."""
    prompts: Literal["standard", "compact"] = "standard"
    """Wording of teacher blocks and reflections: standard for language models, compact for the
    shipped small one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reflection: ReflectionConfig = field(default_factory=ReflectionConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    updates: int = 100
    """Rollout batches. [L]"""
    max_env_turns: int | None = None
    """Budget of environment turns of the whole run; training ends when it is used up."""
    seed: int = 0
    threads: int | None = None
    """CPU threads; None leaves torch's default."""
    output_dir: str = ""
    """Folder of the run; "" makes runs/NAME-DATE."""
    resume: str = "never"
    """never, auto (go on if output_dir holds a checkpoint), or the folder of a run."""
    save_every: int = 10
    """Updates between checkpoints for resuming; the last state is always saved."""
    save_trajectories: int = 8
    """Trajectories an update kept for `hero view`."""
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
    """Besides metrics.jsonl, which is always written."""


def check(config: TrainConfig) -> None:
    """Refuse settings that cannot mean what they say.

    Raises:
        ValueError: with what was got, what was expected and what to do.
    """
    positive = {
        "updates": config.updates,
        "rollout.tasks_per_update": config.rollout.tasks_per_update,
        "rollout.group_size": config.rollout.group_size,
        "rollout.max_turns": config.rollout.max_turns,
        "rollout.max_turn_tokens": config.rollout.max_turn_tokens,
        "rollout.batch_size": config.rollout.batch_size,
        "optim.minibatches": config.optim.minibatches,
        "optim.inner_epochs": config.optim.inner_epochs,
        "optim.micro_batch_tokens": config.optim.micro_batch_tokens,
        "optim.learning_rate": config.optim.learning_rate,
        "eval.every": config.eval.every,
        "eval.dev_tasks": config.eval.dev_tasks,
        "eval.trials": config.eval.trials,
        "save_every": config.save_every,
        "optim.max_grad_norm": config.optim.max_grad_norm,
        "reflection.max_tokens": config.reflection.max_tokens,
        "threads": 1 if config.threads is None else config.threads,
    }
    for name, value in positive.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    not_negative = {
        "model.lora_rank": config.model.lora_rank,
        "reflection.temperature": config.reflection.temperature,
        "reflection.retries": config.reflection.retries,
        "loss.is_clip": config.loss.is_clip,
        "eval.temperature": config.eval.temperature,
        "eval.test_tasks": config.eval.test_tasks,
    }
    for name, value in not_negative.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}.")
    if config.optim.minibatches > config.rollout.tasks_per_update * config.rollout.group_size:
        raise ValueError(
            f"optim.minibatches={config.optim.minibatches} is more than the trajectories of an "
            "update "
            f"({config.rollout.tasks_per_update} tasks x {config.rollout.group_size})."
        )
    if config.rollout.temperature <= 0:
        raise ValueError(
            f"rollout.temperature must be above 0 in training, got {config.rollout.temperature}: "
            "greedy actions have no log-probability to correct for."
        )
    if not 0 < config.rollout.top_p <= 1:
        raise ValueError(f"rollout.top_p must be in (0, 1], got {config.rollout.top_p}.")
    if not 0 < config.teacher.update_rate <= 1:
        raise ValueError(
            f"teacher.update_rate must be in (0, 1], got {config.teacher.update_rate}."
        )
    if not 0 < config.loss.beta < 1:
        raise ValueError(
            f"loss.beta must be in (0, 1), got {config.loss.beta}: JSD tends to 0 at both ends. "
            "For the KL divergences set --loss.divergence forward_kl or reverse_kl."
        )
    if config.reflection.reflector == "openai" and not (
        config.reflection.base_url and config.reflection.model
    ):
        raise ValueError(
            "reflection.reflector=openai needs reflection.base_url and reflection.model."
        )
    if config.resume not in ("never", "auto") and not Path(config.resume).is_dir():
        raise ValueError(
            f"resume must be 'never', 'auto' or the folder of a run, got {config.resume!r}."
        )


def from_dict(data: dict[str, Any], cls: type = TrainConfig) -> Any:
    """Build a config from nested dictionaries.

    Raises:
        ValueError: unknown fields or wrong types, each on a line with the fields that exist.
    """
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"]) or "config"
            if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
                known = ", ".join(_known_fields(cls, item["loc"][:-1]))
                lines.append(f"  {where}: unknown field; known here: {known}")
            else:
                lines.append(f"  {where}: {item['msg']}, got {item['input']!r}")
        raise ValueError("The configuration has mistakes:\n" + "\n".join(lines)) from None


def _known_fields(cls: Any, location: tuple[int | str, ...]) -> list[str]:
    instance: Any = cls()
    for part in location:
        instance = getattr(instance, str(part))
    return sorted(vars(instance)) if is_dataclass(instance) else []


RECIPES = Path(__file__).parent / "recipes"
RECIPE_KINDS = ("train", "sft")


def recipe_names(kind: str = "train") -> list[str]:
    return sorted(path.stem for path in (RECIPES / kind).glob("*.yaml"))


def recipe_summary(name: str, kind: str = "train") -> str:
    """The recipe's first line, a comment that says what it is for."""
    first = (RECIPES / kind / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ")


def load_recipe(name: str, kind: str = "train") -> dict[str, Any]:
    """The nested dictionary of a shipped recipe; `base: NAME` in it names the recipe it changes.

    Raises:
        ValueError: no recipe of that name.
    """
    path = RECIPES / kind / f"{name}.yaml"
    if name not in recipe_names(kind):
        raise ValueError(
            f"Unknown recipe {name!r}: expected one of {', '.join(recipe_names(kind))}; your own "
            "file goes "
            "with --config FILE."
        )
    return _with_base(read_yaml(path), kind)


def _with_base(data: dict[str, Any], kind: str) -> dict[str, Any]:
    base = data.pop("base", None)
    return merge(load_recipe(base, kind), data) if base else data


def load_config_file(path: str | Path, kind: str = "train") -> dict[str, Any]:
    """A user's YAML file; `base: RECIPE` in it names the recipe it changes."""
    return _with_base(read_yaml(path), kind)


def read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(data).__name__}.")
    return data


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, nested."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`."""
    return asdict(config)
