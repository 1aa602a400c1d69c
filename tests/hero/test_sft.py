"""What a warm start teaches. Oracle: diagnoses and right actions written by hand."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from short_runs import assert_same

from hero.checks import from_dict
from hero.config import ModelConfig, SftConfig
from hero.envs.border import EnvironmentFault
from hero.envs.shop import ShopEnv
from hero.policy import Policy
from hero.prompts import Hindsight, make_prompts
from hero.recipes import load_recipe
from hero.renderer import Renderer
from hero.report.console import Console
from hero.scratch import build_tokenizer
from hero.sft import nll, parts, train_sft
from hero.targets import blank_samples, hindsight_samples, make_targets
from hero.types import Diagnosis, Trajectory

Episode = Callable[..., Trajectory]


def taught(
    renderer: Renderer, trajectory: Trajectory, diagnosis: Diagnosis, oracle: str
) -> set[str]:
    """The targets of a one-turn episode (its action is "act"), over many draws."""
    samples = [
        sample
        for seed in range(40)
        for sample in hindsight_samples(
            trajectory, [diagnosis], [oracle], (), make_prompts("standard"), renderer,
            random.Random(seed),
        )
    ]  # fmt: skip
    return {renderer.decode(sample.action_ids) for sample in samples}


@pytest.mark.parametrize(
    ("diagnosis", "oracle", "expected"),
    [
        (Diagnosis(turn=0, hint="look"), "go", {"go"}),
        (Diagnosis(turn=0, hint="look", corrected_action="stay"), "go", {"stay"}),
        (Diagnosis(turn=0, hint="look"), "", set()),  # nobody knows better
        (Diagnosis(turn=0, hint="look"), "act", set()),  # the oracle contradicts the hint
        (Diagnosis(turn=0, hint="look", corrected_action="act "), "go", set()),
        (Diagnosis(turn=0, source="rules"), "go", {"act"}),  # a good turn, by another way
        (Diagnosis(turn=0, valid=False), "go", set()),  # faulty, though without a hint
        (Diagnosis(turn=0, necessary=False), "go", set()),
        (Diagnosis(turn=0, failure_cause="too early"), "go", set()),
    ],
)
def test_the_wrong_action_is_never_taught(
    renderer: Renderer, episode: Episode, diagnosis: Diagnosis, oracle: str, expected: set[str]
) -> None:
    assert taught(renderer, episode(["s"]), diagnosis, oracle) == expected


@pytest.mark.parametrize(("look_ahead", "most"), [(1, 1), (2, 2), (9, 3)])
def test_contexts_look_ahead(
    renderer: Renderer, episode: Episode, look_ahead: int, most: int
) -> None:
    """As far as the student's teacher may, and often less; no further than the episode's end."""
    trajectory, prompts = episode(["s"] * 3), make_prompts("compact")
    found = set()
    for seed in range(40):
        samples = hindsight_samples(
            trajectory, [Diagnosis(turn=k, hint="look") for k in range(3)], ["go"] * 3, (), prompts,
            renderer, random.Random(seed), look_ahead,
        )  # fmt: skip
        found.add(renderer.decode(samples[0].privileged_ids).count("then obs"))
    assert found == set(range(most + 1))  # 0: a context that shows something else


def test_behind_a_blank_context_the_demonstrator_acts_as_ever(
    renderer: Renderer, episode: Episode
) -> None:
    trajectory, prompts = episode(["s"] * 200), make_prompts("compact")
    samples = blank_samples(trajectory, 0.3, prompts, renderer, random.Random(0))
    assert 40 < len(samples) < 80
    assert {renderer.decode(s.action_ids) for s in samples} == {
        "act" + renderer.decode([renderer.end_id])
    }
    assert {renderer.decode(s.privileged_ids) for s in samples} == {" | again"}
    assert blank_samples(trajectory, 0.0, prompts, renderer, random.Random(0)) == []


def test_the_recipe_of_the_shipped_agent_shows_blocks_that_say_nothing() -> None:
    """Behind them stands what the demonstrator does without one, so that no block is a trigger.

    Oracle: the plain targets. What 11 minutes of it make is in warm-start-cpu.json.
    """
    few = {"demonstrator_episodes": 40, "coverage_episodes": 0}
    config = from_dict(load_recipe("tiny-shop", "sft") | few, SftConfig)
    env = ShopEnv(**config.env.options)
    renderer = Renderer(build_tokenizer(env.vocabulary()))
    targets = make_targets(config, env, renderer)
    plain = [(s.prompt_ids, s.action_ids) for episode in targets["plain"] for s in episode]
    block = renderer.encode(make_prompts("compact").privileged_context(Hindsight()))
    told = [s for episode in targets["hindsight"] for s in episode]
    empty = [(s.prompt_ids, s.action_ids) for s in told if s.privileged_ids == block]
    assert all(pair in plain for pair in empty)
    assert len(plain) / 2 < len(empty) < len(told)


class Silent(ShopEnv):
    """A shop whose rules find faults and correct none."""

    def diagnose(self, trajectory: Trajectory) -> list[Diagnosis]:
        return [replace(found, corrected_action="") for found in super().diagnose(trajectory)]


def test_without_corrected_actions_the_same_actions_are_taught() -> None:
    renderer = Renderer(build_tokenizer(ShopEnv("tiny").vocabulary()))
    config = from_dict(
        {"prompts": "compact", "demonstrator_episodes": 15, "coverage_episodes": 15}, SftConfig
    )
    told, silent = (
        [
            [renderer.decode(sample.action_ids) for sample in samples]
            for samples in make_targets(config, env, renderer, lambda done, of: None)["hindsight"]
        ]
        for env in (ShopEnv("tiny"), Silent("tiny"))
    )
    assert told == silent and len(told) > 10


def small(folder: Path, **changes: Any) -> SftConfig:
    data = {
        "prompts": "compact", "env": {"name": "shop", "options": {"profile": "tiny"}},
        "scratch": {"width": 16, "layers": 1, "heads": 2}, "demonstrator_episodes": 6,
        "coverage_episodes": 6, "steps": 6, "warmup_steps": 2, "save_every": 2,
        "output_dir": str(folder),
    }  # fmt: skip
    return from_dict(data | changes, SftConfig)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_warm_start_that_was_stopped_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    whole = train_sft(small(tmp_path / "whole"), Console(io.StringIO()))
    assert not (tmp_path / "whole.unfinished").exists()
    broken = small(tmp_path / "broken")

    class Stopping(Console):
        """Ctrl-C arrives between two steps."""

        @contextmanager
        def counting(self, stage: str, unit: str = "episodes", before: int = 0) -> Any:
            def count(done: int, total: int) -> None:
                if stage == "training" and done == steps:
                    raise KeyboardInterrupt

            yield count

    with pytest.raises(KeyboardInterrupt) as stop:
        train_sft(broken, Stopping(io.StringIO()))
    assert "the same command goes on" in stop.value.__notes__[0]
    assert not (tmp_path / "broken").exists()
    with pytest.raises(ValueError, match=r"other settings:\n  seed: 0 in the run, 1 now"):
        train_sft(small(tmp_path / "broken", seed=1), Console(io.StringIO()))
    said = io.StringIO()
    assert_same(weights(train_sft(broken, Console(said))), weights(whole))
    assert f"Going on after step {steps}." in said.getvalue() and "tokens/s" in said.getvalue()


def test_micro_batches_change_nothing_but_memory(tmp_path: Path) -> None:
    whole = train_sft(small(tmp_path / "whole"), Console(io.StringIO()))
    cut = train_sft(small(tmp_path / "cut", micro_batch_tokens=1), Console(io.StringIO()))
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], weight, rtol=1e-4, atol=1e-5)


class Wordless(ShopEnv):
    """A shop whose list of words is none, and whose demonstrator never errs."""

    random_action = None

    def vocabulary(self) -> Any:
        return None


def test_what_a_warm_start_asks_of_a_world_is_checked(tmp_path: Path) -> None:
    config = small(tmp_path / "new", coverage_noise=[0.0])
    config.env.name = f"{__name__}:Wordless"
    with pytest.raises(EnvironmentFault, match=r"vocabulary.*got None.*a list of texts"):
        train_sft(config, Console(io.StringIO()))
    assert list(tmp_path.iterdir()) == []


def test_a_warm_start_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="raise --demonstrator-episodes"):
        train_sft(small(tmp_path / "new", demonstrator_episodes=0), Console(io.StringIO()))
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_of_the_shipped_agent_learns_all_three_kinds(tmp_path: Path) -> None:
    """In short: nats a token of each kind, from ln 423 = 6.05 before the first step."""
    changes = {"demonstrator_episodes": 12, "coverage_episodes": 12, "steps": 25}
    changes |= {"warmup_steps": 5, "batch_size": 2, "output_dir": str(tmp_path / "new")}
    config = from_dict(load_recipe("tiny-shop", "sft") | changes, SftConfig)
    made = Policy.load(ModelConfig(path=str(train_sft(config, Console(io.StringIO())))))
    shipped = Policy.load(ModelConfig(device="cpu"))
    assert made.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    assert {n: p.shape for n, p in made.trainable().items()} == {
        n: p.shape for n, p in shipped.trainable().items()
    }
    targets = make_targets(config, ShopEnv(**config.env.options), made.renderer)
    for kind, episodes in targets.items():
        own = [replace(s, trajectory=i) for i, e in enumerate(episodes[:8]) for s in e]
        with torch.no_grad():
            loss = sum(float(nll(made, rows, part)) for part, rows in parts(kind, own, 4096))
        assert loss / sum(len(sample.action_ids) for sample in own) < 2, kind
