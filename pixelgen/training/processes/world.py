"""The processes of a run: the process group, what they exchange, and how they end together."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixelgen.config.resolve import pick_device
from pixelgen.errors import USER_ERRORS, AlreadyReported, UserError
from pixelgen.training.options import ParallelConfig

T = TypeVar("T")

_FOR_EVER = timedelta(days=365)
_REPORT_EVERY_S = 60.0


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is."""

    device: torch.device  # where this process computes
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1
    group: dist.ProcessGroup | None = None  # for what the host exchanges, however long one process takes

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes; ``values`` is not changed."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums the gradients of parameters that are not sharded; a process without one has added nothing."""
        if self.size > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def gather(self, value: T) -> list[T]:
        """A Python object of every process, in the order of ranks, on all of them; tensors on the host."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def largest(self, value: int) -> int:
        """The largest of the numbers of all processes, on the host: the device works on meanwhile."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def on_main(self, action: Callable[[], T]) -> T:
        """What an action of the main process returns, a small Python object; errors as in ``together``."""
        result: Any = self.together(action if self.is_main else lambda: None)
        return self.gather(result)[0]

    def in_turn(self, doing: str, action: Callable[[], T]) -> T:
        """Does something in the main process first, then in one on each other machine, then in the rest.

        For what the first one leaves on disk and the others only read: trained features, downloads. Where it
        takes long, ``doing`` is printed, such as "opening the data". Errors as in ``together``.
        """
        own_turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2

        def act() -> T:
            with self._reported_if_slow(doing):
                return action()

        turns = range(3 if self.size > 1 else 1)
        results: list[Any] = [self.together(act if turn == own_turn else lambda: None) for turn in turns]
        return results[own_turn]

    def together(self, action: Callable[[], T]) -> T:
        """Does something in all processes, and waits for all; the action itself must not wait for others.

        Raises:
            Exception: what the action raised, in the first process in which it did.
            AlreadyReported: the same, in all others.
        """
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        messages = self.gather(None if failure is None else str(failure))
        first = next((rank for rank, message in enumerate(messages) if message is not None), None)
        if first is None:
            return result
        if failure is not None and first == self.rank:
            raise failure
        raise AlreadyReported(messages[first])

    @contextmanager
    def _reported_if_slow(self, doing: str) -> Iterator[None]:
        done, started = threading.Event(), time.monotonic()

        def report() -> None:
            while not done.wait(_REPORT_EVERY_S):
                seconds = time.monotonic() - started
                print(f"rank {self.rank}: {doing} for {seconds:.0f} s; the others wait", file=sys.stderr)

        if self.size > 1:
            threading.Thread(target=report, name="slow action", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def fail(self, message: str) -> NoReturn:
        """Ends all processes with an error that they agree on; the main one prints it."""
        raise UserError(message) if self.is_main else AlreadyReported(message)


def start_world(device: str, parallel: ParallelConfig) -> World:
    """Joins the other processes that torchrun started; alone without torchrun.

    Raises:
        UserError: fewer GPUs than processes on this machine; ``AlreadyReported`` in all of these but one.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = pick_device(device)
    if size == 1:
        return World(chosen)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    backend = "gloo"
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        # A scheduler may show each process its own GPU alone; torchrun shows all of them to all.
        is_bound = count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
        if count < local_size and not is_bound:
            message = f"{local_size} processes on {socket.gethostname()}, which has {count} GPUs; start fewer"
            raise UserError(message) if local_rank == 0 else AlreadyReported(message)
        chosen = torch.device("cuda", 0 if is_bound else local_rank)
        torch.cuda.set_device(chosen)
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        # Longer than the watchdog's: that one names who hangs, the process group's does not.
        timeout = timedelta(seconds=parallel.timeout_s + 60)
        dist.init_process_group(backend, timeout=timeout)
    return World(chosen, rank, size, local_rank, local_size, gloo_group(size))


@contextmanager
def leaving_together() -> Iterator[None]:
    """Ends the process group with its block, as all processes do that come to its end or to a user's error.

    Any other exception may be this process's alone. It ends without leaving the group then: that would wait
    for the others, which wait in a collective for this one, where its end stops them.
    """
    try:
        yield
    except USER_ERRORS:
        _leave()
        raise
    _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def gloo_group(size: int) -> dist.ProcessGroup | None:
    """A group of all ``size`` processes for what the host does beside training; None for a single one.

    Each thread needs its own: collectives of two threads in one group would be mixed up. It has no timeout to
    speak of: a process that ends breaks its connections, and the watchdog ends a run that hangs.
    """
    if size == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=_FOR_EVER)
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group
