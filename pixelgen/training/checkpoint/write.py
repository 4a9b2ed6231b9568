"""Writing checkpoints while training goes on: staged in memory, written by a thread, renamed when whole."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from pixelgen.files import flush
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.processes.world import World, gloo_group

_BEAT_S = 2.0


@dataclass
class Save:
    """One checkpoint, being written or done."""

    step: int
    seconds: float = 0.0  # until the checkpoint was in its place; 0 while it is not
    error: str | None = None  # why it could not be written; the folder is not there then
    is_reported: bool = False  # whether the error was printed


class CheckpointWriter:
    """Writes the checkpoints of a run; all processes call it at the same steps.

    Args:
        run_dir: on a disk that all machines share.
        world: the processes.
        keep: how many of the newest checkpoints stay; 0 keeps all.
        keep_every: checkpoints of steps that this divides stay too; 0 for none.
        data: what the run is trained on, from ``identify``.
    """

    def __init__(self, run_dir: Path, world: World, keep: int, keep_every: int, data: dict[str, Any]) -> None:
        self._root, self._keep, self._keep_every = run_dir / "checkpoints", keep, keep_every
        self._data = data
        self._world = replace(world, group=gloo_group(world.size))  # for the thread that writes
        # What DefaultStager uses; that one gives its memory up after the first copy in torch 2.11.
        self._stager = StateDictStager(pin_memory=world.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self.last: Save | None = None  #: the newest save, done or not

    def start(self, step: int, state: dict[str, Any], config_yaml: str) -> None:
        """Takes a copy of ``state`` and begins to write it; waits for the one before if that is not done.

        The nested state dicts hold everything that changes training. ``ema.values`` are the averages by name,
        each of which gets its own file, ``tables`` what a model needs besides parameters.
        """
        started = time.perf_counter()
        self.wait()
        staged = self.stage(state)
        self.last = Save(step)
        arguments = (self.last, started, staged, config_yaml)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def stage(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy of ``state`` on the host. The first call takes its memory, which later ones use again."""
        on_gpu = self._world.device.type == "cuda"
        staged = self._stager.stage(state, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize(self._world.device)
        return staged

    def wait(self, beat: Callable[[], object] = lambda: None) -> Save | None:
        """Waits until nothing is being written, calls ``beat`` every 2 s, and returns the newest save."""
        while self._thread is not None:
            self._thread.join(_BEAT_S)
            if not self._thread.is_alive():
                self._thread = None
            beat()
        return self.last

    def close(self) -> None:
        """Waits, and frees the staging memory."""
        self.wait()
        self._stager.close()

    def _write(self, save: Save, started: float, staged: dict[str, Any], config_yaml: str) -> None:
        partial = self._root / f".step_{save.step:08d}.partial"
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)  # a thread begins on the first GPU, and would use it

        def write() -> None:
            group = self._world.group
            with checkpoints.single_process():
                dcp.save(staged, checkpoint_id=partial, process_group=group, no_dist=group is None)

        averages = staged["ema"]["values"]
        error: str | None = "the processes lost each other"
        try:
            error = (
                self._attempt(lambda: _make_empty(partial), only_main=True)
                or self._attempt(write)
                or self._attempt(
                    lambda: self._complete(partial, save.step, list(averages), config_yaml), only_main=True
                )
            )
        finally:
            if error is not None and self._world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            save.seconds = time.perf_counter() - started
            save.error = error

    def _attempt(self, action: Callable[[], None], *, only_main: bool = False) -> str | None:
        """Calls ``action`` in the main process or in all; returns the first error of any of them, in all."""
        error: str | None = None
        if self._world.is_main or not only_main:
            try:
                action()
            except (Exception, dcp.api.CheckpointException) as failure:  # the latter is a BaseException
                error = checkpoints.first_failure(failure)
        return next((found for found in self._world.gather(error) if found is not None), None)

    def _complete(self, partial: Path, step: int, averages: list[str], config_yaml: str) -> None:
        """Adds what a checkpoint has besides the state, flushes it to disk and gives it its name."""
        # From the files and not from memory, where every process has only its part. What a process on another
        # machine has written to another disk is missed here, and not at a resume.
        config = partial / checkpoints.CONFIG_FILE
        config.write_text(config_yaml)
        tables = checkpoints.load_part(partial, "tables.")
        for name in averages:
            weights = checkpoints.load_part(partial, f"ema.values.{name}.")
            path = partial / checkpoints.ema_file(name)
            save_file(weights | tables, path)
            path.chmod(config.stat().st_mode)  # not for this user alone: whoever reads the run may sample
        meta = {
            "format": checkpoints.FORMAT,
            "step": step,
            "averages": averages,
            "processes": self._world.size,
            "torch": str(torch.__version__),
            "data": self._data,
        }
        (partial / checkpoints.META_FILE).write_text(json.dumps(meta, indent=2) + "\n")
        for path in (*partial.iterdir(), partial):
            flush(path)
        final = self._root / f"step_{step:08d}"
        _remove(final)  # without meta.json, or it would have been resumed from
        partial.rename(final)
        flush(self._root)
        self._remove_old()

    def _remove_old(self) -> None:
        found = checkpoints.list_checkpoints(self._root.parent)
        for old in found[: -self._keep] if self._keep else []:
            step = int(old.name.removeprefix("step_"))
            if not (self._keep_every and step % self._keep_every == 0):
                try:
                    _remove(old)
                except OSError as error:  # the new one is there: nothing is lost
                    print(f"warning: {old} could not be removed: {error}", file=sys.stderr)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while saving
    folder.mkdir(parents=True)


def _remove(folder: Path) -> None:
    """Removes a checkpoint; under another name first, since half of one must not be found."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def clean_leftovers(run_dir: Path) -> None:
    """Removes what runs that were killed while saving left behind."""
    for path in (run_dir / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
