"""What a run will take of a device's memory, before anything is loaded: `hero memory`.

Sizes come from the model's configuration, on torch's meta device, and from the settings. Counted is
the worst case of the settings: full batches of episodes at their caps. Not counted are the context
of the driver, fragments of the allocator, fp32 weights while they are read, and vLLM, which takes
`engine.memory_share` of the GPU. Pages of moments count as in main memory, where they are if need
be; that compiled layers keep less is left out.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hero.config import TrainConfig
from hero.models import existing_model
from hero.policy import Policy, resolve_dtype
from hero.sampler import READ_TOKENS
from hero.weights import MOMENTS, WEIGHT
from hero_kernels.memory import Shape, default_rows, workspace

KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-4B-Instruct-2507": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
        "max_position_embeddings": 262144,
    },
}  # fmt: skip
"""Shapes of the recipes' models, as their hub pages have them, for machines that reach no hub."""
PROBED = 257
"""Tokens of the pass that counts activations: a prime, which no width of a model is."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by component."""

    always: dict[str, int]
    rollout: dict[str, int]
    """On top while episodes are played and read."""
    training: dict[str, int]
    """On top while micro-batches are learnt from."""

    @property
    def peak(self) -> int:
        phases = (sum(self.rollout.values()), sum(self.training.values()))
        return sum(self.always.values()) + max(phases)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model is made of."""

    parameters: int
    head: int
    """Parameters of the head, those of a tied embedding."""
    linears: tuple[tuple[int, int], ...]
    """Inputs and outputs of the linear layers but the head, which LoRA adapts."""
    hidden: int
    vocab: int
    layers: int
    kv_heads: int
    head_size: int
    saved: int
    """Numbers that autograd keeps of a token in one layer."""


@cache
def sizes(path: str) -> Sizes:
    """Of a model by folder, shipped name or hub id; nothing is loaded but its configuration.

    Raises:
        ValueError: there is no configuration.
    """
    known = dict(KNOWN.get(path, {}))
    try:
        if known:
            return sizes_of(AutoConfig.for_model(known.pop("model_type"), **known))
        return sizes_of(AutoConfig.from_pretrained(existing_model(path)))
    except Exception as error:  # hub, file and config errors of many classes
        said = str(error).strip().splitlines()[0]
        raise ValueError(f"Cannot read the configuration of {path!r}: {said}") from error


def sizes_of(config: Any) -> Sizes:
    """Of the model that a transformers configuration describes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    text, head = config.get_text_config(), model.get_output_embeddings()
    inner = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    heads = text.num_attention_heads
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()), head=head.weight.numel(),
        linears=tuple((linear.in_features, linear.out_features) for linear in inner),
        hidden=text.hidden_size, vocab=head.weight.shape[0], layers=text.num_hidden_layers,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        saved=saved_numbers(model) // PROBED // text.num_hidden_layers,
    )  # fmt: skip


