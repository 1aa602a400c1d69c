"""The training run, top to bottom: roll out, reflect, annotate, learn, evaluate, save."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hero import checkpoint
from hero.algorithms import Episodes, make_algorithm
from hero.algorithms.base import Demonstration
from hero.checks import check
from hero.config import TrainConfig, redacted
from hero.envs.base import HasDiagnosis, HasOracle, make_env
from hero.evaluation import Evaluation, evaluate
from hero.generation.hf import HFGenerator
from hero.interrupt import Interrupt
from hero.optim import Learned, Learner
from hero.policy import Policy
from hero.probes import Probe, probe_teacher
from hero.prompts import make_prompts
from hero.reflection import Reflections, make_reflector
from hero.report.console import Console
from hero.report.facts import header, reflector_facts, versions
from hero.report.metrics import Clock, update_metrics
from hero.report.tracking import METRICS, TRAJECTORIES, Tracker, trajectory_record, write_atomic
from hero.rollout import Episode, derive_seed, gold_episode, rollout
from hero.teacher import TeacherContext, TeacherWeights
from hero.types import Fault, Sample, Trajectory

ROLLOUT, REFLECT, LEARN, DEV, TEST, PROBE = range(6)  # purposes of derived seeds


@dataclass(kw_only=True, slots=True)
class State:
    """Counters that a resumed run goes on from."""

    update: int = 0
    env_turns: int = 0
    generated_tokens: int = 0
    steps_taken: int = 0
    best_update: int = -1
    best_dev: float = -1.0
    bad_evaluations: int = 0
    idle_updates: int = 0
    """Updates in a row without an optimiser step."""
    stopped: str = ""


class TeacherGate(Fault):
    """The hinted teacher does not act better than the student: training would teach nothing."""


class Trainer:
    """One run of one algorithm; `run()` is the whole of it.

    What a run leaves in `run_dir`: config.json, metrics.jsonl, trajectories.jsonl, before.json,
    best/ (the best model on dev), checkpoint/ (to go on from) and summary.json.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, recipe: str, console: Console) -> None:
        check(config)
        torch.manual_seed(config.seed)  # LoRA's initialisation
        self.config, self.run_dir, self.recipe, self.console = config, run_dir, recipe, console
        size = config.rollout.batch_size
        self.envs = [make_env(config.env.name, **config.env.options) for _ in range(size)]
        self.env = self.envs[0]
        self.policy = Policy.load(config.model)
        renderer = self.policy.renderer
        self.train_tasks = self.env.tasks("train")
        if not self.train_tasks:
            raise ValueError(f"Environment {config.env.name!r} has no task in its train split.")
        self.generator = HFGenerator(self.policy, size)
        self.play = partial(
            rollout,
            envs=self.envs,
            generator=self.generator,
            renderer=renderer,
            config=config.rollout,
        )
        prompts = make_prompts(config.prompts)
        self.teacher = TeacherWeights(self.policy, config.teacher)
        self.algorithm = make_algorithm(
            config.mode, TeacherContext(config.teacher, renderer, prompts)
        )
        longest = config.rollout.max_episode_tokens + config.teacher.max_block_tokens
        if config.teacher.packing == "tree" and not self.policy.sees_all(longest):
            raise ValueError(
                f"teacher.packing=tree needs layers that see all of {longest} tokens, and those of "
                f"{config.model.path!r} do not: set --teacher.packing separate."
            )
        self.reflector = None
        if self.algorithm.needs_reflection:
            self.reflector = make_reflector(
                config.reflection, env=self.env, generator=self.generator, renderer=renderer,
                prompts=prompts, teacher_weights=self.teacher.applied,
                max_prompt_tokens=self._reflection_room(),
            )  # fmt: skip
        self.learner = Learner(self.policy, self.teacher, config)
        self.state = State()
        self.interrupt = Interrupt()

    def _reflection_room(self) -> int | None:
        """Tokens left for a reflection request; None if the model that reads it is not ours."""
        config, context = self.config.reflection, self.policy.context
        if config.reflector not in ("self", "teacher"):
            return None
        if config.max_tokens >= context:
            raise ValueError(
                f"reflection.max_tokens={config.max_tokens} leaves no room for the episode in the "
                f"model's context of {context} tokens: lower --reflection.max-tokens."
            )
        return context - config.max_tokens

    # ---- the run ------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the summary, which is also written to `summary.json`.

        Raises:
            KeyboardInterrupt: after Ctrl-C. As after any error, the last finished update is saved.
            TeacherGate: `eval.min_teacher_lift` is not reached.
        """
        started = time.perf_counter()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        resumed = self._restore()
        if resumed is None:
            for name in (METRICS, TRAJECTORIES):  # of a run that ended before its first checkpoint
                (self.run_dir / name).unlink(missing_ok=True)
        write_atomic(self.run_dir / "config.json", json.dumps(redacted(self.config), indent=1))
        self.console.header(f"hero train {self.recipe}", header(self.config, self.policy))
        tracker = Tracker(self.run_dir, self.config.report_to, redacted(self.config), resumed)
        with self.interrupt:
            try:
                self._train(tracker, resumed is None)
                self.save()
                summary = self._after(tracker)  # takes over the best weights: nothing is saved now
            finally:
                tracker.close()
        summary["seconds"] = time.perf_counter() - started
        write_atomic(self.run_dir / "summary.json", json.dumps(summary, indent=1))
        return summary

    def _train(self, tracker: Tracker, from_start: bool) -> None:
        """All updates; whatever ends them early, the last finished one is saved."""
        try:
            if from_start:
                self._before(tracker)
            with self.console.training(self.config.updates, self.state.update):
                while not self._finished():
                    self._update(tracker)
        except BaseException:
            if self.state.update > 0 and not self.interrupt.torn:
                self.save()
            raise

    def _before(self, tracker: Tracker) -> None:
        """Evaluate the starting weights, then measure whether the teacher knows better."""
        self.console.say("Evaluating the starting model …")
        metrics: dict[str, float] = self._evaluate_dev(0)
        if self.config.eval.test_tasks:
            before = self._evaluate_test(tracker, "before", 0)
            write_atomic(self.run_dir / "before.json", json.dumps(before.to_dict()))
        if probe := self._probe():
            metrics |= probe.metrics()
            self.console.say(str(probe))
        tracker.log(0, metrics)
        if probe:
            needed = self.config.eval.min_teacher_lift
            if needed is not None and probe.lift < needed:
                raise TeacherGate(
                    f"The teacher's lift is {probe.lift:+.2f}, below "
                    f"eval.min_teacher_lift={needed}: with hindsight it does not act clearly "
                    "better, so there is nothing to distil. Use a better reflector "
                    "(--reflection.reflector rules or openai), a stronger model, or a warm start "
                    "(hero sft)."
                )

    def _update(self, tracker: Tracker) -> None:
        """One batch of episodes and what is learnt from it."""
        config, state, clock = self.config, self.state, Clock()
        number = state.update + 1
        self.console.stage("rollout")
        trajectories = self.play(
            self._episodes(number),
            seed=derive_seed(config.seed, ROLLOUT, number),
            policy_version=state.update,
        )
        clock.lap("rollout")
        self.console.stage("reflection")
        reflections = self._reflect(trajectories, derive_seed(config.seed, REFLECT, number))
        clock.lap("reflection")
        samples = self._annotate(trajectories, reflections)
        clock.lap("annotation")
        self.console.stage("training")
        metrics: dict[str, float] = {"learning_rate": self.learner.learning_rate}
        with self.interrupt.deferred():  # weights and counters change together
            learned = self.learner.learn(samples, derive_seed(config.seed, LEARN, number))
            state.update = number
            state.steps_taken = self.learner.steps_taken
            state.env_turns += sum(len(t.turns) for t in trajectories)
            state.generated_tokens += sum(t.num_action_tokens for t in trajectories)
            state.generated_tokens += reflections.stats.generated_tokens
            state.idle_updates = 0 if learned.steps else state.idle_updates + 1
        clock.lap("train")
        metrics |= update_metrics(trajectories, self.policy.renderer.stop_ids, learned)
        metrics |= reflections.stats.metrics() if self.reflector else {}
        metrics |= {"env_turns": state.env_turns, "generated_tokens": state.generated_tokens}
        if number % config.eval.every == 0 or self._finished():  # the last weights are judged too
            self.console.stage("evaluation")
            metrics |= self._evaluate_dev(number)
            clock.lap("evaluation")
        metrics |= clock.metrics()
        tracker.log(number, metrics)
        kept = range(min(config.save_trajectories, len(trajectories)))
        tracker.log_trajectories(
            number, [self._record(t, trajectories, reflections, learned, number) for t in kept]
        )
        self.console.update(number, metrics)
        if number % config.save_every == 0:
            self.save()

    def _finished(self) -> bool:
        config, state = self.config, self.state
        if state.update >= config.updates:
            state.stopped = f"all {config.updates} updates done"
        elif config.max_env_turns is not None and state.env_turns >= config.max_env_turns:
            state.stopped = f"the budget of {config.max_env_turns} environment turns is used up"
        elif state.bad_evaluations >= 2:
            state.stopped = (
                f"collapse: dev success was more than {config.eval.stop_drop:.2f} below its best "
                f"({state.best_dev:.2f}, update {state.best_update}) twice in a row"
            )
        elif state.idle_updates >= 5:
            state.stopped = (
                "nothing was trained in five updates in a row: no turn had a hint, an observation "
                "or an advantage to learn from, or no gradient was finite"
            )
        else:
            state.stopped = ""
        return bool(state.stopped)

    def _after(self, tracker: Tracker) -> dict[str, Any]:
        """Evaluate the best weights on the test split."""
        self.console.say(
            f"Stopped: {self.state.stopped}. Best update on dev: {self.state.best_update}."
        )
        summary: dict[str, Any] = {
            "recipe": self.recipe,
            "stopped": self.state.stopped,
            "best_update": self.state.best_update,
            "env_turns": self.state.env_turns,
            "device": str(self.policy.device),
            "versions": versions(),
            **reflector_facts(self.config),
        }
        earlier = self.run_dir / "before.json"
        if earlier.is_file():  # the tasks played then, also if a resumed run asks for others
            before = json.loads(earlier.read_text(encoding="utf-8"))
            self.config.eval.test_tasks = len(before["per_task"])
            self.policy.restore(self.run_dir / "best")
            after = self._evaluate_test(tracker, "after", self.state.update).to_dict()
            summary |= {"before": before, "after": after}
            self.console.final_table(before, after)
        return summary

    # ---- stages -------------------------------------------------------------------------------

    def _episodes(self, number: int) -> list[Episode]:
        """Tasks go by in a fixed random order, epoch after epoch; a group shares its task."""
        config, size = self.config, len(self.train_tasks)
        episodes = []
        for position in range(*(config.rollout.tasks_per_update * n for n in (number - 1, number))):
            epoch, place = divmod(position, size)
            order = random.Random(derive_seed(config.seed, epoch)).sample(range(size), size)
            group = f"u{number}-{position}"
            episodes += [
                Episode(
                    id=f"{group}-{member}", group_id=group, task_id=self.train_tasks[order[place]]
                )
                for member in range(config.rollout.group_size)
            ]
        return episodes

    def _reflect(self, trajectories: list[Trajectory], seed: int) -> Reflections:
        if self.reflector is None:
            return Reflections.none(trajectories)
        return self.reflector.reflect(trajectories, seed)

    def _annotate(self, trajectories: list[Trajectory], reflections: Reflections) -> list[Sample]:
        gold: dict[str, Demonstration] = {}
        if self.algorithm.needs_gold and isinstance(self.env, HasOracle):
            tasks = {trajectory.task_id for trajectory in trajectories}
            gold = {
                task: gold_episode(self.env, task, self.config.rollout.max_turns) for task in tasks
            }
        return self.algorithm.annotate(
            Episodes(trajectories=trajectories, diagnoses=reflections.diagnoses, gold=gold)
        )

    def _probe(self) -> Probe | None:
        """Teacher lift on dev episodes; None where the environment cannot judge or nothing is
        distilled."""
        if self.config.mode == "grpo" or not isinstance(self.env, HasDiagnosis):
            return None
        seed = derive_seed(self.config.seed, PROBE)
        tasks = self.env.tasks("dev")[: self.config.eval.dev_tasks]
        _, trajectories = evaluate(
            tasks, play=self.play, trials=1, temperature=self.config.rollout.temperature, seed=seed
        )
        reflections = self._reflect(trajectories, seed)
        samples = self._annotate(trajectories, reflections)
        return probe_teacher(
            self.env, trajectories, reflections.diagnoses, samples, generator=self.generator,
            weights=self.teacher, renderer=self.policy.renderer,
            max_turn_tokens=self.config.rollout.max_turn_tokens, seed=seed,
        )  # fmt: skip

    def _evaluate(
        self, split: str, tasks: int, purpose: int
    ) -> tuple[Evaluation, list[Trajectory]]:
        return evaluate(
            self.env.tasks(split)[:tasks], play=self.play, trials=self.config.eval.trials,
            temperature=self.config.eval.temperature, seed=derive_seed(self.config.seed, purpose),
        )  # fmt: skip

    def _evaluate_dev(self, number: int) -> dict[str, float]:
        """Play the dev tasks; keep the weights if they are the best so far."""
        result, _ = self._evaluate("dev", self.config.eval.dev_tasks, DEV)
        state = self.state
        with self.interrupt.deferred():
            if result.success > state.best_dev:
                state.best_dev, state.best_update = result.success, number
                with checkpoint.Replacing(self.run_dir / "best") as folder:
                    self.policy.save(folder)
            fell = result.success < state.best_dev - self.config.eval.stop_drop
            state.bad_evaluations = state.bad_evaluations + 1 if fell else 0
        return {"dev/success": result.success, "dev/score": result.score, "dev/turns": result.turns}

    def _evaluate_test(self, tracker: Tracker, split: str, number: int) -> Evaluation:
        result, trajectories = self._evaluate("test", self.config.eval.test_tasks, TEST)
        nothing = Reflections.none(trajectories)
        kept = range(min(self.config.save_trajectories, len(trajectories)))
        tracker.log_trajectories(
            number, [self._record(t, trajectories, nothing, Learned(), number, split) for t in kept]
        )
        return result

    def _record(
        self,
        t: int,
        trajectories: Sequence[Trajectory],
        reflections: Reflections,
        learned: Learned,
        number: int,
        split: str = "train",
    ) -> dict[str, Any]:
        turns = trajectories[t].turns
        gaps = [learned.logprob_gap.get((t, k)) for k in range(len(turns))]
        return trajectory_record(
            trajectories[t],
            reflections.diagnoses[t],
            tokens=[self.policy.renderer.pieces(turn.action_ids) for turn in turns],
            divergence=[learned.divergence.get((t, k)) for k in range(len(turns))],
            logprob_gap=gaps,
            trained=[gap is not None for gap in gaps]
            if self.config.mode != "grpo"
            else [True] * len(turns),
            update=number,
            split=split,
        )

    # ---- saving -------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state of the last finished update."""
        with self.interrupt.deferred():
            checkpoint.save_state(
                self.run_dir,
                state=asdict(self.state),
                student={name: p.data for name, p in self.policy.trainable().items()},
                teacher=self.teacher.state_dict(),
                optimizer=self.learner.optimizer,
            )

    def _restore(self) -> int | None:
        """Go on from the run's checkpoint if asked to; returns the update it is at, or None."""
        wanted = self.config.resume
        if wanted == "never" or (wanted == "auto" and checkpoint.find_state(self.run_dir) is None):
            return None
        saved = checkpoint.load_state(self.run_dir, self.policy.device)
        trainable = self.policy.trainable()
        shapes = {name: value.shape for name, value in saved["student"].items()}
        if shapes != {name: value.shape for name, value in trainable.items()}:
            raise checkpoint.BrokenCheckpoint(
                f"The checkpoint of {self.run_dir} has other trained weights than this "
                "configuration: resume "
                "with the settings in its config.json."
            )
        with torch.no_grad():
            for name, value in saved["student"].items():
                trainable[name].copy_(value)
        self.teacher.load_state_dict(saved["teacher"])
        self.state = State(**saved["state"])
        self.learner.load_state_dict(saved["optimizer"], self.state.steps_taken)
        return self.state.update
