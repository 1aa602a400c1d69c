"""The training run, top to bottom: roll out, reflect, annotate, learn, evaluate, save."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hero.callbacks import Callback, Callbacks
from hero.checks import check, check_ranks
from hero.config import TrainConfig, redacted
from hero.envs import border
from hero.envs.base import Environment
from hero.envs.workers import closing
from hero.episodes import derive_seed
from hero.evaluation import dev_metrics, summarise
from hero.files import replacing, write_atomic
from hero.learner import Learned, Learner
from hero.memory import beside_measured
from hero.policy import Policy
from hero.ranks import Ranks, open_ranks
from hero.reflection import Reflections, Reflector
from hero.report.card import write_card
from hero.report.console import Console
from hero.report.facts import header, outcome
from hero.report.metrics import Clock, update_metrics
from hero.report.tracking import Tracker, trajectory_record
from hero.resume import restore, save
from hero.run_folder import BEFORE, BEST, SELECTED, SUMMARY, RunFolder
from hero.stages import LEARN, PROBE, REFLECT, Stages
from hero.state import State
from hero.types import Trajectory


class Trainer:
    """One run of one algorithm; `run()` is the whole of it.

    What it leaves in `run_dir` stands in hero/run_folder.py.
    """

    def __init__(
        self, config: TrainConfig, run_dir: Path, recipe: str = "", console: Console | None = None,
        *, environment: Callable[[], Environment] | None = None, policy: Policy | None = None,
        reflector: Reflector | None = None,
        callbacks: Sequence[Callback | Callable[[int, Any], object]] = (),
        ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        """Objects take the place of what settings would make; a function as callback gets (update,
        metrics) of each update. `ranks` are those that a launcher has started, if not given."""
        check(config)
        self.ranks = ranks = ranks or open_ranks(config.model.device)
        check_ranks(config, ranks.size)
        console = (console if ranks.is_first else None) or Console(io.StringIO(), terminal=False)
        torch.manual_seed(config.seed)  # LoRA's initialisation
        self.config, self.recipe, self.console = config, recipe, console
        self.run_dir = run_dir.absolute()  # worlds may change the folder one stands in
        self.folder = RunFolder(self.run_dir)
        self.callbacks = ranks.of_first(partial(Callbacks, callbacks))
        self.policy = policy or Policy.load(config.model)
        self.policy.spread(ranks)
        self.stages = Stages(config, self.policy, console, environment, reflector, ranks)
        self.teacher = self.stages.teacher
        self.learner = Learner(self.policy, self.teacher, config)
        self.state = State()
        self.interrupt = ranks.interrupt
        self.is_begun = False
        """Whether the folder is this run's, with a checkpoint in it."""
        self._is_torn = False

    # ---- the run ------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the summary, which is also written to `summary.json`.

        Raises:
            KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP. As after any error, what is finished
                is saved, and a run that goes on from it repeats nothing.
            TeacherGate: `eval.min_teacher_lift` is not reached.
            ValueError: the folder holds another run, or what is no run's.
            Fault: another process is writing there, or another rank has met an error.
        """
        started, first = time.perf_counter(), self.ranks.on_first
        closed = closing(self.stages.workers, self.stages.env, self.console.say)
        with self.ranks.within(self.folder.locked), self.interrupt, closed:
            if first(partial(self.folder.begin, self.config)):
                self.state, said = restore(self.run_dir, self.learner)
                if said:
                    self.console.say(said)
            else:
                self.save()  # from here on the run can be gone on with
            self.is_begun = True
            self.console.header(f"hero train {self.recipe}", header(self.config, self.policy))
            self.callbacks.on_start(self)
            settings, to = redacted(self.config), self.config.report_to
            tracker = self.ranks.of_first(
                partial(Tracker, self.run_dir, to, settings, self.state.logged)
            )
            try:
                self._train(tracker)
                self.save()
                summary = self._after(tracker)  # loads the best weights, so do not save after this
            finally:
                tracker.close()
            self.console.say(beside_measured(self.config, self.policy))
            summary["seconds"] = time.perf_counter() - started
            first(partial(write_atomic, self.folder / SUMMARY, json.dumps(summary, indent=1)))
            self.callbacks.on_end(summary)
        return summary

    def _train(self, tracker: Tracker) -> None:
        """All updates; whatever ends them early, what is finished is saved."""
        try:
            if not self.state.is_begun:
                self._before(tracker)
            with self.console.training(self.config.updates, self.state.update):
                while self._goes_on():
                    if not self.state.pending:
                        self._update()
                    self._log(tracker)
                    if self.state.update % self.config.save_every == 0:
                        self.save()
        except BaseException as error:
            if self.state.is_begun and not self.is_torn and self.ranks.in_step(error):
                self.save()
            raise

    @property
    def is_torn(self) -> bool:
        """Whether the weights are not those of `state`, as something was interrupted half-way."""
        changed = self.learner.steps_taken != self.state.steps_taken
        return self._is_torn or self.interrupt.torn or changed

    def _goes_on(self) -> bool:
        state = self.state
        if state.pending:
            return True
        if state.collapse and state.rescues < self.config.eval.rescues:
            self._rescue()
        return not state.finished(self.config)

    def _before(self, tracker: Tracker) -> None:
        """Measure whether the teacher knows better, then evaluate the starting weights."""
        metrics: dict[str, float] = {}
        try:
            if probe := self.stages.probe():
                metrics |= probe.metrics()
                self.console.say(str(probe))
                self.ranks.on_first(partial(probe.demand, self.config.eval.min_teacher_lift))
            self.console.say("Evaluating the starting model …")
            self._evaluate_dev(0, metrics)
            if self.config.eval.test_tasks:
                before = self._evaluate_test(tracker, "before", 0)
                write = partial(write_atomic, self.folder / BEFORE, json.dumps(before))
                self.ranks.on_first(write)
        except BaseException as error:
            if self.ranks.in_step(error):
                tracker.log(0, metrics)
            raise
        tracker.log(0, metrics)
        self._say_unknown()
        self.state.is_begun = True

    def _say_unknown(self) -> None:
        if said := self.policy.renderer.newly_unknown():
            self.console.say(said)

    def _update(self) -> None:
        """One batch of episodes and what is learnt from it; `state.pending` is what to log."""
        config, state, clock = self.config, self.state, Clock()
        number = state.update + 1
        self.console.stage("rollout")
        trajectories = self.stages.play(number, self.state)
        clock.lap("rollout")
        self.console.stage("reflection")
        reflections = self.stages.reflect(trajectories, derive_seed(config.seed, REFLECT, number))
        clock.lap("reflection")
        self.callbacks.on_episodes(number, trajectories, reflections.diagnoses)
        trajectories, reflections = self.ranks.broadcast((trajectories, reflections))
        samples = self.ranks.apart(partial(self.stages.annotate, trajectories, reflections))
        metrics: dict[str, float] = {"learning_rate": self.learner.learning_rate}
        turns = sum(len(trajectory.turns) for trajectory in trajectories)
        if self._is_judged(number, turns):
            seed = derive_seed(config.seed, REFLECT, number)
            found = self.stages.watch.agreement(trajectories, reflections, seed)
            metrics |= self.ranks.broadcast(found)
        clock.lap("annotation")
        version = self.stages.sampler.version
        self.console.stage("training")
        self.stages.sampler.rest()
        with self.interrupt.deferred():  # weights, counters and what is pending change together
            learned = self.learner.learn(samples, derive_seed(config.seed, LEARN, number))
            state.update, state.steps_taken = number, self.learner.steps_taken
            state.pending = {"metrics": metrics, "records": [], "is_judged": False}
            generated = state.count(trajectories, reflections.stats)
            state.count_idle(learned.steps == 0 or reflections.stats.unread)
            clock.lap("train")
            renderer = self.policy.renderer
            metrics |= update_metrics(trajectories, renderer.stop_ids, learned, renderer.unknown_id)
            metrics |= reflections.stats.metrics() if self.stages.reflector else {}
            metrics |= state.totals() | clock.metrics() | {"rollout/policy_version": version}
            metrics["tokens_per_second"] = generated / max(1e-9, sum(clock.metrics().values()))
            state.pending["records"] = self._records(
                number, "train", trajectories, reflections, learned
            )

    def _is_judged(self, number: int, turns: int = 0) -> bool:
        """Whether an update is evaluated: in turn, or as the last one.

        Args:
            turns: of this update, which `state.env_turns` does not hold yet.
        """
        is_last = number >= self.config.updates or not self.state.affordable(self.config, turns)
        return number % self.config.eval.every == 0 or is_last

    def _log(self, tracker: Tracker) -> None:
        """Evaluate the update that is pending, if that is due, and write it down.

        Wherever this is interrupted, a run that goes on begins here again.
        """
        number, pending = self.state.update, self.state.pending
        assert pending is not None
        metrics, clock = pending["metrics"], Clock()
        due = self._is_judged(number) or self.state.finished(self.config)
        if due and not pending["is_judged"]:
            self.console.stage("evaluation")
            self._evaluate_dev(number, metrics)
            clock.lap("evaluation")
            metrics |= clock.metrics()
        with self.interrupt.deferred():
            tracker.log(number, metrics)
            tracker.log_trajectories(pending["records"])
            self.state.pending = None
        self.console.update(number, metrics)
        self._say_unknown()
        self.callbacks.on_update(number, metrics)

    def _rescue(self) -> None:
        """Go back to the best weights, with half the learning rate and no momentum."""
        state, why = self.state, self.state.collapse
        with self.interrupt.deferred():
            self._is_torn = True  # until all of it is done
            self.learner.restart(self.folder / BEST)
            state.rescues, state.collapse, state.bad_evaluations = self.learner.halvings, "", 0
            state.blind = ""
            self._is_torn = False
        self.console.say(
            f"Collapse: {why}. From the best weights (update {state.best_update}) at half the "
            f"learning rate, {self.learner.learning_rate:.3g} (rescue {state.rescues} of "
            f"--eval.rescues {self.config.eval.rescues})."
            + (" The live teacher stays there." if self.config.teacher.weights == "live" else "")
        )

    def _after(self, tracker: Tracker) -> dict[str, Any]:
        """Evaluate the last and the selected weights on the test split."""
        best = self.state.best_update or "0, training did not help"
        self.console.say(f"Stopped: {self.state.stopped}. Best update on dev: {best}.")
        summary = outcome(self.recipe, self.config, self.state, str(self.policy.device))
        summary["world"] = border.facts(self.stages.env)
        before = self.ranks.on_first(self.folder.read_before)
        if before:  # its tasks, also if a resumed run asks for others
            self.config.eval.test_tasks = len(before["per_task"])
            last = summarise(self.stages.held_out("test", self.config.eval.test_tasks)).to_dict()
            self.learner.select(self.folder / BEST)
            chosen, at = (BEST, self.state.best_update)
            if self.config.eval.select != "best":
                chosen, at = SELECTED, self.state.update
                self._keep(SELECTED, at, {})
            after = self._evaluate_test(tracker, "after", self.state.update)
            summary |= {"before": before, "after": after, "last": last}
            self.ranks.on_first(
                partial(write_card, self.folder / chosen, self.config, at, {}, summary)
            )
            self.console.final_table(before, after, last)
        return summary

    # ---- held-out tasks ----------------------------------------------------------------------

    def _evaluate_dev(self, number: int, metrics: dict[str, float]) -> None:
        """Evaluate on the dev tasks, into `metrics`; keep the weights if they are the best."""
        played = self.stages.held_out("dev", self.config.eval.dev_tasks)
        found = dev_metrics(played)
        if self.config.eval.watch_teacher and number > 0:
            seed = derive_seed(self.config.seed, PROBE, number)
            found |= self.stages.watch.lift(played, seed).metrics()
        found = self.ranks.broadcast(found)
        with self.interrupt.deferred():
            state = deepcopy(self.state)
            if state.judge(metrics | found, number, self.config.eval.stop_drop):
                self._keep(BEST, number, found)
            refresh = state.watch(metrics | found, self.config)
            metrics |= found
            if self.config.teacher.refresh == "gated":
                metrics["teacher/refreshes"] = state.refreshes
            if state.pending:
                state.pending = {**state.pending, "metrics": metrics, "is_judged": True}
            self._is_torn = refresh  # until the teacher is refreshed too
            self.state = state
            if refresh:
                self.teacher.refresh()
                self._is_torn = False
                self.console.say(f"The teacher takes over the weights of update {number}.")
        self.callbacks.on_evaluation(number, played, found)

    def _evaluate_test(self, tracker: Tracker, split: str, number: int) -> dict[str, Any]:
        trajectories = self.stages.held_out("test", self.config.eval.test_tasks)
        read = Reflections.none(trajectories)
        tracker.log_trajectories(self._records(number, split, trajectories, read, Learned()))
        return summarise(trajectories).to_dict()

    def _records(
        self, number: int, split: str, trajectories: list[Trajectory],
        reflections: Reflections, learned: Learned,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The first trajectories, with what was learnt from each turn, as they are logged."""
        return [
            trajectory_record(
                trajectory, reflections.diagnoses[t], learned, number=t,
                pieces=self.policy.renderer.pieces, update=number, split=split,
            )
            for t, trajectory in enumerate(trajectories[: self.config.save_trajectories])
        ]  # fmt: skip

    def _keep(self, name: str, number: int, metrics: dict[str, float]) -> None:
        """Write the weights of update `number` to a folder that can be uploaded as it is."""
        world = border.facts(self.stages.env)

        def write() -> None:
            with replacing(self.folder / name) as folder:
                self.policy.save(folder, weights)
                write_card(folder, self.config, number, metrics, {"world": world})

        with self.policy.shards.whole_weights() as weights:
            self.ranks.on_first(write)

    # ---- saving -------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state of the last finished update."""
        with self.interrupt.deferred():
            save(self.run_dir, self.state, self.learner)
