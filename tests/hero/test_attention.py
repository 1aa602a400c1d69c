"""Attention of spans against a dense mask, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from hero import attention
from hero.attention import Read, Span
from hero.checks import from_dict
from hero.config import ModelConfig
from hero.kvcache import RowCache
from hero.policy import Policy
from hero.report.facts import header

SPANS = [
    Span(0, 0, 0, 40),  # a trunk
    Span(0, 17, 40, 49),  # a branch
    Span(0, 40, 49, 50),  # of one token
    Span(50, 50, 50, 83),  # another row
    Span(50, 60, 83, 90),
]


def dense(spans: list[Span]) -> Tensor:
    """[T, T] which token (row) sees which (column)."""
    mask = torch.zeros(spans[-1].end, spans[-1].end, dtype=torch.bool)
    for span in spans:
        for token in range(span.start, span.end):
            mask[token, span.prefix_start : span.prefix_end] = True
            mask[token, span.start : token + 1] = True
    return mask


READS = {
    "all rows decode": [Read(0, 3, 1), Read(1, 9, 1), Read(2, 1, 1)],
    "some are idle": [Read(3, 9, 1), Read(1, 4, 1), Read(4, 7, 1)],
    "most are idle": [Read(5, 9, 1), Read(0, 4, 1)],
    "prompts and their rest beside": [
        Read(4, 6, 1), Read(2, 12, 1), Read(0, 7, 7), Read(1, 12, 5), Read(3, 1, 1), Read(5, 2, 2),
    ],
}  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("reads", READS.values(), ids=READS)
def test_reads_equal_each_token_alone(reads: list[Read], groups: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(read.tokens for read in reads), 8, dtype=torch.float64)
    key, value = torch.randn(2, 6, 4 // groups, 16, 8, dtype=torch.float64)
    found = attention.attend_cached(query, key, value, reads, 0.3)[0].transpose(0, 1)
    expected = []
    for row, sees, tokens in reads:
        for seen in range(sees - tokens + 1, sees + 1):
            keys, values = (t[row, :, :seen].repeat_interleave(groups, 0) for t in (key, value))
            of_token = query[0, :, len(expected), None]
            expected.append(((0.3 * of_token @ keys.mT).softmax(-1) @ values)[:, 0])
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("groups", [1, 2])
def test_equals_a_dense_mask_forward_and_backward(groups: int) -> None:
    torch.manual_seed(0)
    shape = (1, 4, SPANS[-1].end, 8)
    query = torch.randn(shape, dtype=torch.float64)
    key, value = torch.randn(2, 1, 4 // groups, *shape[2:], dtype=torch.float64)
    upstream = torch.randn(shape, dtype=torch.float64)
    results = []
    for spans in (True, False):
        tensors = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        if spans:
            out = attention.attend(*tensors, SPANS, 0.3)
        else:
            repeated = [tensor.repeat_interleave(groups, 1) for tensor in tensors[1:]]
            scores = 0.3 * tensors[0] @ repeated[0].mT
            out = scores.masked_fill(~dense(SPANS), -torch.inf).softmax(-1) @ repeated[1]
        out.backward(upstream)
        results.append([out, *(tensor.grad for tensor in tensors)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_memory_does_not_grow_with_the_square_of_the_tokens() -> None:
    """Sixteen branches of 32 tokens each: a fixed number of bytes a token, beside torch's own
    scratch memory, which threads and instruction sets make larger."""
    tokens, held = list[int](), list[int]()
    for trunk in (1024, 4096):
        spans = [Span(0, 0, 0, trunk)]
        for branch in range(16):
            start = spans[-1].end
            spans.append(Span(0, trunk * (branch + 1) // 16, start, start + 32))
        query, key, value = torch.randn(3, 1, 2, spans[-1].end, 8)
        activity = torch.profiler.ProfilerActivity.CPU
        with (
            torch.profiler.profile(activities=[activity], profile_memory=True) as profile,
            torch.no_grad(),
        ):
            attention.attend(query, key, value, spans, 1.0)
        assert profile.profiler is not None
        events = profile.profiler.kineto_results.events()
        held.append(max(event.nbytes() for event in events if event.name() == "[memory]"))
        tokens.append(query.shape[2])
    # A mask of all would have 6100.
    assert (held[1] - held[0]) / (tokens[1] - tokens[0]) <= 600


FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "smollm3": {"pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 512},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_families_score_branches_as_alone(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **FAMILIES[family],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(1, 64, (SPANS[-1].end,))
    positions = torch.cat(
        [
            torch.arange(span.end - span.start) + span.prefix_end - span.prefix_start
            for span in SPANS
        ]
    )
    alone = [
        model.get_decoder()(
            torch.cat([ids[span.prefix_start : span.prefix_end], ids[span.start : span.end]])[None]
        ).last_hidden_state[0, span.prefix_end - span.prefix_start :]
        for span in SPANS
    ]
    attention.use(model)
    together = model.get_decoder()(
        ids[None], position_ids=positions[None], attention_mask=attention.as_mask(SPANS)
    ).last_hidden_state[0]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


class Calls(TorchFunctionMode):
    """Of torch's attention: the types of its tensors, and whether heads share keys at a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.types, self.shared = list[set[torch.dtype]](), list[bool]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.types.append({tensor.dtype for tensor in args[:3]})
            self.shared.append(args[0].shape[1] != args[1].shape[1] and "attn_mask" in kwargs)
        return func(*args, **kwargs)


