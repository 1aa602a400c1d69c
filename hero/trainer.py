"""The training run, top to bottom: roll out, reflect, annotate, learn, evaluate, save."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hero.algorithms import MODES, Experience
from hero.checks import check
from hero.config import TrainConfig, redacted
from hero.envs.base import Environment, make_env
from hero.envs.border import disjoint_tasks
from hero.episodes import (
    assignments_of_update,
    derive_seed,
    gold_episodes,
    rewarded,
    rollout,
)
from hero.evaluation import Probe, dev_metrics, summarise, trials
from hero.files import find_checkpoint, load_checkpoint, replacing, save_checkpoint, write_atomic
from hero.interrupt import Interrupt
from hero.learner import Learned, Learner
from hero.policy import Policy
from hero.prompts import make_prompts
from hero.reflection import Reflections, Reflector, make_reflector
from hero.report.console import Console
from hero.report.facts import header, outcome
from hero.report.metrics import Clock, update_metrics
from hero.report.tracking import METRICS, TRAJECTORIES, Tracker, trajectory_records
from hero.sampler import HFSampler
from hero.state import State
from hero.teacher import TeacherContext, TeacherWeights
from hero.types import Sample, Trajectory
from hero.watch import Watch
from hero.worked import worked_episodes

ROLLOUT, REFLECT, LEARN, DEV, TEST, PROBE = range(6)  # purposes of derived seeds


class Trainer:
    """One run of one algorithm; `run()` is the whole of it.

    What a run leaves in `run_dir`: config.json, metrics.jsonl, trajectories.jsonl, before.json,
    best/ (the best model on dev), checkpoint/ (to go on from) and summary.json.
    """

    def __init__(
        self, config: TrainConfig, run_dir: Path, recipe: str = "", console: Console | None = None,
        *, environment: Callable[[], Environment] | None = None, policy: Policy | None = None,
        reflector: Reflector | None = None,
        callbacks: Sequence[Callable[[int, dict[str, float]], None]] = (),
    ) -> None:  # fmt: skip
        """Objects take the place of what settings would make; `callbacks` get (update, metrics)."""
        check(config)
        console = console or Console(io.StringIO(), terminal=False)
        torch.manual_seed(config.seed)  # LoRA's initialisation
        self.config, self.run_dir, self.recipe, self.console = config, run_dir, recipe, console
        size = config.rollout.batch_size
        make = environment or partial(make_env, config.env.name, **config.env.options)
        envs = [make() for _ in range(size)]
        self.env = envs[0]
        self.callbacks = callbacks
        self.policy = policy or Policy.load(config.model)
        renderer = self.policy.renderer
        splits = ["train", "dev", "test"] if config.eval.test_tasks else ["train", "dev"]
        self.tasks = disjoint_tasks(self.env, splits)
        shown, self.tasks["train"] = worked_episodes(
            self.env, self.tasks["train"], config.env.demonstrations, config.rollout.max_turns
        )
        self.teacher = TeacherWeights(self.policy, config.teacher)
        longest = config.rollout.max_episode_tokens + config.teacher.max_privileged_tokens
        if config.teacher.packing == "tree":
            self.teacher.policy.check_sees_all(longest)
        self.sampler = HFSampler(self.policy, size)
        teacher_sampler = HFSampler(self.teacher.policy, size)
        self.rollout = partial(
            rollout, envs=envs, sampler=self.sampler, renderer=renderer, config=config.rollout,
            shown=shown,
        )  # fmt: skip
        prompts = make_prompts(config.prompts)
        context = TeacherContext(config.teacher, renderer, prompts)
        self.algorithm = MODES[config.mode](context, config.loss)
        self.reflector = reflector if self.algorithm.needs_reflection else None
        if self.algorithm.needs_reflection and reflector is None:
            self.reflector = make_reflector(
                config.reflection, env=self.env, sampler=self.sampler, renderer=renderer,
                prompts=prompts, teacher_sampler=teacher_sampler,
                teacher_weights=self.teacher.applied,
                context=min(self.policy.context, self.teacher.policy.context),
            )  # fmt: skip
        self.watch = Watch(
            config, self.env, self.algorithm, self._reflect, self._annotate, self.teacher,
            (self.sampler, teacher_sampler), renderer,
        )  # fmt: skip
        self.learner = Learner(self.policy, self.teacher, config)
        self.state = State()
        self.interrupt = Interrupt()

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
                summary = self._after(tracker)  # loads the best weights, so do not save after this
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
                while not self.state.finished(self.config):
                    self._update(tracker)
        except BaseException:
            if self.state.update > 0 and not self.interrupt.torn:
                self.save()
            raise

    def _before(self, tracker: Tracker) -> None:
        """Measure whether the teacher knows better, then evaluate the starting weights."""
        metrics: dict[str, float] = {}
        try:
            if probe := self._probe():
                metrics |= probe.metrics()
                self.console.say(str(probe))
                probe.demand(self.config.eval.min_teacher_lift)
            self.console.say("Evaluating the starting model …")
            metrics |= self._evaluate_dev(0, {})
            if self.config.eval.test_tasks:
                before = self._evaluate_test(tracker, "before", 0)
                write_atomic(self.run_dir / "before.json", json.dumps(before))
        finally:
            tracker.log(0, metrics)

    def _update(self, tracker: Tracker) -> None:
        """One batch of episodes and what is learnt from it."""
        config, state, clock = self.config, self.state, Clock()
        number = state.update + 1
        self.console.stage("rollout")
        trajectories = self._play(number)
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
            state.reflection_tokens += reflections.stats.generated_tokens
            state.reflection_seconds += reflections.stats.seconds
            state.idle_updates = 0 if learned.steps else state.idle_updates + 1
        clock.lap("train")
        metrics |= update_metrics(trajectories, self.policy.renderer.stop_ids, learned)
        metrics |= reflections.stats.metrics() if self.reflector else {}
        totals = ("env_turns", "generated_tokens", "reflection_tokens", "reflection_seconds")
        metrics |= {name: getattr(state, name) for name in totals}
        last = self.state.finished(config)
        if number % config.eval.every == 0 or last:  # the last weights are judged too
            self.console.stage("evaluation")
            seed = derive_seed(config.seed, REFLECT, number)
            metrics |= self.watch.agreement(trajectories, reflections, seed)
            metrics |= self._evaluate_dev(number, metrics)
            clock.lap("evaluation")
        metrics |= clock.metrics()
        tracker.log(number, metrics)
        self._log_trajectories(tracker, number, "train", trajectories, reflections, learned)
        self.console.update(number, metrics)
        for callback in self.callbacks:
            callback(number, metrics)
        if state.collapse and state.rescues < config.eval.rescues:
            self._rescue()
        if number % config.save_every == 0:
            self.save()

    def _rescue(self) -> None:
        """Go back to the best weights, with half the learning rate and no momentum."""
        state, why = self.state, self.state.collapse
        with self.interrupt.deferred():
            self.learner.restart(self.run_dir / "best")
            state.rescues, state.collapse, state.bad_evaluations = self.learner.halvings, "", 0
            state.blind = ""
        self.console.say(
            f"Collapse: {why}. From the best weights (update {state.best_update}) at half the "
            f"learning rate, {self.learner.learning_rate:.3g} (rescue {state.rescues} of "
            f"--eval.rescues {self.config.eval.rescues})."
        )

    def _after(self, tracker: Tracker) -> dict[str, Any]:
        """Evaluate the best weights on the test split."""
        best = self.state.best_update or "0, training did not help"
        self.console.say(f"Stopped: {self.state.stopped}. Best update on dev: {best}.")
        summary = outcome(self.recipe, self.config, self.state, str(self.policy.device))
        earlier = self.run_dir / "before.json"
        if earlier.is_file():  # the tasks played then, also if a resumed run asks for others
            before = json.loads(earlier.read_text(encoding="utf-8"))
            self.config.eval.test_tasks = len(before["per_task"])
            last = summarise(self._held_out("test", self.config.eval.test_tasks, TEST)).to_dict()
            self.learner.select(self.run_dir / "best")
            if self.config.eval.select != "best":
                with replacing(self.run_dir / "selected") as folder:
                    self.policy.save(folder)
            after = self._evaluate_test(tracker, "after", self.state.update)
            summary |= {"before": before, "after": after, "last": last}
            self.console.final_table(before, after, last)
        return summary

    # ---- stages -------------------------------------------------------------------------------

    def _play(self, number: int) -> list[Trajectory]:
        """The episodes of an update, as many as the budget of turns holds.

        What an episode leaves of the turns set aside for it goes to further ones, so that the
        budget is met to the episode.
        """
        config, played = self.config, list[Trajectory]()
        waiting = assignments_of_update(self.tasks["train"], config.rollout, config.seed, number)
        seed = derive_seed(config.seed, ROLLOUT, number)
        while fit := self.state.affordable(config, sum(len(t.turns) for t in played)):
            if not (batch := waiting[len(played) :][:fit]):
                break
            played += self.rollout(batch, seed=seed + len(played))
        return rewarded(played, config.env.reward)

    def _reflect(self, trajectories: list[Trajectory], seed: int) -> Reflections:
        if self.reflector is None:
            return Reflections.none(trajectories)
        return self.reflector.reflect(trajectories, seed)

    def _annotate(self, trajectories: list[Trajectory], reflections: Reflections) -> list[Sample]:
        tasks = {trajectory.task_id for trajectory in trajectories}
        gold = {}
        if self.algorithm.needs_gold:
            gold = gold_episodes(self.env, tasks, self.config.rollout.max_turns)
        return self.algorithm.samples(
            Experience(trajectories=trajectories, diagnoses=reflections.diagnoses, gold=gold)
        )

    def _probe(self) -> Probe | None:
        """Teacher lift on dev episodes; None if nothing is distilled or nobody can judge."""
        if not self.watch.judges:
            return None
        seed = derive_seed(self.config.seed, PROBE)
        tasks = self.tasks["dev"][: self.config.eval.dev_tasks]
        with self.console.counting("probe") as count:
            played = self.rollout(trials(tasks, 1), seed=seed, count=count)
        return self.watch.lift(played, seed)

    def _held_out(self, split: str, tasks: int, purpose: int) -> list[Trajectory]:
        config = self.config.eval
        with self.console.counting(f"{split} tasks") as count:
            return self.rollout(
                trials(self.tasks[split][:tasks], config.trials), count=count,
                seed=derive_seed(self.config.seed, purpose), temperature=config.temperature,
            )  # fmt: skip

    def _evaluate_dev(self, number: int, update: dict[str, float]) -> dict[str, float]:
        """Evaluate on the dev tasks; keep the weights if they are the best so far."""
        trajectories = self._held_out("dev", self.config.eval.dev_tasks, DEV)
        metrics = dev_metrics(trajectories)
        if self.config.eval.watch_teacher and number > 0:
            seed = derive_seed(self.config.seed, PROBE, number)
            metrics |= self.watch.lift(trajectories, seed).metrics()
        with self.interrupt.deferred():
            if self.state.judge(update | metrics, number, self.config.eval.stop_drop):
                with replacing(self.run_dir / "best") as folder:
                    self.policy.save(folder)
            if self.state.watch(update | metrics, self.config):
                self.teacher.refresh()
                self.console.say(f"The teacher takes over the weights of update {number}.")
        if self.config.teacher.refresh == "gated":
            metrics["teacher/refreshes"] = self.state.refreshes
        return metrics

    def _evaluate_test(self, tracker: Tracker, split: str, number: int) -> dict[str, Any]:
        trajectories = self._held_out("test", self.config.eval.test_tasks, TEST)
        read = Reflections.none(trajectories)
        self._log_trajectories(tracker, number, split, trajectories, read, Learned())
        return summarise(trajectories).to_dict()

    def _log_trajectories(
        self, tracker: Tracker, number: int, split: str, trajectories: list[Trajectory],
        reflections: Reflections, learned: Learned,
    ) -> None:  # fmt: skip
        """Write down the first trajectories with what was learnt from each turn."""
        tracker.log_trajectories(trajectory_records(
            trajectories[: self.config.save_trajectories], reflections.diagnoses, learned,
            pieces=self.policy.renderer.pieces, update=number, split=split,
        ))  # fmt: skip

    # ---- saving -------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state of the last finished update."""
        with self.interrupt.deferred():
            save_checkpoint(
                self.run_dir, state=asdict(self.state), teacher=self.teacher.state_dict(),
                student={name: p.data for name, p in self.policy.trainable().items()},
                optimizer=self.learner.state_dict(),
            )  # fmt: skip

    def _restore(self) -> int | None:
        """Go on from the run's checkpoint if asked to; returns the update it is at, or None."""
        wanted = self.config.resume
        if wanted == "never" or (wanted == "auto" and find_checkpoint(self.run_dir) is None):
            return None
        saved = load_checkpoint(self.run_dir, self.policy.device)
        self.policy.take_over(saved["student"], self.run_dir)
        self.teacher.load_state_dict(saved["teacher"])
        self.state = State(**saved["state"])
        self.learner.load_state_dict(saved["optimizer"], self.state.steps_taken)
        self.learner.halvings = self.state.rescues
        return self.state.update
