"""Another model as teacher. Oracle: its own forward pass, in float64, apart from all our code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import settings, trainer

from hero.algorithms import MODES, Experience
from hero.checks import from_dict
from hero.config import ScratchConfig, TeacherConfig
from hero.learner import Learner
from hero.policy import Policy
from hero.sampler import HFSampler, Sampling
from hero.scratch import build_model
from hero.teacher import TeacherContext, TeacherWeights
from hero.types import Diagnosis, Trajectory
from tests.hero.short_runs import saved


@pytest.fixture(scope="module")
def larger(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider and deeper than the student, of the same vocabulary."""
    shape = ScratchConfig(width=48, layers=3, heads=4, init_std=0.3)
    return saved(shape, tiny_tokenizer, tmp_path_factory.mktemp("larger"), seed=5)


def test_the_other_model_scores_the_students_tokens(
    fresh_policy: Policy, larger: Path, context: TeacherContext, played: list[Trajectory],
    hints: list[list[Diagnosis]],
) -> None:  # fmt: skip
    samples = MODES["hero"](context).annotate(
        Experience(trajectories=copy.deepcopy(played), diagnoses=hints, gold={})
    )
    config = from_dict({"teacher": {"path": str(larger)}, "loss": {"is_clip": 0}})
    teacher = TeacherWeights(fresh_policy, config.teacher)
    assert teacher.policy is not fresh_policy and not teacher.policy.trainable()
    other, total, count = teacher.policy.model, torch.zeros((), dtype=torch.float64), 0
    for s in samples:

        def logprobs(model: Any, prompt: list[int], s: Any = s) -> torch.Tensor:
            logits = model(torch.tensor([prompt + s.action_ids])).logits[0]
            return logits[len(prompt) - 1 : -1].double().log_softmax(-1)

        own = logprobs(fresh_policy.model, s.prompt_ids)
        theirs = logprobs(other, s.teacher_prompt_ids).detach()
        mixed = torch.logaddexp(own, theirs) - torch.log(torch.tensor(2.0))
        jsd = 0.5 * (own.exp() * (own - mixed) + theirs.exp() * (theirs - mixed)).sum(-1)
        total, count = total + jsd.sum(), count + len(s.action_ids)
    learn = Learner(fresh_policy, teacher, config)
    before = {n: p.detach().clone() for n, p in other.named_parameters()}
    learned = learn.learn(samples, seed=0)
    assert learned.loss == pytest.approx(float(total.detach() / count), rel=1e-4)
    assert learned.steps == 1 and all(
        torch.equal(p, before[n]) for n, p in other.named_parameters()
    )
    assert teacher.state_dict() == {}  # nothing of it belongs into a checkpoint


def test_another_vocabulary_is_refused(fresh_policy: Policy, model_path: Path) -> None:
    config = TeacherConfig(path=str(model_path))
    with pytest.raises(ValueError, match=r"the vocabularies differ: student 104 ids, teacher \d+"):
        TeacherWeights(fresh_policy, config)


def test_a_shorter_head_is_refused(
    fresh_policy: Policy, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = build_model(ScratchConfig(width=16, layers=1, heads=2), tiny_tokenizer)
    model.resize_token_embeddings(len(tiny_tokenizer) + 8)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    rows = len(tiny_tokenizer)
    with pytest.raises(
        ValueError, match=f"rows of the lm_head .*student {rows}, teacher {rows + 8}"
    ):
        TeacherWeights(fresh_policy, TeacherConfig(path=str(tmp_path)))


def test_the_reflector_teacher_is_that_model(model_path: Path, tmp_path: Path) -> None:
    """Greedy reflections of a whole run are those that the other model alone would write."""
    path = tmp_path / "other"
    student = Policy.load(settings(model_path).model)
    torch.manual_seed(9)
    model = build_model(ScratchConfig(width=32, layers=2, heads=2), student.tokenizer)
    model.save_pretrained(path)
    student.tokenizer.save_pretrained(path)
    config = settings(
        model_path, teacher={"path": str(path)}, updates=1, eval={"test_tasks": 0},
        reflection={"reflector": "teacher", "temperature": 0.0, "max_tokens": 12},
    )  # fmt: skip
    run = trainer(config, tmp_path / "run")
    request = student.renderer.start([{"role": "user", "content": "review goal red"}])
    sampling = Sampling(max_tokens=12, seed=0, temperature=0.0)
    config.model.path = str(path)
    [expected] = HFSampler(Policy.load(config.model)).generate([request], sampling)
    [other] = HFSampler(student).generate([request], sampling)
    assert run.stages.reflector is not None
    [answer] = run.stages.reflector.model.answer(["review goal red"], 0)  # type: ignore[attr-defined]
    assert answer.text == student.renderer.decode(expected.ids)
    assert answer.text != student.renderer.decode(other.ids)
    run.run()


def test_kl_to_the_start_is_not_to_the_other_model(fresh_policy: Policy, larger: Path) -> None:
    config = from_dict({"teacher": {"path": str(larger)}, "loss": {"kl_to_start": 0.1}})
    learn = Learner(fresh_policy, TeacherWeights(fresh_policy, config.teacher), config)
    assert learn.start is not None and learn.start.policy is fresh_policy
