"""What models are told, against what happened."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hero.algorithms import MODES, Experience
from hero.config import TeacherConfig
from hero.envs.shop import ShopEnv
from hero.learner import Learned
from hero.prompts import Hindsight, make_prompts
from hero.report.metrics import update_metrics
from hero.teacher import TeacherContext
from hero.types import Diagnosis, FeedbackKind, Trajectory

Episode = Callable[..., Trajectory]


@pytest.mark.parametrize(
    ("reward", "compact", "standard"),
    [
        (0.0, "0.0", "0.00"),
        (0.5, "0.5", "0.50"),
        (0.75, "0.75", "0.75"),
        (0.96, "0.96", "0.96"),
        (0.999, "0.99", "0.99"),  # not a success
        (1.0, "1.0", "1.00"),
        (1.25, "1.25", "1.25"),
        (-0.5, "-0.5", "-0.50"),
    ],
)
def test_a_reward_is_not_rounded_to_another(
    episode: Episode, reward: float, compact: str, standard: str
) -> None:
    trajectory = episode(["s"])
    trajectory.reward = reward
    for style, shown in (("compact", compact), ("standard", standard)):
        prompts = make_prompts(style)
        block = prompts.privileged_context(Hindsight(reward=reward))
        review = prompts.reflection(trajectory, "")
        assert f"reward {shown} " in block or f"reward was {shown}." in block
        assert f"reward {shown} " in review or f"reward: {shown} " in review


@pytest.mark.parametrize("necessary", [True, False])
@pytest.mark.parametrize("valid", [True, False])
def test_a_diagnosis_is_shown_whole(
    context: TeacherContext, episode: Episode, necessary: bool, valid: bool
) -> None:
    """As context: whatever the fields say, the turn is trained as long as it has a hint."""
    row = [
        Diagnosis(turn=0, necessary=necessary, valid=valid, failure_cause="too early", hint="look")
    ]
    experience = Experience(trajectories=[episode(["s"])], diagnoses=[row], gold={})
    [sample] = MODES["hero"](context).annotate(experience)
    block = context.renderer.decode(sample.privileged_ids)
    assert sample.distill_weight == 1.0 and "too early" in block and "look" in block
    assert ("Your action was not needed for the task." in block) == (not necessary)
    assert ("Your action was not accepted." in block) == (not valid)
    hidden = TeacherContext(
        TeacherConfig(diagnosis=False), context.renderer, make_prompts("standard")
    )
    [sample] = MODES["hero"](hidden).annotate(experience)
    block = context.renderer.decode(sample.privileged_ids)
    assert not any(word in block for word in ("needed", "accepted", "early", "look"))


def test_forms_of_actions_stand_on_lines_of_their_own() -> None:
    """A 0.5B model copied `search[x] looks for products`: whatever stands behind a form."""
    forms = [line for line in ShopEnv("small").system_prompt.splitlines() if "[" in line]
    assert forms == ["search[words]", "click[name]", "click[Buy Now]"]


def test_a_budget_warning_is_no_error(episode: Episode) -> None:
    trajectory = episode(["s"] * 4)
    kinds = [FeedbackKind.OK, FeedbackKind.BUDGET, FeedbackKind.NO_RESULTS, FeedbackKind.DONE]
    for turn, kind in zip(trajectory.turns, kinds, strict=True):
        turn.feedback_kind = kind
    gaps = {(0, k): [-1.0, 1.0 - k] for k in range(4)}
    learned = Learned(divergence={(0, k): [float(k)] for k in range(4)}, logprob_gap=gaps)
    metrics = update_metrics([trajectory], [0], learned)
    assert metrics["rollout/error_rate"] == 0.25
    assert metrics["divergence/error_turns"] == 2
    assert metrics["divergence/clean_turns"] == pytest.approx(4 / 3)
    assert metrics["divergence/auc"] == pytest.approx(2 / 3)  # 2 is above 0 and 1, below 3
    assert metrics["divergence/pushed_down"] == pytest.approx(4 / 6)
