"""The student: a transformers causal LM as trunk and head, so that logits are never held whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hero import attention
from hero.checkpoint import BrokenCheckpoint
from hero.config import ModelConfig
from hero.models import cannot_load, existing_model
from hero.ranks import Ranks
from hero.renderer import Renderer
from hero.shards import Mastered, Sharded, Unsharded, fill
from hero.weights import add_lora, check_types, digest_of_frozen, in_4_bits, keep_gradients
from hero_kernels import linear_logprobs
from hero_kernels.integrations.transformers import logit_transform


class Policy:
    """Model, tokenizer and renderer, with the few operations that training needs.

    Trained weights are float32; forward passes run in the compute type (autocast).
    """

    shards = Unsharded()
    """How the weights lie on several processes, or in two types."""
    compiles = False
    """Whether what is learnt passes layers whose parts are compiled."""
    _learns = False

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: ModelConfig) -> None:
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.adapter: Any = None
        self.version = 0
        """Of the trained weights: whoever changes them for good counts it up."""
        check_types(model, config, self.dtype)
        if config.lora_rank > 0:
            if getattr(model, "_hf_peft_config_loaded", False):
                raise ValueError(
                    f"{config.path!r} is a LoRA adapter already, and another one would replace it. "
                    "Merge it into its base model first: hero merge RUN --output DIR."
                )
            self.adapter = add_lora(model, config)
        if model.config._attn_implementation == "sdpa":
            attention.use(model)
        self.model = model.to(self.device)  # type: ignore[arg-type]
        self.model.eval()  # no dropout: student and sampler must be one distribution
        if config.quantize == "4bit":
            keep_gradients(self.model)
        if not config.train_head:
            self.head.requires_grad_(False)
        self.fixed = digest_of_frozen(self.model, tokenizer)
        """Of what training leaves as it is; a checkpoint goes with no other."""
        for parameter in self.model.parameters():
            if parameter.is_floating_point():  # else four bits
                parameter.data = parameter.data.to(
                    torch.float32 if parameter.requires_grad else self.dtype
                )
        if config.master_weights:
            self.shards = Mastered(self)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._check_head(config.path)
        if config.compile:
            self._compile(config.path)

    @classmethod
    def load(cls, config: ModelConfig) -> Policy:
        """Load a folder, a shipped name or a hub id.

        Raises:
            ValueError: no such model, or no causal LM with tokenizer and chat template.
        """
        path = existing_model(config.path)
        how: dict[str, Any] = {"dtype": torch.float32}
        if config.quantize == "4bit":
            device = resolve_device(config.device)
            how = in_4_bits(config, device, resolve_dtype(config.dtype, device))
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", **how)
        except Exception as error:  # hub, file, format and config errors of many classes
            raise cannot_load(config.path, error) from error
        return cls(model, tokenizer, config)

    @property
    def head(self) -> nn.Linear:
        """The lm_head; its weight is [V, H]."""
        return self.model.get_output_embeddings()  # type: ignore[return-value]

    @property
    def head_weight(self) -> Tensor:
        """The lm_head's weight in the compute type, differentiable, [V, H]."""
        return self.head.weight.to(self.dtype)

    @property
    def head_options(self) -> dict[str, Any]:
        """What stands between the head's output and the logits: arguments of hero_kernels."""
        return logit_transform(self.model.config)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def trunk(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Last hidden states [B, T, H] of ids [B, T], in the compute type."""
        # What samples has a new shape with each token.
        eager = self.compiles and not self._learns
        stance = torch.compiler.set_stance("force_eager") if eager else nullcontext()
        with self.autocast(), stance:
            states: Tensor = self.model.get_decoder()(input_ids=input_ids, **inputs)[0]
        return states.to(self.dtype)

    def hidden(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """What `trunk` returns, without a cache."""
        return self.trunk(input_ids, use_cache=False, **inputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of hidden states [..., H]: for sampling, a few rows at a time."""
        bias = self.head.bias
        logits = nn.functional.linear(
            hidden, self.head_weight, None if bias is None else bias.to(self.dtype)
        ).float()
        logits = logits * self.head_options["logit_scale"]
        if cap := self.head_options["softcap"]:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def logprobs(
        self, hidden: Tensor, ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N] of ids [N] after states [N, H], and the entropies [N], in nats."""
        result = linear_logprobs(
            hidden, self.head_weight, ids, bias=self.head.bias, temperature=temperature,
            return_entropy=True, **self.head_options,
        )  # fmt: skip
        assert isinstance(result, tuple)
        return result

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, in float32; of several processes, this one's shards."""
        return self.shards.trained(self.model)

    def to_train(self) -> list[nn.Parameter]:
        """Trained parameters, at least one.

        Raises:
            ValueError: there are none, as in a LoRA adapter that was loaded to be played.
        """
        if found := list(self.trainable().values()):
            return found
        raise ValueError(
            f"{self.model.config.name_or_path!r} has no weight that is trained. A LoRA adapter is "
            "first merged into its base model (hero merge RUN --output DIR); its own run goes on "
            "with hero train --resume RUN."
        )

    @property
    def context(self) -> int:
        """Longest sequence the model was made for; unbounded if its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", 0) or 2**31

    def sees_all(self, length: int) -> bool:
        """Whether every layer attends to all of a sequence of this length.

        Packed rows bring a mask of their own, which a sliding window or a recurrent layer ignores.
        """
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            window = None
        kinds = set(getattr(config, "layer_types", None) or ())
        return kinds <= {"full_attention", "sliding_attention"} and not (window and length > window)

    def takes_spans(self, length: int) -> bool:
        """Whether rows can be computed in one sequence, tokens that see up to so many others."""
        return not self.unpacked(length)

    def unpacked(self, length: int) -> str:
        """Why rows are computed one by one if tokens see so many others; "" if they are not."""
        kind, family = self.model.config._attn_implementation, type(self.model).__name__
        if kind == "sdpa":
            return f"{family} has an attention of its own"
        if kind != attention.NAME:
            return f"attention {kind!r} cannot be told who sees what, 'sdpa' can"
        if not self.sees_all(length):
            return f"it has layers that do not see all of {length} tokens"
        return "" if self._spans_are_right else f"{family} makes its own masks"

    @cached_property
    @torch.no_grad()
    def _spans_are_right(self) -> bool:
        """Whether this family hands the mask to its attention as it is: tried on six tokens."""
        ids = torch.arange(6, device=self.device)[None]
        spans = [attention.Span(0, 0, 0, 4), attention.Span(0, 2, 4, 6)]
        alone = self.hidden(ids[:, [0, 1, 4, 5]])[:, 2:]
        try:
            together = self.hidden(
                ids, position_ids=torch.tensor([[0, 1, 2, 3, 2, 3]], device=self.device),
                attention_mask=attention.as_mask(spans),
            )[:, 4:]  # fmt: skip
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        return bool((together - alone).abs().max() <= 0.05 * alone.abs().max())

    def take_over(self, weights: dict[str, Tensor], run: Path) -> None:
        """Overwrite the trained weights by those of a checkpoint of `run`."""
        trainable = self.trainable()
        shapes = {name: value.shape for name, value in weights.items()}
        if shapes != {name: value.shape for name, value in trainable.items()}:
            raise BrokenCheckpoint(
                f"The checkpoint of {run} has other trained weights than this configuration: "
                "resume with the settings in its config.json."
            )
        with self.shards.resharded():
            for name, value in weights.items():
                fill(trainable[name], value)
        self.version += 1

    def _layers(self) -> list[GradientCheckpointingLayer]:
        return [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]

    def _compile(self, path: str) -> None:
        # Not whole layers: of one that checkpoints and breaks the graph nothing is compiled.
        for part in [part for layer in self._layers() for part in layer.children()]:
            part.compile(dynamic=True)
            self.compiles = True
        if not self.compiles:
            raise ValueError(
                f"model.compile finds no layer that it knows in {path!r}: leave it out."
            )

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Within, layers recompute activations if `gradient_checkpointing` is on, and are compiled
        if `compile` is.

        Only then: transformers drops the key-value cache of layers in this state, which samplers
        need. Only layers have the flag, so dropout stays off.
        """
        layers, self._learns = self._layers(), True
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            self._learns = False
            for layer in layers:
                layer.training = False

    @torch.no_grad()
    def _check_head(self, path: str) -> None:
        """Refuse a model whose logits are not what trunk, head and `head_options` give."""
        ids = torch.arange(min(8, self.head.weight.shape[0]), device=self.device)[None]
        with self.autocast():
            expected = self.model(input_ids=ids).logits.float()
        error = (expected - self.logits(self.hidden(ids))).abs().max()
        if not float(error) <= 0.05 * float(expected.abs().max()) + 1e-6:  # nor if it is NaN
            raise ValueError(
                f"{path!r} computes its logits in a way that is not known here (they differ by "
                f"{float(error):.3g}): its loss would be wrong. Known are a linear head with bias, "
                "logit scale and soft-cap. If it is nan, its weights are damaged: load them anew."
            )

    @property
    def num_parameters(self) -> int:
        return int(self.model.num_parameters())  # those in 4 bits too

    def spread(self, ranks: Ranks, stays_whole: bool = True) -> None:
        """Share the weights among ranks; see `Sharded` for `stays_whole`."""
        if ranks.size > 1:
            self.shards = Sharded(self, ranks, stays_whole)

    def save(self, path: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write model (or adapter) and tokenizer to a folder.

        `weights` are those of `shards.whole_weights()`, where the model itself has only
        shards, or a smaller type.
        """
        if self.adapter is not None:
            named = weights and {f"base_model.model.{n}": w for n, w in weights.items()}
            self.adapter.save_pretrained(path, state_dict=named)
        else:
            self.model.save_pretrained(path, state_dict=weights)
        self.tokenizer.save_pretrained(path)

    def restore(self, path: Path) -> None:
        """Take over the trained weights of a folder written by `save`.

        Raises:
            BrokenCheckpoint: it is not whole, or not of this model.
        """
        if not path.is_dir():
            raise BrokenCheckpoint(f"The model in {path} cannot be read: there is no such folder.")
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # each format raises classes of its own
            reason = (str(error).splitlines() or [""])[0]
            raise BrokenCheckpoint(f"The model in {path} cannot be read: {reason}") from error
        saved, found = loaded
        weights = dict(saved.named_parameters())
        for name, parameter in self.trainable().items():
            if name in found["missing_keys"] or name not in weights:
                raise BrokenCheckpoint(f"The model in {path} is not whole: {name} is missing.")
            if weights[name].shape != parameter.shape or not weights[name].isfinite().all():
                raise BrokenCheckpoint(
                    f"The model in {path} is not that of this run: {name} has another shape, or "
                    "holds NaN or infinity."
                )
        with self.shards.resharded():
            for name, parameter in self.trainable().items():
                fill(parameter, weights[name].detach())
        self.version += 1


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {name!r}: expected auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={name} was asked for, but torch sees no CUDA device; use cpu or auto."
        )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
