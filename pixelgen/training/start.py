"""Starting a run, continuing one, and locking its folder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from itertools import count
from pathlib import Path

from pixelgen.config.load import config_from_yaml
from pixelgen.config.train_config import TrainConfig
from pixelgen.data.identity import compare, identify
from pixelgen.data.source import Source, build_dataset
from pixelgen.errors import UserError
from pixelgen.files import lock
from pixelgen.losses.term import TERMS
from pixelgen.training.begin import begin_from
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.ema import decay_schedules
from pixelgen.training.log import check_logging
from pixelgen.training.loop import Run, write_config
from pixelgen.training.processes.world import World
from pixelgen.training.step import Trainer


def start_run(config: TrainConfig, world: World) -> Run:
    """A new run in a new folder; raises UserError if the folder exists or cannot be made."""
    run_dir = Path(config.out_dir) / str(config.name)
    # Before the folder is made: a wrong path must not leave an empty run.
    dataset = world.in_turn("opening the data", lambda: build_dataset(config.data))
    check_logging(config)
    folder_lock = ExitStack()

    def make() -> None:
        if run_dir.exists():
            raise UserError(
                f"{run_dir} exists already; continue it with --resume {run_dir} or choose another --name"
            )
        try:
            run_dir.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{run_dir} cannot be made: {error.strerror}") from error
        folder_lock.enter_context(locked(run_dir))
        write_config(run_dir, config)  # before anything that takes time: by this --resume auto knows a run

    world.on_main(make)
    try:
        trainer = Trainer(config, run_dir, dataset, world)
        if config.init is not None:
            begin_from(trainer, config.init)
        return Run(trainer, folder_lock, {})
    except BaseException:  # whatever it was, also Ctrl-C: a folder without a run would block its name
        folder_lock.close()
        if world.is_main:
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


def resume_run(path: str, config: TrainConfig, world: World) -> Run:
    """Continues a run from its newest checkpoint, bit for bit.

    ``path`` is the run's folder or that checkpoint. Options such as ``train.max_steps`` may have changed in
    ``config``, and so may the number of processes.

    Raises:
        FileNotFoundError: nothing at ``path``.
        UserError: no checkpoint there, or not the newest one of its run; or another process trains there.
    """
    folder_lock = ExitStack()

    def find() -> Path:
        checkpoint = checkpoints.find_checkpoint(path)
        run_dir = checkpoint.resolve().parent.parent
        found = checkpoints.list_checkpoints(run_dir)
        if checkpoint.resolve() not in found:
            raise UserError(f"{checkpoint} is not inside a run (runs/NAME/checkpoints); put it into one")
        if checkpoint.resolve() != found[-1]:
            raise UserError(
                f"{checkpoint} is not the newest checkpoint of its run, {found[-1].name} is: remove the "
                f"later ones first, or work on a copy of the run's folder"
            )
        folder_lock.enter_context(locked(run_dir))
        return checkpoint

    # In one process: others may still see an older state of a disk that they share.
    checkpoint = world.on_main(find)
    check_logging(config)
    try:
        dataset = world.in_turn("opening the data", lambda: build_dataset(config.data))
        world.on_main(lambda: check_same_run(config, dataset, checkpoint))
        trainer = Trainer(config, checkpoint.resolve().parent.parent, dataset, world)
        position = trainer.load(checkpoint)
    except BaseException:
        folder_lock.close()
        raise
    return Run(trainer, folder_lock, position)


def check_same_run(config: TrainConfig, dataset: Source, checkpoint: Path) -> None:
    """Raises UserError if options add or remove something that is trained.

    Weights of terms, schedules and other options may change at a resume.
    """
    compare(checkpoints.read_meta(checkpoint).get("data", {}), identify(dataset))
    saved = config_from_yaml((checkpoint / checkpoints.CONFIG_FILE).read_text(), str(checkpoint))

    def parts(config: TrainConfig, has_data_state: bool) -> Iterator[tuple[str, object]]:
        loss = config.loss
        yield "optimizer.name", config.optimizer.name
        for options in loss.of_terms().values():
            yield from options.trained().items()
        yield "loss.gate", loss.gate == "learned"
        yield "loss.balance", loss.balance != "off"
        # networks that are trained on tokens have the width of these
        yield "loss.tokens", any(TERMS[name].trains for name in loss.used_terms()) and loss.tokens
        yield "data.name or data.streaming", has_data_state
        yield "ema.decay or ema.power", list(decay_schedules(config.ema))

    def architecture(config: TrainConfig) -> dict[str, object]:
        model = config.model_config().without_dropout()
        values = {field.name: getattr(model, field.name) for field in fields(model)}
        return {"model.family": config.model.family} | {
            f"{'data' if hasattr(config.data, name) else 'model'}.{name}": value
            for name, value in values.items()
        }

    model, saved_model = architecture(config), architecture(saved)
    for name, value in model.items():
        if value != (was := saved_model.get(name)):
            raise UserError(
                f"{name} cannot change at a resume: it was {was} in {checkpoint}, and is {value} now; start "
                "a new run"
            )
    before = dict(parts(saved, bool(checkpoints.stored_values(checkpoint, "data"))))
    now = dict(parts(config, bool(dataset.state_dict())))
    changed = next((name for name in now if now[name] != before[name]), None)
    if changed is not None:
        raise UserError(
            f"{changed} cannot change so at a resume: {checkpoint} was saved by a run that trained other "
            f"parts; start a new run"
        )


def continue_or_start(config: TrainConfig, world: World) -> Run:
    """``--resume auto``: continues the run that has this name, or starts it if it has no checkpoint yet.

    The folder of a run that stopped before its first checkpoint is kept under another name.

    Raises:
        UserError: the folder is there but not that of a run.
    """
    run_dir = Path(config.out_dir) / str(config.name)

    def can_resume() -> bool:
        if not run_dir.exists():
            return False
        if any((run_dir / "checkpoints").glob("step_*")):
            checkpoints.find_checkpoint(run_dir)
            return True
        if not (run_dir / checkpoints.CONFIG_FILE).is_file():
            raise UserError(f"--resume auto: {run_dir} is not the folder of a run: it has no config.yaml")
        names = (run_dir.with_name(f"{run_dir.name}.stopped-{number}") for number in count(1))
        aside = next(path for path in names if not path.exists())
        with locked(run_dir):
            run_dir.rename(aside)
        print(f"{run_dir} stopped before its first checkpoint: now {aside}, and the run starts anew")
        return False

    if world.on_main(can_resume):
        return resume_run(str(run_dir), config, world)
    return start_run(config, world)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Locks a run's folder, until this process ends in whatever way; raises UserError if it is locked."""
    try:
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written to: {error.strerror}") from error
    with file:
        try:
            is_free = lock(file)
        except OSError as error:  # a disk that knows no locks
            print(f"warning: {run_dir} cannot be locked: {error.strerror}", file=sys.stderr)
            is_free = True
        if not is_free:
            raise UserError(f"{run_dir}: another process is training this run")
        yield
