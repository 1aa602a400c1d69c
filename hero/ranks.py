"""The processes of a run: which one this is, what it takes of the work, where all of them agree.

`torchrun` or `accelerate launch` start one process for each GPU, a *rank*, and every rank runs the
same program. All of them hold the same episodes, diagnoses and counters; each plays its share of
the episodes, answers its share of the requests and passes its share of the tokens. Rank 0 alone
writes. `Ranks` is one process, in which all of this is nothing.

Ranks wait for each other in the methods here and in `shards.py`, and nowhere else. So what these
methods are given may fail or be interrupted on one of them: the error is then raised on all, at the
same place, and what is finished can be saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

from hero.interrupt import Interrupt, Stopped
from hero.types import Fault

T = TypeVar("T")
S = TypeVar("S")

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""What accelerate can be configured to do with a model, by its variables ACCELERATE_USE_..."""
PATIENCE = timedelta(hours=1)
"""How long a rank waits for another: longer than the slowest episode, the endpoint's last answer
and a checkpoint that is written."""


class Ranks:
    """One process."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.interrupt = Interrupt()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def apart(self, work: Callable[[], T]) -> T:
        """What `work` returns here; what it raises on one rank is raised on all."""
        return work()

    def all_gather(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on each rank, on all of them."""
        return [work()]

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, which alone does it."""
        return work()

    def broadcast(self, value: T) -> T:
        """Rank 0's value, where each rank has computed it and one may differ by a rounding."""
        return value

    def shared(self, items: Sequence[S], work: Callable[[Sequence[S]], Sequence[T]]) -> list[T]:
        """`work` of all items, in their order; each rank does a part of them."""
        return list(work(items))

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Indices of the items that are this rank's; sums of sizes are nearly the same on all."""
        return list(range(len(sizes)))

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` makes on rank 0; on all ranks its methods give what they give there."""
        return make()

    def within(self, make: Callable[[], AbstractContextManager[object]]) -> Any:
        """A context that rank 0 alone enters."""
        return make()

    def in_step(self, error: BaseException) -> bool:
        """Whether all ranks have met the error at the same place, and can still save together."""
        return True

    def close(self) -> None:
        """At the end of the program."""


class ManyRanks(Ranks):
    """One of several processes; `open_ranks` makes it."""

    def __init__(self, rank: int, size: int) -> None:
        import torch.distributed as dist

        self.rank, self.size = rank, size
        self.interrupt = Interrupt(agreed=True)
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._agreed_on: BaseException | None = None

    def apart(self, work: Callable[[], T]) -> T:
        kept = list[T]()
        self.agree(lambda: kept.append(work()), _name(work))
        return kept[0]

    def all_gather(self, work: Callable[[], T]) -> list[T]:
        return cast("list[T]", self.agree(work, _name(work)))

    def on_first(self, work: Callable[[], T]) -> T:
        done = self.agree(work if self.is_first else lambda: None, _name(work))
        return cast(T, done[0])

    def broadcast(self, value: T) -> T:
        return self.on_first(lambda: value)

    def shared(self, items: Sequence[S], work: Callable[[Sequence[S]], Sequence[T]]) -> list[T]:
        own = [items[i] for i in range(self.rank, len(items), self.size)]
        parts = self.agree(lambda: list(work(own)) if own else [], _name(work))
        return [parts[i % self.size][i // self.size] for i in range(len(items))]

    def share(self, sizes: Sequence[int]) -> list[int]:
        loads, own = [0] * self.size, []
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # the largest first
            least = loads.index(min(loads))
            loads[least] += sizes[i]
            own += [i] * (least == self.rank)
        return sorted(own)

    def of_first(self, make: Callable[[], T]) -> T:
        made = list[T]()
        self.on_first(lambda: made.append(make()))
        return cast(T, _OfFirst(self, made))

    @contextmanager
    def within(self, make: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        with ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(make())

            self.on_first(enter)
            yield

    def in_step(self, error: BaseException) -> bool:
        return error is self._agreed_on

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()

    def agree(self, work: Callable[[], Any], name: str) -> list[Any]:
        """Do `work`, then tell all ranks what came of it, and which signal waits.

        Raises:
            BaseException: what it raised here, or a `Fault` with what it raised elsewhere.
            Stopped: a signal has come to one of the ranks.
        """
        value, error = None, None
        try:
            with self.interrupt.live():
                value = work()
        except BaseException as raised:
            error = raised
        told = (name, value, _told(error), self.interrupt.pending)
        found = self._exchange(told)
        if error is None:
            error = self._elsewhere(found, name)
        if error is not None:
            self._agreed_on = error
            raise error
        return [value for _, value, _, _ in found]

    def _exchange(self, told: tuple[Any, ...]) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, told, group=self._group)
        except RuntimeError as error:
            raise Fault(
                f"Rank {self.rank} of {self.size} has lost the others: one of them has ended, or "
                f"has not come to {told[0]!r} within {PATIENCE} h. What ended it stands above. The "
                "run can go on from its last checkpoint."
            ) from error
        return found

    def _elsewhere(self, found: list[Any], name: str) -> BaseException | None:
        """What another rank has met."""
        for rank, (place, _, failure, _) in enumerate(found):
            if place != name:
                raise Fault(
                    f"The ranks have parted: rank {rank} is at {place}, rank {self.rank} at "
                    f"{name}. What they compute must not depend on the rank."
                )
            if isinstance(failure, int):
                return Stopped(failure)
            if failure:
                return Fault(f"Rank {rank} has ended the run: {failure}")
        waiting = max(signal for _, _, _, signal in found)
        return self.interrupt.told(waiting) if waiting else None


def open_ranks(device: str = "auto") -> Ranks:
    """Those that `torchrun` or `accelerate launch` started; without them this process alone.

    Args:
        device: `model.device` of the run.

    Raises:
        ValueError: fewer GPUs than ranks, one GPU for all of them, no way to talk to the others, or
            a launcher that would shard the model too.
    """
    size = launched()
    if size == 1:
        return Ranks()
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        raise ValueError(
            f"{size} processes were started, but this torch ({torch.__version__}) was built "
            "without torch.distributed and gloo: install another, or start one process."
        )
    for kind in SHARDING:
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in ("true", "1"):
            raise ValueError(
                f"accelerate is configured for {kind}, and hero train shards weights by itself: "
                "start it with accelerate launch --multi_gpu, or with torchrun."
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise ValueError(
            f"accelerate is configured for mixed precision {precision}, which hero train does not "
            "have: expected no or bf16 there, and --model.dtype says what is computed in."
        )
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        _take_gpu(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise Fault(
                f"The processes do not meet at {where}: {str(error).splitlines()[0]} Another port: "
                "torchrun --master-port PORT, or --rdzv-endpoint HOST:PORT."
            ) from error
    return ManyRanks(dist.get_rank(), dist.get_world_size())


def launched() -> int:
    """Processes that a launcher has started this one among; 1 without a launcher."""
    names = ("RANK", "MASTER_ADDR", "WORLD_SIZE")
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in names) else 1


def _take_gpu(device: str) -> None:
    """Make this rank's GPU the one that is meant by "cuda"."""
    import torch
    import torch.distributed as dist

    here, own = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    number = torch.cuda.device_count()
    if device not in ("auto", "cuda"):
        raise ValueError(
            f"model.device={device} is one GPU for all {here} processes of this machine: each "
            "takes one of its own with --model.device cuda."
        )
    if number < max(1, here):
        raise ValueError(
            f"{here} processes on this machine and {number} GPUs: each process needs one of its "
            f"own. Start {number or 1} (--nproc-per-node), or set --model.device cpu."
        )
    if not dist.is_nccl_available():
        raise ValueError(
            f"Several GPUs need NCCL, which this torch ({torch.__version__}) was built without: "
            "start one process, or set --model.device cpu."
        )
    torch.cuda.set_device(own)


class _OfFirst:
    """An object that rank 0 has. `close` waits for nobody, as it may follow an error."""

    def __init__(self, ranks: ManyRanks, made: list[Any]) -> None:
        self._ranks, self._made = ranks, made

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            return [getattr(thing, name)(*arguments, **named) for thing in self._made]

        if name == "close":
            return call
        return lambda *arguments, **named: self._ranks.agree(
            partial(call, *arguments, **named), name
        )[0][0]


def _name(work: Any) -> str:
    """The same on all ranks, if they do the same."""
    while isinstance(work, partial):
        work = work.func
    return str(getattr(work, "__qualname__", type(work).__name__))


def _told(error: BaseException | None) -> str | int:
    """An error for others: some cannot be pickled. The number of a signal, "" for none."""
    if isinstance(error, KeyboardInterrupt):
        return int(getattr(error, "number", 2))
    return "" if error is None else f"{type(error).__name__}: {error}"