@torch.no_grad()
def test_torch_is_asked_for_what_its_kernels_on_cuda_know(tiny_tokenizer: Any) -> None:
    """With float32 weights under autocast: tensors of one type, which the mask of the lower right
    demands, and in decoding, where there is a mask of numbers, a head of keys for each of queries.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(tiny_tokenizer), hidden_size=32,
                                  intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                                  num_key_value_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    policy = Policy(model, tiny_tokenizer, ModelConfig(device="cpu", dtype="bfloat16"))
    ids = torch.arange(SPANS[-1].end)[None]
    with Calls() as passes:
        policy.hidden(ids, position_ids=ids, attention_mask=attention.as_mask(SPANS))
    assert passes.types == [{torch.bfloat16}] * len(SPANS)
    cache = RowCache(2, policy.dtype)
    read = cache.aim([Read(0, 3, 3), Read(1, 5, 5)], "cpu")
    policy.trunk(ids[:, :8], **read)
    decode = cache.aim([Read(0, 4, 1), Read(1, 6, 1)], "cpu")
    with Calls() as passes:
        policy.trunk(ids[:, :2], **decode)
    assert passes.types == [{torch.bfloat16}] and passes.shared == [False]


@pytest.mark.parametrize(
    ("implementation", "window", "why"),
    [
        ("eager", None, "attention 'eager' cannot be told"),
        ("sdpa", 64, "layers that do not see all of 100 tokens"),
        ("sdpa", None, ""),
    ],
)
def test_rows_that_are_computed_one_by_one_say_why(
    implementation: str, window: int | None, why: str, tiny_tokenizer: Any
) -> None:
    config = AutoConfig.for_model("mistral", vocab_size=len(tiny_tokenizer), hidden_size=32,
                                  intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                                  num_key_value_heads=2, sliding_window=window)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    policy = Policy(model, tiny_tokenizer, ModelConfig(device="cpu"))
    assert why in policy.unpacked(100) and policy.takes_spans(100) == (why == "")
    of_run = from_dict({"rollout": {"max_episode_tokens": 100}})
    said = header(of_run, policy).get("rows", "")
    assert (why in said) if why else said == ""


def test_a_saved_model_does_not_name_it(policy: Policy, tmp_path: Path) -> None:
    """Whoever loads the folder need not have this package."""
    policy.model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()


@torch.no_grad()
def test_a_family_that_does_not_hand_the_mask_on_is_noticed(tiny_tokenizer: Any) -> None:
    """Falcon makes a mask of its own of what it is given."""
    config = AutoConfig.for_model("falcon", vocab_size=64, hidden_size=32, num_hidden_layers=1,
                                  num_attention_heads=4, alibi=False)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    policy = Policy(model, tiny_tokenizer, ModelConfig(device="cpu"))
    assert policy.unpacked(1) == "FalconForCausalLM has an attention of its own"


def test_what_spans_lack_is_refused(policy: Policy) -> None:
    heads = torch.zeros(1, 1, 90, 8)
    with pytest.raises(ValueError, match="wants 's_aux' in its attention"):
        attention.attention(
            policy.model, heads, heads, heads, attention.as_mask(SPANS), s_aux=torch.zeros(1)
        )
