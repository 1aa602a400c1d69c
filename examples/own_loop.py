"""A training loop of one's own, from the parts that `hero train` is made of.

python examples/own_loop.py [UPDATES]
"""

from __future__ import annotations

import sys

import torch

from hero import evaluate, rollout
from hero.algorithms import MODES, Experience
from hero.checks import from_dict
from hero.envs.shop import ShopEnv
from hero.learner import Learner
from hero.policy import Policy
from hero.prompts import make_prompts
from hero.recipes import load_recipe
from hero.teacher import TeacherContext, TeacherWeights


def main(updates: int) -> None:
    torch.manual_seed(0)
    config = from_dict(load_recipe("quickstart"))
    policy, env = Policy.load(config.model), ShopEnv(profile="tiny")
    teacher = TeacherWeights(policy, config.teacher)
    context = TeacherContext(config.teacher, policy.renderer, make_prompts(config.prompts))
    algorithm = MODES[config.mode](context, config.loss)
    learner = Learner(policy, teacher, config)
    for update in range(updates):
        tasks = env.tasks("train")[16 * update : 16 * update + 16]
        episodes = rollout(policy, ShopEnv, tasks, config=config.rollout, seed=update)
        diagnoses = [env.diagnose(episode) for episode in episodes]
        samples = algorithm.samples(Experience(trajectories=episodes, diagnoses=diagnoses, gold={}))
        learned = learner.learn(samples, seed=update)
        print(f"update {update + 1}: loss {learned.loss:.3f}, {len(learned.trained)} turns trained")
    result = evaluate(policy, ShopEnv, env.tasks("test")[:16], config=config.rollout)
    print(f"success on held-out tasks: {result.success:.0%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
