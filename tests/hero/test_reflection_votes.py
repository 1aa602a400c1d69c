"""Votes on a diagnosis, and corrected actions tried out. Oracle: cases worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from shop_helpers import oracle_actions, trajectory

from hero.checks import check, from_dict
from hero.envs.shop import ShopEnv
from hero.reflection import Reflections, ReflectionStats
from hero.reflection.verify import VerifiedReflector
from hero.reflection.votes import VotingReflector
from hero.types import Diagnosis, Trajectory


def said(text: str) -> Diagnosis:
    """ "" is no hint, else a hint whose corrected action is the text before its colon."""
    action, _, hint = text.partition(":")
    return Diagnosis(turn=0, hint=hint or action, corrected_action=action if hint else "")


@dataclass
class Reader:
    """Says one thing after the other."""

    rounds: list[list[list[Diagnosis]]]
    seeds: list[int] = field(default_factory=list)

    def reflect(self, trajectories: Sequence[Trajectory], seed: int) -> Reflections:
        rows = self.rounds[len(self.seeds)]
        self.seeds.append(seed)
        stats = ReflectionStats(
            turns=1, non_empty=9, retried=1, generated_tokens=10, seconds=0.5, parsed=1
        )
        return Reflections(diagnoses=rows, stats=stats)


@pytest.mark.parametrize(
    ("ballots", "elected"),
    [
        (["go:look", "go:see", "stay:wait"], "go:look"),
        (["stay:wait", "go:look", "go:see"], "go:look"),
        (["go:look", "", ""], ""),
        (["go:look", "go:see", "", ""], "go:look"),  # half is enough
        (["go:look", "stay:wait", ""], ""),  # they agree on a fault, not on what is right
        (["look", "see", ""], "look"),
        (["", "", ""], ""),
        (["go:look"], "go:look"),
    ],
)
def test_at_least_half_have_to_agree(
    episode: Callable[..., Trajectory], ballots: list[str], elected: str
) -> None:
    reader = Reader([[[said(ballot)]] for ballot in ballots])
    read = VotingReflector(reader, len(ballots)).reflect([episode(["s"])], seed=3)
    assert read.diagnoses == [[said(elected)]]
    assert len(set(reader.seeds)) == len(ballots)
    count = len(ballots)
    assert read.stats.non_empty == bool(elected) and read.stats.parsed == 1
    assert (read.stats.generated_tokens, read.stats.retried) == (10 * count, count)
    assert read.stats.seconds == 0.5 * count


@pytest.mark.parametrize("reflection", [{"reflector": "rules"}, {"temperature": 0.0}])
def test_votes_of_one_voice_are_refused(reflection: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"reflection\.votes=3 compares"):
        check(from_dict({"reflection": {"votes": 3, **reflection}}))


@pytest.fixture(scope="module")
def played() -> Trajectory:
    """The oracle's episode of a task, as the shop answered it."""
    env = ShopEnv("tiny")
    task = env.tasks("train")[0]
    done = trajectory(task, oracle_actions(env, task))
    env.reset(task)
    for turn in done.turns:
        turn.observation, reward, *_ = env.step(turn.action_text)
    done.reward = reward
    assert reward == 1.0 and len(done.turns) >= 4
    return done


@pytest.mark.parametrize(
    ("turn", "action", "kept"),
    [
        (1, "the oracle's", True),
        (0, "click[buy now]", False),  # not on the page
        (1, "buy it", False),  # no action
        (-1, "back to search", True),  # a way on, if not the shortest
        (-2, "click[buy now]", False),  # ends the episode for less
        (-1, "click[buy now]", True),
        (-1, "", True),  # nothing to try
    ],
)
def test_a_corrected_action_is_tried_where_it_belongs(
    played: Trajectory, turn: int, action: str, kept: bool
) -> None:
    turn %= len(played.turns)
    action = {"the oracle's": played.turns[turn].action_text, "back to search": "search[red]"}.get(
        action, action
    )
    own = Diagnosis(turn=turn, hint="look", corrected_action=action, source="self")
    row = [own if k == turn else Diagnosis(turn=k) for k in range(len(played.turns))]
    [judged] = VerifiedReflector(Reader([[row]]), ShopEnv("tiny")).reflect([played], 0).diagnoses
    assert judged[turn] == (own if kept else Diagnosis(turn=turn, source="self"))
    assert judged[:turn] + judged[turn + 1 :] == row[:turn] + row[turn + 1 :]


def test_a_state_that_cannot_be_restored_confirms_nothing(played: Trajectory) -> None:
    """Another shop, with other goods: what was observed does not come again."""
    own = Diagnosis(turn=2, hint="look", corrected_action="search[red]")
    row = [own if k == 2 else Diagnosis(turn=k) for k in range(len(played.turns))]
    other = ShopEnv("tiny", catalogue_seed=1)
    read = VerifiedReflector(Reader([[row]]), other).reflect([played], 0)
    assert not read.diagnoses[0][2].hint
    assert read.stats.metrics()["reflection/replayed_turns"] == 3
    assert read.stats.non_empty == 0
