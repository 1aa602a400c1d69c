"""Predicted memory, against the tensors that a small run really has, and published sizes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hero.attention import Read
from hero.checks import from_dict
from hero.cli import main
from hero.config import EngineConfig, ModelConfig, ScratchConfig, TrainConfig
from hero.engines.paged import PagedEngine
from hero.kvcache import RowCache
from hero.learner import Learner
from hero.memory import GIB, PROBED, advice, predict, sizes, sizes_of
from hero.policy import Policy
from hero.recipes import load_recipe, merge
from hero.scratch import build_model
from hero.teacher import TeacherWeights
from tests.hero.short_runs import settings, trainer


@pytest.fixture
def small(tiny_tokenizer: Any) -> Policy:
    torch.manual_seed(0)
    shape = ScratchConfig(width=64, layers=3, heads=4)
    return Policy(build_model(shape, tiny_tokenizer), tiny_tokenizer, ModelConfig(device="cpu"))


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_what_is_there_always_is_counted_to_the_byte(small: Policy) -> None:
    config = TrainConfig()
    found = predict(config, "cpu", sizes_of(small.model.config))
    teacher = TeacherWeights(small, config.teacher)
    learner = Learner(small, teacher, config)
    parameters = list(small.trainable().values())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    moments = [t for state in learner.optimizer.state.values() for t in state.values() if t.dim()]
    assert found.always == {
        "trained weights": nbytes(parameters), "AdamW": nbytes(moments),
        "teacher": nbytes(teacher.state_dict().values()),
    }  # fmt: skip
    assert found.training["gradients"] == nbytes(p.grad for p in parameters)


def test_weights_in_two_types_are_counted_to_the_byte(small: Policy, tiny_tokenizer: Any) -> None:
    model = ModelConfig(device="cpu", dtype="bfloat16", master_weights=True)
    own = Policy(copy.deepcopy(small.model), tiny_tokenizer, model)
    found = predict(TrainConfig(model=model), "cpu", sizes_of(small.model.config))
    assert found.always["trained weights"] == nbytes(own.trainable().values())
    assert found.always["trained weights to compute with"] == nbytes(own.model.parameters())
    assert "weights cast for a pass" not in found.training


def test_a_teacher_in_main_memory_takes_no_room_but_to_write(small: Policy) -> None:
    size = sizes_of(small.model.config)
    plain, config = TrainConfig(), from_dict({"teacher": {"offload": True}})
    kept = predict(plain, "cpu", size).always["teacher"]
    found = predict(config, "cpu", size)
    assert "teacher" not in found.always and "teacher while it reads" not in found.rollout
    config.reflection.reflector = "teacher"
    assert predict(config, "cpu", size).rollout["teacher while it reads"] == kept


def test_moments_in_8_bits(small: Policy) -> None:
    """Small tensors keep 32 bits, and each has two tables of 256 numbers."""
    pytest.importorskip("bitsandbytes")
    config = from_dict({"optim": {"kind": "adamw_8bit"}})
    learner = Learner(small, TeacherWeights(small, config.teacher), config)
    for parameter in small.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    held = sum(
        t.nbytes
        for parameter, state in learner.optimizer.state.items() for name, t in state.items()
        if parameter.numel() >= 4096 and isinstance(t, torch.Tensor) and "qmap" not in name
    )  # fmt: skip
    large = sum(p.numel() for p in small.trainable().values() if p.numel() >= 4096)
    size = sizes_of(small.model.config)
    predicted = predict(config, "cpu", size).always["AdamW"]
    assert held == pytest.approx(predicted * large / size.parameters, rel=1e-3)


def test_weights_in_4_bits_are_counted_to_the_byte(small: Policy, tmp_path: Path) -> None:
    bnb, _ = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    small.save(tmp_path)
    model = ModelConfig(path=str(tmp_path), device="cpu", lora_rank=4, quantize="4bit")
    own, held = Policy.load(model), 0
    for module in own.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            scales = module.weight.quant_state
            held += module.weight.nbytes + scales.absmax.nbytes + scales.state2.absmax.nbytes
    held += nbytes(p for p in own.model.parameters() if not p.requires_grad and p.dim() == 1)
    held += own.model.get_input_embeddings().weight.nbytes
    if own.head.weight is not own.model.get_input_embeddings().weight:
        held += own.head.weight.nbytes
    predicted = predict(TrainConfig(model=model), "cpu").always["frozen weights"]
    assert held == pytest.approx(predicted, rel=1e-3)


def test_the_copy_of_an_engine_is_counted_to_the_byte(small: Policy) -> None:
    config = TrainConfig(engine=EngineConfig(kind="transformers"))
    found = predict(config, "cpu", sizes_of(small.model.config)).always["the engine's copy"]
    assert found == nbytes(PagedEngine(small, config).model.parameters())


def test_lora_trains_what_peft_trains(small: Policy, tiny_tokenizer: Any) -> None:
    pytest.importorskip("peft")
    size = sizes_of(small.model.config)
    model = ModelConfig(device="cpu", lora_rank=4)
    adapted = Policy(copy.deepcopy(small.model), tiny_tokenizer, model)
    found = predict(TrainConfig(model=model), "cpu", size)
    trained = list(adapted.trainable().values())
    assert found.always["trained weights"] == nbytes(trained)
    frozen = [p for p in adapted.model.parameters() if not p.requires_grad]
    assert found.always["frozen weights"] == nbytes(frozen)


@pytest.mark.parametrize(
    "model",
    [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "master_weights": True}],
    ids=["float32", "autocast", "masters"],
)
def test_activations_are_those_of_a_real_pass(
    small: Policy, tiny_tokenizer: Any, model: dict[str, Any]
) -> None:
    own = Policy(copy.deepcopy(small.model), tiny_tokenizer, ModelConfig(device="cpu", **model))
    weights = {p.untyped_storage().data_ptr() for p in own.model.parameters()}

    def held(tokens: int) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        alive: list[torch.Tensor] = []  # so that no address is used twice
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            own.hidden(torch.zeros(1, tokens, dtype=torch.long))
        return sum(kept.values())

    tokens = 4 * PROBED
    settings = from_dict({
        "optim": {"micro_batch_tokens": tokens}, "rollout": {"max_episode_tokens": tokens},
        "model": model,
    })  # fmt: skip
    predicted = predict(settings, "cpu", sizes_of(small.model.config)).training["activations"]
    # The difference: weights that are cast for a pass do not grow with it.
    assert held(2 * tokens) - held(tokens) == pytest.approx(predicted, rel=0.25)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_grows_no_larger_than_predicted(
    small: Policy, tiny_tokenizer: Any, dtype: Any
) -> None:
    model = ModelConfig(device="cpu", dtype=dtype)
    small = Policy(copy.deepcopy(small.model), tiny_tokenizer, model)
    rollout = {"batch_size": 3, "max_episode_tokens": 200}
    config = from_dict({"rollout": rollout, "model": {"dtype": dtype}})
    cache = RowCache(3, small.dtype)
    for end in range(20, 201, 20):
        aimed = cache.aim([Read(row, end, 20) for row in range(3)], "cpu")
        with torch.no_grad():
            small.trunk(torch.zeros(1, 60, dtype=torch.long), **aimed)
    held = nbytes(t for pair in cache._kept for t in pair)
    predicted = predict(config, "cpu", sizes_of(small.model.config)).rollout["key-value cache"]
    assert 2 / 3 * predicted <= held <= predicted


def test_the_recipes_models_have_their_published_size() -> None:
    size = sizes("Qwen/Qwen3-4B-Instruct-2507")
    assert size.parameters == 4_022_468_096  # of the model's page
    assert (size.layers, size.kv_heads, size.head_size) == (36, 8, 128)


@pytest.mark.parametrize(
    "name", ["tau-retail", "tau-retail-grpo", "tau-airline", "webshop", "bfcl"]
)
def test_recipes_for_one_80_gb_gpu_fit_it(name: str) -> None:
    assert predict(from_dict(load_recipe(name)), "cuda").peak < 80e9


@pytest.mark.parametrize(("name", "gigabytes"), [("tau-retail-full", 78), ("webshop-full", 75)])
def test_all_weights_fit_it_with_a_paged_optimiser(name: str, gigabytes: int) -> None:
    """As docs/environments/ says; several processes take the recipe as it is."""
    config = from_dict(merge(load_recipe(name), {"optim": {"kind": "paged_adamw"}}))
    assert round(predict(config, "cuda").peak / 1e9) == gigabytes


def test_advice_makes_a_run_fit_or_says_the_least() -> None:
    config = from_dict(load_recipe("webshop"))
    options, peak = advice(config, "cuda", int(24e9))
    assert peak <= 24e9 < predict(config, "cuda").peak
    changes: dict[str, dict[str, int]] = {"rollout": {}, "optim": {}}
    for option in options:
        part, name = option.split()[0].removeprefix("--").split(".")
        changes[part][name.replace("-", "_")] = int(option.split()[1])
    data = load_recipe("webshop")
    changed = from_dict({**data, **{part: data[part] | new for part, new in changes.items()}})
    assert predict(changed, "cuda").peak == peak
    options, peak = advice(config, "cuda", 10**9)
    assert peak > 1e9 and options


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "webshop", "--gpu", "24", "--rollout.batch-size", "64"]) == 0
    said = capsys.readouterr().out
    assert "key-value cache" in said and "It does not fit 24 GB (22.4 GiB). It fits" in said
    assert "--rollout.batch-size" in said
    assert main(["memory", "quickstart"]) == 0
    assert "It fits 80 GB" in capsys.readouterr().out
    for words, message in (
        (["memory"], "hero memory tau-retail"), (["memory", "webshop", "--gpu", "0"], "above 0"),
        (["memory", "webshop", "--gpu", "nan"], "above 0"),
        (["memory", "webshop", "--processes", "0"], "expected 1 or more"),
        (["memory", "webshop", "--processes", "999"], "999 processes share the episodes"),
        (["memory", "webshop", "--model.path", "no/model"], "Cannot read the configuration"),
    ):  # fmt: skip
        assert main(words) == 1
        assert message in " ".join(capsys.readouterr().err.split())


def test_training_says_what_was_predicted_and_measured(model_path: Path, tmp_path: Path) -> None:
    run = trainer(settings(model_path, updates=1, eval={"test_tasks": 0}), tmp_path)
    run.run()
    said = run.console._rich.file.getvalue()  # type: ignore[attr-defined]
    line = next(line for line in said.splitlines() if line.startswith("Memory: "))
    predicted, measured = float(line.split()[1]), float(line.split("most; ")[1].split()[0])
    assert 0 <= predicted < measured < 64 and "GiB" in line
    assert json.loads((tmp_path / "summary.json").read_text())["stopped"] and GIB == 1024**3
