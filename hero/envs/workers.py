"""Who runs the environments of a rollout: this thread, a thread each or a process each.

A job is a function of an environment and arguments, such as `border.step`; in a process all of it
is pickled. A job that takes too long is given up with its environment, and the next job of its row
gets a new one, as it does after a process has died. So nothing that a world does stops the others.
"""

from __future__ import annotations

import math
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol

from hero.envs import alarm, border
from hero.envs.base import Environment, raised
from hero.envs.border import EnvironmentFault
from hero.processes import safe_path, started

GRACE = 0.05
"""Seconds in which a job is waited for before others go on: quick worlds answer together."""
MAKING = 10
"""Making an environment may take so many times as long as a job."""
MakeEnv = Callable[[], Environment]
Job = Callable[..., Any]


class Workers(Protocol):
    """Runs jobs, one at a time in each of `rows`."""

    rows: int
    share_memory: bool
    """Whether jobs see the objects of this process, the model among them."""

    def submit(self, row: int, job: Job, *arguments: Any) -> None:
        """Begin `job(environment of the row, *arguments)`."""
        ...

    def done(self, wait: bool) -> list[tuple[int, Any]]:
        """Rows and answers of the jobs that are over; an EnvironmentFault may be the answer.

        `wait`: for at least one.
        """
        ...

    def close(self) -> None:
        """Close the environments made here, and give up those at work; later jobs make new ones.

        Raises:
            EnvironmentFault: one could not be closed; the others are.
        """
        ...


