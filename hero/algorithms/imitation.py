"""The plain alternative to hindsight: learn the corrected action instead of a teacher's opinion."""

from __future__ import annotations

import math

from hero.algorithms.base import Algorithm, Experience
from hero.types import Sample


class Imitation(Algorithm):
    """Cross-entropy of the corrected action on turns that have one, in the student's own states.

    A control for hints that name the answer: what is left of HERO if the teacher is taken away.
    (DAgger, arXiv 1011.0686, with the reflector as expert.)
    """

    needs_reflection = True
    distils = False

    def annotate(self, experience: Experience) -> list[Sample]:
        renderer, samples = self.context.renderer, []
        for sample in self.turns(experience):
            diagnosis = experience.diagnoses[sample.trajectory][sample.turn]
            if diagnosis.hint and diagnosis.corrected_action:
                ids = [*renderer.encode(diagnosis.corrected_action), renderer.end_id]
                sample.action_ids, sample.sampled_logprobs = ids, [math.nan] * len(ids)
                sample.pg_weight = sample.advantage = 1.0
                samples.append(sample)
        return samples
