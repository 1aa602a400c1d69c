"""HERO as a TRL trainer. Oracles: whole logits in fp64 by hero_kernels.reference, TRL's own
log-probabilities, and trajectories written out by hand."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
trl = pytest.importorskip("trl", reason="trl is missing: .ci/extras trl")

from hero.config import LossConfig, ReflectionConfig, TeacherConfig  # noqa: E402
from hero.integrations.common import spans  # noqa: E402
from hero.integrations.trl import TEACHER, HeroTrainer, MethodConfig  # noqa: E402
from hero.integrations.trl_parts import Generated, episodes  # noqa: E402
from hero.models import SHIPPED  # noqa: E402
from hero.types import FeedbackKind, StopReason  # noqa: E402
from hero_kernels import reference  # noqa: E402
from hero_kernels.objective import Objective  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import trl_hero as example  # noqa: E402

RULES = ReflectionConfig(reflector="rules", retries=0)


def shopper(folder: Path, method: MethodConfig, dtype: Any = torch.float32, **changed: Any) -> Any:
    """The example's trainer, smaller, with the shop's own diagnoses."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["tiny-shop"])
    tokenizer.chat_template, tokenizer.response_template = example.TEMPLATE, example.CALLS
    rows = [
        {"prompt": [{"role": "user", "content": ""}], "task_id": task}
        for task in example.world().tasks("train")[:40]
    ]
    named = {n: changed.pop(n) for n in ("peft_config",) if n in changed}
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_generations": 2, "max_completion_length": 120, "max_tool_calling_iterations": 6,
        "learning_rate": 1e-3, "report_to": [], "save_strategy": "no", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "reward_weights": [1.0, 0.0], **changed,
    }  # fmt: skip
    return HeroTrainer(
        model=AutoModelForCausalLM.from_pretrained(SHIPPED["tiny-shop"], dtype=dtype),
        reward_funcs=[example.score, example.success],
        args=trl.GRPOConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        environment_factory=example.Shop, world=example.world(), method=method, **named,
    )  # fmt: skip


def in_fp64(model: Any) -> Any:
    """A model of its own with these weights: TRL's patched one calls the original when copied."""
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(SHIPPED["tiny-shop"], dtype=torch.float64)
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()


def dense_loss(trainer: Any, teacher: Any, items: list[Any]) -> float:
    """Mean JSD over the distilled tokens, each turn scored alone in fp64."""

    def logprobs(model: Any, prompt: list[int], action: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([prompt + action])).logits[0, len(prompt) - 1 : -1]
        return (logits.double() / trainer.temperature).log_softmax(-1)

    total, count = 0.0, 0
    student = in_fp64(trainer.policy.model)
    with torch.no_grad():
        for sample in (item.sample for item in items):
            action = sample.action_ids
            per_token = reference.divergence(
                logprobs(student, sample.prompt_ids, action),
                logprobs(teacher, sample.teacher_prompt_ids, action),
                Objective(divergence="jsd", beta=0.5),
            )
            total, count = total + float(per_token.sum()), count + len(action)
    return total / count