@contextmanager
def closing(
    workers: Workers, env: Environment, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Close both at the end; what that raises takes the place of no other error.

    With `say` it is told and ends nothing, as everything has been done by then.
    """
    closes = (workers.close, partial(border.close, env))
    try:
        yield
    except BaseException:
        for close in closes:
            with suppress(EnvironmentFault):
                close()
        raise
    for close in closes:
        try:
            close()
        except EnvironmentFault as fault:
            if say is None:
                raise
            say(f"warning: an environment could not be closed: {fault}")


def open_workers(
    kind: str, make: MakeEnv, first: Environment, rows: int, timeout: float
) -> Workers:
    """The workers that `env.workers` asks for.

    Args:
        kind: "inline", "threads", "processes", or "auto" for the environment's own `workers`:
            threads if it has none.
        make: makes an environment; pickled for processes.
        first: an environment that is there already; whoever made it closes it.
        rows: how many.
        timeout: seconds of one job; the making of its environment may take MAKING times as long.

    Raises:
        ValueError: the environment asks for another kind.
    """
    if kind == "auto":
        kind = getattr(first, "workers", "threads")
    if kind == "inline":
        return InTurn(make, rows, timeout)
    if kind not in ("threads", "processes"):
        raise ValueError(
            f"{type(first).__name__}.workers is {kind!r}; expected inline, threads or processes."
        )
    return Threads(make, rows, timeout, in_processes=kind == "processes")


def _made(make: Callable[[], Any]) -> Any:
    """A new environment; whatever its constructor raises is a fault, also that it leaves."""
    try:
        return make()
    except EnvironmentFault:
        raise
    except (Exception, SystemExit) as error:
        raise EnvironmentFault(f"an environment could not be made: {raised(error)}") from error


class Given:
    """Environments that are there already and stay the caller's: jobs are done where they are
    submitted."""

    share_memory = True

    def __init__(self, envs: Sequence[Environment]) -> None:
        self.rows, self._envs, self._done = len(envs), list(envs), list[tuple[int, Any]]()

    def submit(self, row: int, job: Job, *arguments: Any) -> None:
        try:
            self._done.append((row, job(self._envs[row], *arguments)))
        except EnvironmentFault as fault:
            self._done.append((row, fault))

    def done(self, wait: bool) -> list[tuple[int, Any]]:
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self._done = []


class Threads:
    """A thread for each row, which makes its environment and is the only one to touch it.

    With `in_processes` the environment is in a process, and the thread waits for it.
    """

    def __init__(
        self, make: MakeEnv, rows: int, timeout: float, in_processes: bool = False
    ) -> None:
        self.rows, self.share_memory, self._timeout = rows, not in_processes, timeout
        self._make: Callable[[], Any] = partial(_Child, make) if in_processes else make
        self._answers: queue.SimpleQueue[tuple[_Thread, Any]] = queue.SimpleQueue()
        self._threads: dict[int, _Thread] = {}
        self._busy: set[int] = set()

    def submit(self, row: int, job: Job, *arguments: Any) -> None:
        if row not in self._threads:
            self._threads[row] = _Thread(row, self._make, self._answers)
            self._threads[row].start()
        self._busy.add(row)
        self._threads[row].submitted = time.monotonic()
        self._threads[row].jobs.put((job, arguments))

    def done(self, wait: bool) -> list[tuple[int, Any]]:
        found: list[tuple[int, Any]] = []
        while self._busy:
            try:
                thread, answer = self._answers.get(timeout=GRACE if self._waits(wait, found) else 0)
            except queue.Empty:
                found += self._given_up()
                if not self._waits(wait, found):
                    break
                continue
            if self._threads.get(thread.row) is thread:  # else it was given up before
                self._busy.discard(thread.row)
                if isinstance(answer, BaseException) and not isinstance(answer, EnvironmentFault):
                    raise answer
                found.append((thread.row, answer))
        return sorted(found, key=lambda item: item[0])

    def _waits(self, wait: bool, found: list[tuple[int, Any]]) -> bool:
        """Whether to wait on: for any answer, or for jobs that have only just begun."""
        now = time.monotonic()
        fresh = any(now - self._threads[row].submitted < GRACE for row in self._busy)
        return bool(self._busy) and (fresh or (wait and not found))

    def _given_up(self) -> list[tuple[int, Any]]:
        """The rows whose time is up, with the fault that this is."""
        now, late = time.monotonic(), []
        for row in sorted(self._busy):
            began, times = self._threads[row].began
            if now - began > times * self._timeout:
                what = "no answer within" if times == 1 else f"it was not made within {times} times"
                late.append((row, EnvironmentFault(
                    f"{what} rollout.step_timeout={self._timeout:g} s: the environment was given "
                    "up and made anew. Raise --rollout.step-timeout if it needs longer."
                )))  # fmt: skip
                self._busy.discard(row)
                self._threads.pop(row).give_up()
        return late

    def close(self) -> None:
        for row in self._busy:
            self._threads.pop(row).give_up()
        self._busy = set()
        for row in [row for row, thread in self._threads.items() if thread.env is not None]:
            self.submit(row, border.close)
        faults: list[EnvironmentFault] = []
        while done := self.done(wait=True):
            faults += [answer for _, answer in done if answer]
        for thread in self._threads.values():
            thread.give_up()
        self._threads = {}
        if faults:
            raise faults[0]


class InTurn(Threads):
    """As `Threads`, but a job is waited for where it is submitted, so that two never run at once:
    for worlds that answer at once, or that use the model."""

    def __init__(self, make: MakeEnv, rows: int, timeout: float) -> None:
        super().__init__(make, rows, timeout)
        self._found: list[tuple[int, Any]] = []

    def submit(self, row: int, job: Job, *arguments: Any) -> None:
        super().submit(row, job, *arguments)
        self._found += super().done(wait=True)

    def done(self, wait: bool) -> list[tuple[int, Any]]:
        found, self._found = self._found, []
        return found

    def close(self) -> None:
        self._found = []
        super().close()


class _Thread(threading.Thread):
    """Does the jobs of one row, until it is given up."""

    def __init__(self, row: int, make: Callable[[], Any], answers: Any) -> None:
        super().__init__(daemon=True, name=f"environment {row}")
        self.row, self.make, self.answers = row, make, answers
        self.jobs: queue.SimpleQueue[tuple[Job | None, tuple[Any, ...]]] = queue.SimpleQueue()
        self.submitted = 0.0
        self.began = (math.inf, 1)
        """When what is under way began, and how many times the limit of a job it has."""
        self.env: Any = None

    def run(self) -> None:
        while (item := self.jobs.get())[0] is not None:
            self.answers.put((self, self._answer(*item)))

    def _answer(self, job: Any, arguments: tuple[Any, ...]) -> Any:
        try:
            if self.env is None:
                self.began = (time.monotonic(), MAKING)
                self.env = _made(self.make)
            self.began = (time.monotonic(), 1)
            if isinstance(self.env, _Child):
                return self.env.ask(job, arguments)
            return job(self.env, *arguments)
        except _Died as died:
            self.env = None  # the next job makes another one
            return died
        except BaseException as error:  # what is no fault is not for this thread to deal with
            return error
        finally:
            self.began = (math.inf, 1)

    def give_up(self) -> None:
        self.jobs.put((None, ()))
        if isinstance(self.env, _Child):
            self.env.kill()


class _Died(EnvironmentFault):
    """A process ended without an answer."""


class _Child:
    """An environment in a process of its own."""

    def __init__(self, make: MakeEnv) -> None:
        context = multiprocessing.get_context("spawn")  # forks of threads and of CUDA hang
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        with safe_path():
            self._process.start()
        theirs.close()
        self._answer()  # made, or the reason why not

    def ask(self, job: Job, arguments: tuple[Any, ...]) -> Any:
        return self._answer(job, arguments)

    def _answer(self, *asked: Any) -> Any:
        try:
            if asked:
                self._pipe.send(asked)
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(1)
            raise _Died(
                f"the process of an environment died (exit code {self._process.exitcode}); "
                "another one takes its place"
            ) from error
        except Exception as error:  # unpickling calls code of the environment
            raise EnvironmentFault(f"the answer cannot be read: {raised(error)}") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()


def _serve(pipe: Any, make: MakeEnv) -> None:
    """What the process does: make the environment, then job after job until the other end goes."""
    started()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process
    alarm.set_limit(0)  # so does a step that takes too long
    try:
        env = _made(make)
        pipe.send(None)
        while True:
            job, arguments = pipe.recv()
            try:
                answer = job(env, *arguments)
            except EnvironmentFault as fault:
                answer = fault
            try:
                pipe.send(answer)
            except Exception as error:  # pickling calls code of the environment
                pipe.send(EnvironmentFault(f"the answer cannot be sent: {raised(error)}"))
    except EOFError:
        return
    except EnvironmentFault as fault:
        pipe.send(fault)
