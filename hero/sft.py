"""Warm start: supervised training on targets of three kinds, mixed in every step.

A small model needs to have met the method's texts before it can use them (hero/targets.py). What is
unfinished stands in OUTPUT_DIR.unfinished, with a checkpoint from which the same command goes on.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hero.checkpoint import BrokenCheckpoint, checkpoints, load_checkpoint, save_checkpoint
from hero.config import SftConfig, redacted
from hero.envs import border
from hero.envs.base import make_env
from hero.episodes import derive_seed
from hero.files import new_folder, refuse_to_replace, write_atomic
from hero.interrupt import Interrupt
from hero.packing import Row, in_groups, student_rows, teacher_rows, to_tensors
from hero.policy import Policy
from hero.report.console import Console
from hero.run_folder import CONFIG, RunFolder
from hero.scratch import build_model, build_tokenizer
from hero.targets import KINDS, make_targets
from hero.types import Sample

ADAM_BYTES = 16
"""Of each trained parameter: weight, gradient and two moments in float32."""
LINES = 100
"""Steps between two lines of losses."""


def train_sft(config: SftConfig, console: Console) -> Path:
    """Make the targets, train, and write the model; returns its folder.

    Raises:
        ValueError: the environment cannot demonstrate or diagnose, or a folder is not ours.
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP; the steps taken are saved.
    """
    out = Path(config.output_dir).absolute()
    refuse_to_replace(out)
    unfinished = RunFolder(out.resolve().with_name(f"{out.resolve().name}.unfinished"))
    with unfinished.locked(), Interrupt() as interrupt:
        try:
            if checkpoints(unfinished.path):
                _refuse_other_settings(unfinished, config)
            write_atomic(unfinished / CONFIG, json.dumps(redacted(config), indent=1))
            start = WarmStart(config, console, unfinished.path, interrupt)
            try:
                start.run()
                with new_folder(out) as new, start.policy.shards.whole_weights() as weights:
                    start.policy.save(new, weights)
            except BaseException as stop:
                start.keep(stop)
                raise
            shutil.rmtree(unfinished.path)
        finally:
            if not checkpoints(unfinished.path):
                shutil.rmtree(unfinished.path, ignore_errors=True)
    return out


def _refuse_other_settings(folder: RunFolder, config: SftConfig) -> None:
    if changed := folder.differences(config):
        raise ValueError(
            f"{folder.path} holds an unfinished warm start with other settings:\n"
            + "\n".join(changed)
            + "\nGo on with those, remove the folder, or name another --output-dir."
        )


class WarmStart:
    """Policy, targets and optimiser of one warm start; `run()` takes the steps that are left."""

    def __init__(
        self, config: SftConfig, console: Console, folder: Path, interrupt: Interrupt
    ) -> None:
        self.config, self.console, self.folder, self.interrupt = config, console, folder, interrupt
        torch.manual_seed(config.seed)
        self.env = make_env(config.env.name, **config.env.options)
        needed = ["demonstrate", "oracle", "diagnose"]
        needed += ["random_action"] if any(config.coverage_noise) else []
        if missing := [name for name in needed if not hasattr(self.env, name)]:
            raise ValueError(
                f"hero sft needs an environment with {', '.join(missing)}; {config.env.name} has "
                "none."
            )
        self.policy = _load(config, self.env)
        self.parameters = self.policy.to_train()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.step = 0
        self.means: dict[str, float] = {}
        """Running mean of each kind's loss, nats a token."""
        if checkpoints(folder):
            self._restore()
        trained = sum(parameter.numel() for parameter in self.parameters)
        console.say(
            f"{self.policy.num_parameters:,} parameters, {trained:,} trained: "
            f"{trained * ADAM_BYTES / 2**30:.1f} GiB for weights, gradients and optimiser, and "
            f"activations of at most {config.micro_batch_tokens:,} tokens at once "
            "(--micro-batch-tokens)."
        )

    def run(self) -> None:
        """Make the targets and take the steps that are left.

        Raises:
            ValueError: a kind of targets is empty.
        """
        started = time.perf_counter()
        with self.console.counting("episodes") as count:
            targets = make_targets(self.config, self.env, self.policy.renderer, count)
        found = ", ".join(f"{len(targets[kind])} {kind}" for kind in KINDS)
        if not all(targets.values()):
            raise ValueError(
                f"A warm start needs episodes of all kinds, got {found}: raise "
                "--demonstrator-episodes."
            )
        self.console.say(f"{found} episodes in {time.perf_counter() - started:.0f} s")
        order = random.Random(derive_seed(self.config.seed, 1))
        batches = (
            {kind: _draw(targets[kind], self.config.batch_size, order) for kind in KINDS}
            for _ in range(self.config.steps)
        )
        first, tokens, began = self.step, 0, time.perf_counter()
        with self.console.counting("training", "steps", first) as count:
            for batch in itertools.islice(batches, first, None):
                with self.interrupt.deferred():
                    tokens += self._take_step(batch)
                count(self.step, self.config.steps)
                if self.step % self.config.save_every == 0:
                    self.save()
                if self.step % LINES == 0 or self.step == self.config.steps:
                    self._say(tokens, first, time.perf_counter() - began)

    def _take_step(self, batch: dict[str, list[Sample]]) -> int:
        """One optimiser step; returns how many tokens were read."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * _schedule(self.step, self.config)
        read = 0
        for kind, samples in batch.items():
            total = sum(len(sample.action_ids) for sample in samples)
            loss = 0.0
            for part, rows in parts(kind, samples, self.config.micro_batch_tokens):
                with self.policy.learning():
                    share = nll(self.policy, rows, part) / total
                    share.backward()  # type: ignore[no-untyped-call]
                loss += float(share.detach())
                read += sum(map(len, rows))
            self.means[kind] = 0.98 * self.means.get(kind, loss) + 0.02 * loss
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        with self.policy.shards.resharded():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return read

    def _say(self, tokens: int, first: int, seconds: float) -> None:
        losses = "  ".join(f"{kind} {value:.3f}" for kind, value in self.means.items())
        left = seconds / (self.step - first) * (self.config.steps - self.step)
        self.console.say(
            f"step {self.step}/{self.config.steps}  {losses}  {tokens / seconds:.0f} tokens/s  "
            f"{seconds:.0f} s, {left:.0f} s left"
        )

    def save(self) -> None:
        """Write what the same command goes on from."""
        with self.interrupt.deferred():
            save_checkpoint(
                self.folder, state={"step": self.step, "means": self.means}, teacher={},
                student={name: p.data for name, p in self.policy.trainable().items()},
                optimizer=self.optimizer.state_dict(),
            )  # fmt: skip

    def keep(self, stop: BaseException) -> None:
        """Save what is done before an error or a signal ends it, which gets a note of this."""
        if self.step and not self.interrupt.torn:
            self.save()
        if checkpoints(self.folder):
            stop.add_note(f"Saved in {self.folder}: the same command goes on from there.")

    def _restore(self) -> None:
        """Go on from the checkpoint.

        Raises:
            BrokenCheckpoint: it cannot be read, or is not of these settings.
        """
        saved, said = load_checkpoint(self.folder, self.policy.device)
        self.policy.take_over(saved["student"], self.folder)
        try:
            self.step, self.means = saved["state"]["step"], saved["state"]["means"]
            self.optimizer.load_state_dict(saved["optimizer"])
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise BrokenCheckpoint(
                f"The checkpoint in {self.folder} does not fit ({error}): remove the folder to "
                "start anew."
            ) from error
        self.console.say(f"{said} Going on after step {self.step}.".strip())


def parts(
    kind: str, samples: Sequence[Sample], max_tokens: int
) -> Iterator[tuple[list[Sample], list[Row]]]:
    """Whole episodes with their rows, at most `max_tokens` together; a longer one goes alone."""
    rows_of = teacher_rows if kind == "hindsight" else student_rows
    episodes = [list(g) for _, g in itertools.groupby(samples, key=lambda s: s.trajectory)]
    rows = [rows_of(episode) for episode in episodes]
    for group in in_groups([(sum(map(len, own)),) for own in rows], max_tokens):
        yield [s for i in group for s in episodes[i]], [row for i in group for row in rows[i]]


def nll(policy: Policy, rows: Sequence[Row], samples: Sequence[Sample]) -> Tensor:
    """Negative log-likelihood of the action tokens of these samples, summed, in nats."""
    packed = to_tensors(rows, policy.device)
    hidden = packed.states(policy)[packed.index]
    targets = torch.cat([torch.tensor(sample.action_ids) for sample in samples]).to(policy.device)
    return -policy.logprobs(hidden, targets)[0].sum()


def _draw(pool: Sequence[list[Sample]], size: int, order: random.Random) -> list[Sample]:
    """The samples of `size` random episodes, numbered so that packing keeps them apart."""
    samples = []
    for number in range(size):
        samples += [replace(sample, trajectory=number) for sample in order.choice(pool)]
    return samples


def _schedule(step: int, config: SftConfig) -> float:
    """Linear warm-up, then cosine to 2 %."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def _load(config: SftConfig, env: Any) -> Policy:
    if config.model.path:
        return Policy.load(config.model)
    if not hasattr(env, "vocabulary"):
        raise ValueError(
            f"A model from nothing needs the words of {config.env.name}, but it has no "
            "vocabulary(); name a pretrained model with --model.path."
        )
    tokenizer = build_tokenizer(border.vocabulary(env))
    return Policy(build_model(config.scratch, tokenizer), tokenizer, config.model)