def test_the_loss_is_that_of_whole_logits(tmp_path: Path) -> None:
    """Two micro-batches of one step add up to the mean over all tokens; the teacher is another
    model by then."""
    method = MethodConfig(
        prompts="compact", reflection=RULES,
        teacher=TeacherConfig(weights="frozen"),
    )  # fmt: skip
    trainer = shopper(tmp_path, method, temperature=0.8)
    trainer.model.train()
    teacher = in_fp64(trainer.model)
    assert trainer.teacher.kind == "frozen"  # made on the weights of the start
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    rows = [trainer.train_dataset[i // 2] for i in range(8)]
    whole = trainer._prepare_inputs(rows)
    halves = [whole, trainer._buffered_inputs[1]]
    trainer.current_gradient_accumulation_steps = 2
    loss = sum(float(trainer.compute_loss(trainer.model, half).detach()) for half in halves)
    items = [item for half in halves for own in half["hero_samples"] for item in own]
    assert len(items) > 4 and all(item.sample.privileged_ids for item in items)
    assert loss == pytest.approx(dense_loss(trainer, teacher, items), rel=2e-5)


def test_training_moves_the_student_and_its_teacher_and_can_be_resumed(tmp_path: Path) -> None:
    method = MethodConfig(
        prompts="compact", reflection=RULES, teacher=TeacherConfig(update_rate=0.5),
        loss=LossConfig(kl_to_start=0.1),
    )  # fmt: skip
    trainer = shopper(tmp_path, method, save_strategy="steps", save_steps=2, max_steps=4)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    name = "model.layers.0.mlp.up_proj.weight"
    student, teacher = trainer.policy.trainable()[name], trainer.teacher.state_dict()[name]
    assert not torch.equal(student, start[name]) and not torch.equal(teacher, student)
    assert torch.equal(trainer.start.state_dict()[name], start[name])
    [log] = [log for log in trainer.state.log_history if "train_loss" in log]
    assert log["train_loss"] > 0

    again = shopper(tmp_path, method, save_strategy="no", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for weights in ("teacher", "start"):
        kept, resumed = (getattr(t, weights).state_dict()[name] for t in (trainer, again))
        torch.testing.assert_close(resumed, kept, rtol=1e-5, atol=1e-7)
    (tmp_path / "checkpoint-2" / TEACHER).unlink()
    with pytest.raises(ValueError, match="holds no hero_teacher"):
        shopper(tmp_path, method).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_lora_trains_and_keeps_only_its_adapter_as_teacher(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: .ci/extras trl")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    method = MethodConfig(prompts="compact", reflection=RULES)
    # Later steps on the same episodes: importance ratios from TRL's log-probabilities.
    trainer = shopper(tmp_path, method, peft_config=lora, num_iterations=2)
    trainer.train()
    kept = trainer.teacher.state_dict()
    assert kept and all("lora_" in name for name in kept)
    b = [p for n, p in trainer.policy.trainable().items() if "lora_B" in n]
    assert any(bool(p.any()) for p in b) and not trainer.teacher.own_head()


def test_sampled_logprobs_are_those_of_the_policy_at_the_temperature(tmp_path: Path) -> None:
    """TRL's log-probabilities, which our importance ratio divides by, against whole logits."""
    method = MethodConfig(prompts="compact", reflection=RULES)
    trainer = shopper(tmp_path, method, temperature=0.7, num_iterations=2)
    trainer.model.train()
    batch = trainer._prepare_inputs([trainer.train_dataset[i // 2] for i in range(8)])
    samples = [item.sample for own in batch["hero_samples"] for item in own]
    assert samples
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.action_ids])
        with torch.no_grad():
            logits = trainer.model(ids).logits[0, len(sample.prompt_ids) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.action_ids)[:, None])
        got = torch.tensor(sample.sampled_logprobs)
        torch.testing.assert_close(got, expected.squeeze(1), rtol=1e-4, atol=1e-5)


def test_rollouts_are_read_as_turns(tmp_path: Path) -> None:
    """Ids of the shipped agent's words, cut where the tools answered."""
    renderer = shopper(tmp_path, MethodConfig(prompts="compact", reflection=RULES)).policy.renderer
    prompt = renderer.start([{"role": "user", "content": "goal"}])
    act = [*renderer.encode("search[hat]"), renderer.end_id]
    answer = renderer.observe(act, "user", "results")
    buy = [*renderer.encode("click[buy now]"), renderer.end_id]
    cut = renderer.encode("click[")
    tool = {"role": "tool", "name": "search", "content": "results"}
    failed = {"role": "tool", "name": "search", "content": "{'error': 'no'}"}
    say = {"role": "assistant", "content": ""}
    generated = Generated(
        prompts=[[{"role": "user", "content": "goal"}]] * 3,
        prompt_ids=[prompt] * 3,
        completion_ids=[act + answer + buy, act + answer + cut, act + answer],
        tool_mask=[
            [1] * len(act) + [0] * len(answer) + [1] * len(buy),
            [1] * len(act) + [0] * len(answer) + [1] * len(cut),
            [1] * len(act) + [0] * len(answer),
        ],
        completions=[[say, tool, say], [say, failed, say], [say, tool]],
    )
    shop = example.Shop()
    shop._feedback = "done"
    found = episodes(
        generated, [{"task_id": "a"}, {}, {}], [1.0, 0.5, 0.0],
        [shop, object(), object()], renderer, [0, 0, 1], None,
    )  # fmt: skip
    first, second, third = found
    assert [turn.observation for turn in first.turns] == ["results", "done"]
    assert [turn.observation for turn in second.turns] == ["{'error': 'no'}", None]
    assert [turn.observation for turn in third.turns] == ["results"]
    assert first.turns[1].prompt_ids == prompt + act + answer
    assert first.turns[1].action_ids == buy and first.turns[1].action_text == "click[buy now]"
    assert second.turns[0].feedback_kind is FeedbackKind.INVALID_ACTION
    assert [t.stop_reason for t in found] == [
        StopReason.DONE, StopReason.MAX_TOKENS, StopReason.MAX_TOKENS,
    ]  # fmt: skip
    assert [(t.task_id, t.group_id, t.success) for t in found] == [
        ("a", "0", True), ("0", "0", False), ("1", "1", False),
    ]  # fmt: skip
    generated.completions[0] = [say, tool, say, tool, say, tool]
    with pytest.raises(ValueError, match="2 answers of the model and 3 of tools"):
        episodes(generated, [{}] * 3, [0.0] * 3, None, renderer, [0, 0, 1], None)


def test_two_processes_train_one_student(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; import test_trl_hero as t\n"
        "method = t.MethodConfig(prompts='compact', reflection=t.RULES)\n"
        "trainer = t.shopper(Path(sys.argv[2]), method, per_device_train_batch_size=2)\n"
        "trainer.train()\n"
        "name = 'model.layers.0.mlp.up_proj.weight'\n"
        "kept = (trainer.policy.trainable()[name], trainer.teacher.state_dict()[name])\n"
        "sums = [weight.detach().double().sum().item() for weight in kept]\n"
        "Path(sys.argv[2], f'rank{trainer.accelerator.process_index}').write_text(str(sums))\n"
        "trainer.accelerator.end_training()\n"  # else an exit may abort, in threads that still run
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(Path(__file__).parent), str(tmp_path)],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    student, teacher = json.loads(first)
    assert first == second and student != teacher


def test_spans() -> None:
    assert spans([1, 1, 0, 1]) == [(0, 2), (3, 4)] and spans([0]) == [] and spans([1]) == [(0, 1)]


def test_hindsight_stands_in_the_last_message_of_a_template_that_merges_tokens() -> None:
    """Qwen3's template of TRL; its tokenizer makes one token of a full stop and the newline that
    the template puts behind it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\p{L}+|."), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>",
             "<tool_response>", "</tool_response>"]  # fmt: skip
    inner.train_from_iterator(
        ["it is shut.\n"] * 50,
        trainers.BpeTrainer(vocab_size=600, special_tokens=marks, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3_training.jinja"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>",
        chat_template=template.read_text(),
    )  # fmt: skip
    from hero.integrations.common import WholeRenderer

    renderer = WholeRenderer(tokenizer, None, {})
    call = {"type": "function", "function": {"name": "open", "arguments": {}}}
    messages = [
        {"role": "user", "content": "open it"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "open", "content": "it is shut."},
    ]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    at = renderer.branch_at(ids)
    spliced = tokenizer.decode(ids[:at] + renderer.encode("HINDSIGHT") + ids[at:])
    assert "it is shut.\nHINDSIGHT</tool_response><|im_end|>\n<|im_start|>assistant" in spliced
    first = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert tokenizer.decode(first[: renderer.branch_at(first)]).endswith("open it")


def test_an_episode_that_nobody_scored_trains_nothing(tmp_path: Path) -> None:
    trainer = shopper(tmp_path, MethodConfig(mode="terminal", prompts="compact"))
    trainer.model.train()
    real = trainer.reward_funcs[0]

    def unsure(completions: Any, **named: Any) -> list[Any]:
        return [None, *real(completions, **named)[1:]]

    trainer.reward_funcs[:] = [unsure, lambda completions, **named: [None] * len(completions)]
    trainer._prepare_inputs([trainer.train_dataset[i // 2] for i in range(8)])
    samples = [own for half in trainer._buffered_inputs for own in half["hero_samples"]]
    assert sorted(map(bool, samples)) == [False] + [True] * 7
    empty = {**trainer._buffered_inputs[0], "hero_samples": [[], [], [], []]}
    loss = trainer.compute_loss(trainer.model, empty)
    loss.backward()
    assert float(loss) == 0.0 and trainer.policy.head.weight.grad is not None