def saved_numbers(model: Any) -> int:
    """Numbers that autograd keeps of a pass of `PROBED` tokens, without weights and attention maps.

    Fused attention keeps no maps; on the meta device the plain one runs.
    """
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        is_map = tensor.shape[-2:] == (PROBED, PROBED)
        if tensor.untyped_storage()._cdata not in weights and not is_map:
            found[tensor.untyped_storage()._cdata] = tensor.numel()
            kept.append(tensor)
        return tensor

    kept: list[torch.Tensor] = []  # alive, so that no address is used twice
    ids = torch.zeros(1, PROBED, dtype=torch.long, device=model.device)
    sees = torch.ones(1, 1, PROBED, PROBED, dtype=torch.bool, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.get_decoder()(input_ids=ids, attention_mask=sees, use_cache=False)
    del output
    return sum(found.values())


def predict(
    config: TrainConfig, device: str, student: Sizes | None = None, processes: int = 1
) -> Memory:
    """Of a run with these settings on a device, and on each one of several processes.

    Args:
        config: of the run.
        device: cpu, cuda, …
        student: of the model, if it is not the one that the settings name.
        processes: that share weights, moments and teacher in shards (hero/shards.py).

    Raises:
        ValueError: the model's configuration cannot be read.
    """
    model, size = config.model, student or sizes(config.model.path)
    wide, item = 4, resolve_dtype(model.dtype, torch.device(device)).itemsize
    adapted = model.lora_rank * sum(a + b for a, b in size.linears)
    trained = adapted or size.parameters - (0 if model.train_head else size.head)
    frozen = size.parameters - (0 if adapted else trained)
    has_head = not adapted and model.train_head
    in_4_bits = sum(a * b for a, b in size.linears) if model.quantize == "4bit" and adapted else 0
    copies = 0 if config.teacher.offload else trained * wide
    always = {
        "frozen weights": (frozen - in_4_bits) * item + int(in_4_bits * WEIGHT),
        "weights of a layer out of 4 bits": bool(in_4_bits) * item
        * max((a * b for a, b in size.linears), default=0),
        "trained weights": trained * wide,
        "trained weights to compute with": trained * item * model.master_weights,
        "AdamW": int(trained * MOMENTS[config.optim.kind]),
        "teacher": sizes(config.teacher.path).parameters * item if config.teacher.path
        else 0 if config.teacher.weights == "live" else copies,
        "weights at the start, average": copies
        * (bool(config.loss.kl_to_start) + (config.eval.select == "averaged")),
        "the engine's copy": (frozen + trained) * item * (config.engine.kind == "transformers"),
    }  # fmt: skip
    always = {name: -(-number // processes) for name, number in always.items()}
    if several := processes > 1:
        always["weights gathered for passes"] = (frozen + trained) * item
        if config.teacher.path:
            always["teacher gathered for passes"] = sizes(config.teacher.path).parameters * item
    return Memory(
        always={name: number for name, number in always.items() if number},
        rollout={
            **({"teacher while it reads": trained * wide} if _is_fetched(config) else {}),
            **_rollout(config, size, item),
        },
        training={
            "gradients": trained * wide,
            **({"gradients summed": -(-trained * wide // processes)} if several else {}),
            **({} if adapted or several or item == wide or model.master_weights
               else {"weights cast for a pass": trained * item}),
            **_learning(config, size, device, item, has_head),
        },
    )  # fmt: skip


def _is_fetched(config: TrainConfig) -> bool:
    """Whether the teacher comes to the GPU to write; what it scores comes before gradients."""
    writes = config.reflection.reflector == "teacher" or config.eval.watch_teacher
    return config.teacher.offload and writes and not config.model.master_weights


def _rollout(config: TrainConfig, size: Sizes, item: int) -> dict[str, int]:
    rollout = config.rollout
    of_token = 2 * size.kv_heads * size.head_size * item
    columns = rollout.batch_size * rollout.max_episode_tokens
    return {
        # The cache grows by half when it is full (hero/kvcache.py).
        "key-value cache": columns * size.layers * of_token * 3 // 2,
        "reading prompts": READ_TOKENS * size.saved * item,
        "logits": 3 * rollout.batch_size * size.vocab * 4,
    }  # fmt: skip


def _learning(
    config: TrainConfig, size: Sizes, device: str, item: int, has_head: bool
) -> dict[str, int]:
    rollout, optim = config.rollout, config.optim
    tokens = max(optim.micro_batch_tokens, rollout.max_episode_tokens)
    episodes = max(1, tokens // rollout.max_episode_tokens)
    actions = min(tokens, episodes * rollout.max_turns * rollout.max_turn_tokens)
    in_layer, residual = size.saved * item, item
    if rank := config.model.lora_rank:
        in_layer += sum(a + rank for a, _ in size.linears) // size.layers * item
    elif item == 2 and not config.model.master_weights:
        in_layer, residual = in_layer * 4 // 3, 4  # autocast leaves norms and the stream in float32
    layers = size.hidden * residual * size.layers if config.model.gradient_checkpointing else 0
    shared = config.teacher.weights == "live" or not has_head
    shape = Shape(
        actions, size.hidden, size.vocab, torch.bfloat16 if item == 2 else torch.float32, device,
        shared and not config.teacher.path, True, has_head, False,
    )  # fmt: skip
    of_head = 2 * size.head * item if has_head else 0  # the head cast, and its gradient
    return {
        "activations": tokens * (layers + in_layer if layers else size.layers * in_layer),
        "gradients of a layer, the teacher's pass": tokens * in_layer,
        "divergence": workspace(shape, default_rows(device, size.vocab), 0, False)
        + 4 * actions * size.hidden * item + of_head,
    }  # fmt: skip


def beside_measured(config: TrainConfig, policy: Policy) -> str:
    """A line on the peak of a run that has ended: as predicted and as measured."""
    if policy.device.type == "cuda":
        number, what = torch.cuda.max_memory_allocated(policy.device), "allocated on the GPU"
    else:
        number = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        what = "of the whole process, libraries included"
    measured = f"{number / GIB:.2f} GiB measured, {what}"
    try:
        size, processes = sizes_of(policy.model.config), policy.shards.ranks.size
        found = predict(config, str(policy.device), size, processes)
    except Exception as error:  # an architecture that cannot be built on the meta device
        return f"Memory: {measured}; none predicted for this model: {error}"
    return f"Memory: {found.peak / GIB:.2f} GiB predicted at most; {measured}."


Change = tuple[str, Callable[[TrainConfig], TrainConfig | None]]


def _changed(part: str, name: str, new: Callable[[Any], Any]) -> Callable[[TrainConfig], Any]:
    def apply(config: TrainConfig) -> TrainConfig | None:
        settings = getattr(config, part)
        value = new(getattr(settings, name))
        if value == getattr(settings, name):
            return None
        return replace(config, **{part: replace(settings, **{name: value})})

    return apply


SWITCHES: tuple[Change, ...] = (
    ("--model.gradient-checkpointing", _changed("model", "gradient_checkpointing", lambda _: True)),
    ("--rollout.batch-size {}", _changed("rollout", "batch_size", lambda n: max(1, n // 2))),
    ("--optim.micro-batch-tokens {}",
     _changed("optim", "micro_batch_tokens", lambda n: max(1024, n // 2))),
    ("--teacher.offload", _changed("teacher", "offload", lambda _: True)),
    ("--optim.kind paged_adamw", _changed("optim", "kind", lambda _: "paged_adamw")),
    ("--model.lora-rank 16", _changed("model", "lora_rank", lambda rank: rank or 16)),
    ("--model.quantize 4bit", _changed("model", "quantize", lambda _: "4bit")),
)  # fmt: skip
"""What saves memory and leaves the method alone, first what costs least; the last two change what
is trained."""
ALONE = ("--teacher.offload", "--optim.kind", "--model.quantize")
"""Those of one process."""


def advice(
    config: TrainConfig, device: str, limit: int, processes: int = 1
) -> tuple[list[str], int]:
    """Options that make a run fit `limit` bytes, or as much as they can, and its peak with them."""
    said: dict[str, str] = {}
    peak, went_on = predict(config, device, None, processes).peak, True
    while peak > limit and went_on:
        went_on = False
        for option, change in SWITCHES:
            changed = None if processes > 1 and option.startswith(ALONE) else change(config)
            less = predict(changed, device, None, processes).peak if changed else peak
            if changed and less < peak:
                number = changed.rollout.batch_size
                if "micro" in option:
                    number = changed.optim.micro_batch_tokens
                said[option] = option.format(number)
                config, peak, went_on = changed, less, True
                break
    return list(said.values()), peak
