"""What a run is when it goes on: counters, weights, teacher and optimiser, saved and taken over.

Weights in shards are saved whole, by rank 0, so a checkpoint does not say how many ranks wrote it
and any number of them can go on from it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from hero.checkpoint import BrokenCheckpoint, load_checkpoint, save_checkpoint
from hero.learner import Learner
from hero.shards import gathered
from hero.state import State


def save(run_dir: Path, state: State, learner: Learner) -> None:
    """Write the state of the last finished update."""
    ranks = learner.ranks
    student = {name: p.data for name, p in learner.policy.trainable().items()}
    tensors = {
        "student": student, "teacher": learner.teacher.state_dict(),
        "optimizer": learner.state_dict(),
    }  # fmt: skip
    whole = gathered(tensors, ranks.is_first)
    state.fixed = _fixed(learner)
    ranks.on_first(lambda: save_checkpoint(run_dir, state=asdict(state), **whole))


def restore(run_dir: Path, learner: Learner) -> tuple[State, str]:
    """Go on from the run's checkpoint; returns where it stood, and what has to be said about it.

    Raises:
        BrokenCheckpoint: it cannot be read, or is not of this model and these settings.
    """
    policy, teacher = learner.policy, learner.teacher
    cpu = torch.device("cpu")
    saved, said = learner.ranks.apart(lambda: load_checkpoint(run_dir, cpu, State.of))
    state = saved["state"]
    if state.fixed != _fixed(learner):
        raise BrokenCheckpoint(
            f"The checkpoint in {run_dir} was made when --model.path or --teacher.path held "
            "another model: frozen weights or the tokenizer differ. Put it back, or start anew in "
            "another --output-dir."
        )
    policy.take_over(saved["student"], run_dir)
    try:
        if state.rescues:  # a live teacher is held since the first
            teacher.restart()
        teacher.load_state_dict(saved["teacher"])
        learner.load_state_dict(saved["optimizer"], state.steps_taken)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise BrokenCheckpoint(
            f"The checkpoint in {run_dir} does not fit this run ({error}): it is of "
            "another version or of other settings. Start anew in another --output-dir."
        ) from error
    learner.halvings = state.rescues
    policy.version = state.steps_taken + state.rescues  # as if the run had not been interrupted
    return state, said


def _fixed(learner: Learner) -> str:
    """Of all that is loaded from elsewhere and not saved here."""
    policies = dict.fromkeys((learner.policy, learner.teacher.policy))
    return " ".join(policy.fixed for policy in policies)
