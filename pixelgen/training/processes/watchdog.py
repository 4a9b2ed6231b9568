"""Ends a run that hangs, and says which process the others wait for."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from pixelgen.training.processes.world import World

EXIT_CODE = 3
_BEAT_S = 1.0


class Watchdog:
    """A thread that ends this process if it makes no progress for ``timeout_s``, and says what it waits for.

    A process that hangs inside a collective cannot know why: it waits for another one. So every process
    writes what it does to the store that the process group was started with. The one that hangs reads what
    all the others wrote, prints who is behind, and ends at once. A single process prints what it did itself.
    """

    def __init__(self, world: World, timeout_s: float) -> None:
        self._world, self._timeout_s = world, timeout_s
        self._lock = threading.Lock()
        self._step, self._doing, self._since, self._count = 0, "starting", time.monotonic(), 0
        self._beats = 0
        self._done = threading.Event()
        # A clone: a read that waits for the main process must not hold up the group's own use of the store.
        self._store: Any = dist.distributed_c10d._get_default_store().clone() if world.size > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def progress(self, step: int, doing: str) -> None:
        """Says what the process does from now on, such as ``"waiting for data"`` in a step."""
        with self._lock:
            self._step, self._doing, self._since = step, doing, time.monotonic()
            self._count += 1

    def beat(self) -> None:
        """Says that the process is well, though what it does takes long."""
        with self._lock:
            self._since = time.monotonic()

    def close(self) -> None:
        """Ends the thread."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        interval = min(_BEAT_S, self._timeout_s / 5)
        while not self._done.wait(interval):
            if self._note()["idle"] > self._timeout_s:
                self._end()

    def _note(self) -> dict[str, Any]:
        """Writes to the store what this process does."""
        with self._lock:
            state = {
                "step": self._step,
                "doing": self._doing,
                "count": self._count,
                "idle": time.monotonic() - self._since,
                "host": socket.gethostname(),
                "process": os.getpid(),
                "beat": self._beats,
            }
        self._beats += 1
        if self._store is not None:
            with suppress(RuntimeError):  # the main process may be gone, which shows when the others are read
                self._store.set(f"watchdog/{self._world.rank}", json.dumps(state))
        return state

    def _end(self) -> None:
        before = self._read_all()
        for _ in range(4):  # the others find the same, and note what they do
            time.sleep(_BEAT_S)
            own = self._note()
        if own["idle"] < self._timeout_s:
            return  # it went on after all
        message = f"no progress for {own['idle']:.0f} s"
        states = self._read_all()
        if self._store is None:
            message += f": {own['doing']}, step {own['step']}"
        elif states is None or before is None:
            message += "; the main process, rank 0, cannot be reached"
        else:
            # No clock of another machine is asked: who is well has written again meanwhile.
            silent = [rank for rank, state in states.items() if state == before[rank]]
            behind = silent or _behind(states)
            named = "; ".join(_describe(rank, states[rank], is_silent=bool(silent)) for rank in behind)
            message += f"; the others wait for {named}" if len(behind) < len(states) else f": {named}"
        print(
            f"pixelgen.train: error: rank {self._world.rank}: {message}. Ended after parallel.timeout_s "
            f"{self._timeout_s:g}; continue with --resume",
            file=sys.stderr,
            flush=True,
        )
        if self._world.is_main:
            time.sleep(4 * _BEAT_S)  # the others read from its memory
        os._exit(EXIT_CODE)  # a thread that hangs in a collective ends in no other way

    def _read_all(self) -> dict[int, dict[str, Any]] | None:
        """What each process does, ``{}`` for one that has written nothing yet; None if the store is gone."""
        if self._store is None:
            return None
        states: dict[int, dict[str, Any]] = {}
        for rank in range(self._world.size):
            key = f"watchdog/{rank}"
            try:
                states[rank] = json.loads(self._store.get(key)) if self._store.check([key]) else {}
            except RuntimeError:  # what a store raises whose process is gone
                return None
        return states


def _behind(states: dict[int, dict[str, Any]]) -> list[int]:
    """The ranks that have come least far: those that the others wait for."""
    least = min(state["count"] for state in states.values())
    return [rank for rank, state in states.items() if state["count"] == least]


def _describe(rank: int, state: dict[str, Any], *, is_silent: bool) -> str:
    if not state:
        return f"rank {rank}, which has not started"
    text = f"rank {rank} ({state['host']}, process {state['process']})"
    text += ", which does not answer; its last word: " if is_silent else ": "
    return f"{text}{state['doing']}, step {state['step']}, for {state['idle']:.0f} s"
