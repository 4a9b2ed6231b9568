"""The loop around ``Trainer.train_step``: data, log, sample grids, checkpoints, signals."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelgen.conditions import moved
from pixelgen.config.load import config_to_yaml
from pixelgen.config.train_config import TrainConfig
from pixelgen.data.identity import identify
from pixelgen.data.loader import Batch, build_loader
from pixelgen.errors import UserError
from pixelgen.files import write_whole
from pixelgen.sampling.pipeline import Pipeline
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.checkpoint.write import CheckpointWriter, clean_leftovers
from pixelgen.training.log import METRICS_FILE, TrainLog, truncate_metrics
from pixelgen.training.optim import learning_rate
from pixelgen.training.processes.watchdog import Watchdog
from pixelgen.training.step import Trainer

_NO_DATA = 1000  # above all signal numbers: a reason to stop where a process has no images for its next step
_REPEATED_SIGNAL_S = 2.0
_GRID_ROWS, _GRID_COLUMNS = 10, 8


def write_config(run_dir: Path, config: TrainConfig) -> None:
    """Writes a run's configuration into its folder; raises UserError where that cannot be written to."""
    try:
        write_whole(run_dir / checkpoints.CONFIG_FILE, config_to_yaml(config))
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written to: {error.strerror}") from error


class Run:
    """A trainer and its run's folder, ready to train.

    ``folder_lock`` is closed at the end; ``position`` is where the data go on, from ``Trainer.load``.
    """

    def __init__(self, trainer: Trainer, folder_lock: ExitStack, position: dict[str, Any]) -> None:
        self.trainer, self.config, self.world = trainer, trainer.config, trainer.world
        self.run_dir = trainer.run_dir
        self._folder_lock, self._position = folder_lock, position
        # A resumed run stands at its newest checkpoint.
        self._saved_step = trainer.step if checkpoints.list_checkpoints(self.run_dir) else None
        self._signal: int | None = None  # that reached this process
        self._data_error: UserError | None = None

    def train(self) -> int:
        """Trains to ``train.max_steps``, or until SIGINT or SIGTERM, which save first.

        Returns:
            0, or 128 + the signal's number when stopped by one.

        Raises:
            UserError: a loss is not finite, images cannot be read, or the last checkpoint cannot be written.
        """
        config, train, trainer, world = self.config, self.config.train, self.trainer, self.world
        with self._folder_lock, ExitStack() as stack:
            if world.is_main:
                self._print_start()
            if trainer.step >= train.max_steps:
                if world.is_main:
                    print(f"nothing to do: train.max_steps is {train.max_steps}")
                return 0
            world.on_main(self._open_folder)
            self._watchdog = Watchdog(world, config.parallel.timeout_s)
            stack.callback(self._watchdog.close)
            self._writer = CheckpointWriter(
                self.run_dir, world, train.keep_checkpoints, train.keep_every, identify(trainer.dataset)
            )
            # Whatever ends the run: a checkpoint that is being written is good.
            stack.callback(self._writer.close)
            self._writer.stage(trainer.state_dict())  # takes the memory, which would make the first save slow
            self._batches = build_loader(
                trainer.dataset,
                train.batch_size,
                seed=config.seed,
                start_step=trainer.step,
                num_workers=config.data.workers,
                rank=world.rank,
                world_size=world.size,
                pin_memory=trainer.device.type == "cuda",
                max_broken=config.data.max_broken,
                state=self._position or None,
            )
            stack.callback(self._batches.close)
            self._log = TrainLog(trainer, self._batches, self._writer)
            stack.callback(self._log.close)
            with self._signals():
                stop = self._loop()
                self._finish(stop)
        if stop and world.is_main:
            print(f"stopped by signal {stop}; continue with --resume {self.run_dir}")
        elif world.is_main:
            print(
                f"trained to step {trainer.step} in {self._log.seconds / 60:.1f} min; sample with: ", end=""
            )
            print(f"python -m pixelgen.sample --model {self.run_dir}")
        return 128 + stop if stop else 0

    def _print_start(self) -> None:
        config, trainer, world = self.config, self.trainer, self.world
        print(config_to_yaml(config))
        where = str(trainer.device.type)
        if world.size > 1:
            where = f"{world.size} processes ({trainer.mode}, {where})"
        images = "" if trainer.dataset.num_images is None else f"{trainer.dataset.num_images:,} images, "
        print(f"{self.run_dir}: {trainer.num_parameters:,} parameters on {where}, {images}", end="")
        print(f"step {trainer.step} of {config.train.max_steps}", flush=True)

    def _open_folder(self) -> None:
        """Clears what a killed run left, and saves the configuration with what has changed in it."""
        clean_leftovers(self.run_dir)
        truncate_metrics(self.run_dir / METRICS_FILE, self.trainer.step)
        write_config(self.run_dir, self.config)

    def _loop(self) -> int:
        """Steps until the end, or until a process has a reason to stop: that reason, a signal; else 0."""
        train, trainer, world = self.config.train, self.trainer, self.world
        batch = self._next_batch()
        while True:
            # Agreed on before each step, so that no process waits for one that has left.
            stop = world.largest(_NO_DATA if self._data_error is not None else self._signal or 0)
            if stop or batch is None:
                return stop
            self._watchdog.progress(trainer.step + 1, "training")
            images = batch.images.to(trainer.device, non_blocking=True)
            condition = moved(batch.condition, trainer.device, non_blocking=True)
            self._log.add(trainer.train_step(images, condition))
            if trainer.step % train.log_every == 0:
                self._write_log()
            if train.checkpoint_every and trainer.step % train.checkpoint_every == 0:
                self._save()
            if train.sample_every and trainer.step % train.sample_every == 0:
                self._draw()
            batch = self._next_batch()

    def _next_batch(self) -> Batch | None:
        """The images of the next step; None after the last one, or with ``_data_error`` where they failed."""
        step = self.trainer.step
        if step >= self.config.train.max_steps:
            return None
        self._watchdog.progress(step + 1, "waiting for data")
        asked = time.perf_counter()
        try:
            return next(self._batches)
        except UserError as error:
            self._data_error = error
            return None
        finally:
            self._log.waited(time.perf_counter() - asked)

    def _finish(self, stop: int) -> None:
        """The last checkpoint and sample grid; ``stop`` is what ``_loop`` gave."""
        train, trainer = self.config.train, self.trainer
        self._save()
        if not stop and train.sample_every and trainer.step % train.sample_every:
            self._draw()
        else:
            self._log.curves()
        self._watchdog.progress(trainer.step, "writing the last checkpoint")
        last = self._writer.wait(self._watchdog.beat)
        if last is not None and last.error is not None:
            self.world.fail(self._failed(last.step, last.error))
        if stop == _NO_DATA:
            found = self.world.gather(None if self._data_error is None else str(self._data_error))
            reason = next(message for message in found if message)
            self.world.fail(f"{reason}; stopped after step {trainer.step}, --resume {self.run_dir} goes on")

    def _write_log(self) -> None:
        self._report_save()
        self._log.write(self.trainer.step, learning_rate(self.config, self.trainer.step - 1))

    def _save(self) -> None:
        """Begins a checkpoint of this step, unless there is one; refuses a loss that is not finite."""
        trainer = self.trainer
        if self._saved_step == trainer.step:
            return
        self._write_log()
        self._watchdog.progress(trainer.step, "saving")
        with self._log.paused():
            self._writer.wait(self._watchdog.beat)
            self._report_save()
            data = {"data": self._batches.state_dict()}
            self._writer.start(trainer.step, trainer.state_dict() | data, config_to_yaml(self.config))
        self._saved_step = trainer.step

    def _report_save(self) -> None:
        """Warns of a checkpoint that could not be written; training goes on, and the next one is tried."""
        last = self._writer.last
        if last is not None and last.error is not None and not last.is_reported and self.world.is_main:
            last.is_reported = True
            print(f"warning: {self._failed(last.step, last.error)}", file=sys.stderr, flush=True)

    def _failed(self, step: int, reason: str) -> str:
        found = checkpoints.list_checkpoints(self.run_dir)
        newest = f"the newest one is {found[-1]}" if found else "there is none yet"
        return f"the checkpoint of step {step} could not be written: {reason}; {newest}"

    def _draw(self) -> None:
        self._watchdog.progress(self.trainer.step, "sampling")
        with self._log.paused():
            self._log.image(self.trainer.step, sample_grid(self.trainer), _GRID_COLUMNS)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM finishes the step, saves and leaves; a later one ends the process."""

        def on_signal(number: int, _frame: object) -> None:
            if self._signal is None:
                self._signal = number
                if self.world.is_main:
                    text = f"\nsignal {number}: saving after this step; another one ends the run at once\n"
                    os.write(2, text.encode())  # print may have been interrupted by this signal

        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        threading.Thread(target=_end_at_once, args=(reader,), name="signals", daemon=True).start()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)
            os.close(writer)


def sample_grid(trainer: Trainer) -> Tensor:
    """Samples of the first average, (N, C, H, W) uint8, of fixed noise: a row each for up to 10 classes."""
    config, model, world = trainer.config, trainer.model, trainer.world
    time, num_classes = config.time, model.config.num_classes
    pipeline = Pipeline(
        model, config.sample, t_eps=time.t_eps, noise_scale=time.noise_scale, dtype=config.dtype
    )
    rows = min(_GRID_ROWS, num_classes)
    labels = [row * num_classes // rows for row in range(rows) for _ in range(_GRID_COLUMNS)]
    share = -(-len(labels) // world.size)
    first = world.rank * share
    own = [labels[place % len(labels)] for place in range(first, first + share)]
    with trainer.averages.exchanged(model, next(iter(trainer.averages.values))):
        model.eval()
        images = pipeline.sample(own, seed=config.seed, first_index=first)
        model.train()
    return torch.cat(world.gather(images))[: len(labels)]


def _end_at_once(reader: int) -> None:
    """Ends the process at the second of the signals that are read, also while it hangs in a collective.

    Not at one that follows within seconds: torchrun and schedulers signal every process, and pass it on.
    """
    first: float | None = None
    with open(reader, "rb", buffering=0) as signals:
        while got := signals.read(1):
            if got[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first > _REPEATED_SIGNAL_S:
                os._exit(128 + got[0])
