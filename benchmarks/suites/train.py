"""The suite of the run: what data, checkpoints and more processes cost a training step."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import processes
from benchmarks.measure import Timing, elapsed_ms, summarise
from benchmarks.report import Row, row
from benchmarks.suite import Part, Run, Suite
from benchmarks.suites.data import make_folder, natural
from benchmarks.suites.step import FLOW_MATCHING
from pixelgen.config import config_to_yaml, load_config
from pixelgen.config.resolve import check_batch
from pixelgen.data.prepare.command import PrepareOptions, prepare
from pixelgen.errors import UserError
from pixelgen.planning.devices import Machine
from pixelgen.planning.memory import count_parameters, resolve_layout
from pixelgen.planning.plan import communication
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.checkpoint.write import CheckpointWriter
from pixelgen.training.log import METRICS_FILE
from pixelgen.training.processes.world import World
from pixelgen.training.start import start_run

MODES = {
    processes.ONE: (),
    "ddp": ("--parallel.mode", "ddp"),
    "fsdp": ("--parallel.mode", "fsdp"),
}
# What is sent over what the formula says; shards of odd sizes are padded.
LEAST_SENT, MOST_SENT = 0.98, 1.02
# Images of 256 pixels in few tokens: a step of a CPU is short, and reading its images is what it really is.
SMALL = (
    *("--data.image_size", "256", "--data.channels", "3", "--model.size", "JiT-B/32"),
    *("--model.width", "256", "--model.depth", "2", "--model.heads", "4", "--model.in_context_start", "0"),
)
LARGE = (*SMALL, "--model.width", "512", "--model.depth", "6", "--model.heads", "8")
XL = ("--config", "pixelgen-xl-256")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is timed on a kind of device.

    Attributes:
        model, options: name and options of the model of the steps.
        batch: images per step.
        saved: options of the model whose checkpoints are written, beside steps of ``saved_batch`` images.
        saved_batch: see saved.
        workers: numbers of workers of the loader.
        log_every: steps between two lines of metrics.jsonl; each line is one sample.
        lines, skipped: of a run, and of these those at the beginning that do not count.
        rounds: runs with each source of images, in turns.
        pictures, copies: JPEGs of the folder, and files of each.
        checked: steps whose losses must agree.
        saves: of each kind.
        repeats: timed steps of each number of processes.
    """

    model: str
    options: tuple[str, ...]
    batch: int
    saved: tuple[str, ...]
    saved_batch: int
    workers: tuple[int, ...]
    log_every: int = 1
    lines: int = 6
    skipped: int = 2
    rounds: int = 2
    pictures: int = 16
    copies: int = 8
    checked: int = 5
    saves: int = 3
    repeats: int = 9


SIZES = {
    "cpu": Size(model="small", options=SMALL, batch=8, saved=LARGE, saved_batch=2, workers=(0, 1)),
    "cuda": Size(
        model="XL/16",
        options=XL,
        batch=64,
        saved=XL,
        saved_batch=16,
        workers=(0, 8),
        log_every=10,
        copies=64,
        repeats=20,
    ),
}


def options(device: torch.device, batch: int, *more: str) -> list[str]:
    """The command line of a run."""
    command = [*more, *FLOW_MATCHING, "--device", device.type, "--train.batch_size", str(batch)]
    return [*command, "--train.sample_every", "0", "--optimizer.warmup_steps", "0"]


# --- data ---


def make_images(size: Size, root: Path) -> dict[str, tuple[str, ...]]:
    """Sources of the same images, and their options."""
    image_size = load_config([*size.options, *FLOW_MATCHING])[0].data.image_size
    pictures = [natural(500, 375, seed) for seed in range(size.pictures)]
    make_folder(root / "folder", pictures, size.copies)
    target = str(root / "prepared")
    wanted = PrepareOptions(src=str(root / "folder"), dst=target, resolution=image_size, workers=0)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own
        prepare(wanted)
    found = {
        "synthetic": ("--data.name", "synthetic"),
        "folder": ("--data.name", "folder", "--data.path", str(root / "folder")),
        "prepared": ("--data.name", "prepared", "--data.path", target),
    }
    return {name: (*chosen, "--data.num_classes", "2") for name, chosen in found.items()}


def records(command: list[str], device: torch.device) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run, as ``python -m pixelgen.train`` does it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        config, _ = load_config([*command, "--out_dir", folder, "--name", "run"])
        if start_run(config, World(device)).train():
            raise KeyboardInterrupt  # the run took the signal and has ended as it does
        lines = (Path(folder) / "run" / METRICS_FILE).read_text().splitlines()
    return [json.loads(line) for line in lines]


def step_rows(run: Run, size: Size, batch: int) -> Iterator[Row]:
    """Rows of the case `step`: runs with each source of images, with some numbers of workers."""
    repeats = run.arguments.repeats
    lines = size.lines if repeats is None else size.skipped + repeats
    with tempfile.TemporaryDirectory() as folder:
        sources = make_images(size, Path(folder))
        for workers in size.workers:
            found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in sources}
            for _ in range(size.rounds):
                for name, source in sources.items():
                    run.show(f"step: {name}, {workers} workers")
                    more = ("--data.workers", str(workers), "--train.log_every", str(size.log_every))
                    more += ("--train.max_steps", str(lines * size.log_every))
                    command = options(run.device, batch, *size.options, *source, *more)
                    found[name].append(records(command, run.device))
            shape = f"{size.model} B={batch} workers={workers}"
            losses = {name: [line["loss"] for line in runs[0]] for name, runs in found.items()}
            for name, runs in found.items():
                # Shards hold the very images that the folder has.
                if name == "prepared" and (wrong := processes.wrong_losses(losses[name], losses["folder"])):
                    run.wrong(shape, name, wrong.replace("one process", "the folder"))
                    continue
                kept = [line for run in runs for line in run[size.skipped :]]
                times = [line["ms_per_step"] for line in kept]
                waited = sum(line["ms_per_step"] * line["data_wait"] for line in kept)
                timing = summarise(times)
                yield row(
                    "step",
                    name,
                    timing,
                    shape=shape,
                    images_per_s=1e3 * batch / timing.median_ms,
                    data_wait=waited / sum(times),
                    loss=losses[name][-1],
                )


# --- checkpoints ---


@dataclass(frozen=True)
class Stall:
    """One save: milliseconds for which training waited, seconds it took, steps on the way, and whether it is
    the state that was saved."""

    stall_ms: float
    seconds: float
    steps_ms: list[float]
    is_right: bool


class Saver:
    """A trainer whose state is saved."""

    def __init__(self, size: Size, device: torch.device, run_dir: Path) -> None:
        command = options(device, size.saved_batch, *size.saved, "--data.name", "synthetic")
        self.device, self.run_dir = device, run_dir
        self.config, _ = load_config(command)
        self.runner = processes.Runner(self.config, World(device))
        self.writer = CheckpointWriter(run_dir, World(device), 1, 0, {})
        self.writer.stage(self.runner.trainer.state_dict())  # as the training loop does

    def step_ms(self) -> float:
        """Milliseconds of a training step."""
        return elapsed_ms(self.device, self.runner.step)

    def save(self, *, wait: bool) -> Stall:
        """Saves as the training loop does; training goes on at once, or waits."""
        trainer = self.runner.trainer
        self.step_ms()  # another state, which the last save does not have
        expected = {name: p.detach().to("cpu", copy=True) for name, p in trainer.model.named_parameters()}
        begin = time.perf_counter()
        state = trainer.state_dict() | {"data": {}}
        collected = time.perf_counter() - begin
        step = trainer.step
        self.writer.start(step, state, config_to_yaml(self.config))
        if wait:
            self.writer.wait()
        stall = time.perf_counter() - begin
        steps: list[float] = []
        save = self.writer.last
        assert save is not None
        while not wait and (save.seconds == 0 or len(steps) < 2):
            steps.append(self.step_ms())
        last = self.writer.wait()
        assert last is not None
        if last.error is not None:
            raise UserError(f"a checkpoint could not be written: {last.error}")
        stored = checkpoints.load_part(self.run_dir / "checkpoints" / f"step_{step:08d}", "model.")
        is_right = all(torch.equal(stored[name], value) for name, value in expected.items())
        return Stall(stall * 1e3, max(stall, collected + last.seconds), steps, is_right)


def save_rows(run: Run, size: Size) -> Iterator[Row]:
    """Rows of the cases `save`, milliseconds for which training waits, and `beside`, steps meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(size, run.device, Path(folder))
        saves: dict[str, list[Stall]] = {"sync": [], "async": [], "async_first": [saver.save(wait=False)]}
        alone = []
        for _ in range(run.arguments.repeats or size.saves):
            for name in ("sync", "async"):
                saves[name].append(saver.save(wait=name == "sync"))
            alone += [saver.step_ms() for _ in range(3)]
        saver.writer.close()
        shape = f"{saver.runner.trainer.num_parameters / 1e6:.1f}M B={size.saved_batch}"
    for name, found in saves.items():
        if not all(save.is_right for save in found):
            run.wrong(f"save {shape}", name, "what was saved is not the state of its step")
            continue
        # quantiles of a single save do not exist
        stalls = [save.stall_ms for save in found] * (2 if len(found) == 1 else 1)
        yield row(
            "save",
            name,
            summarise(stalls),
            shape=shape,
            save_s=statistics.median(save.seconds for save in found),
            stall_share=statistics.median(save.stall_ms / save.seconds / 1e3 for save in found),
        )
    beside = [step for save in saves["async"] for step in save.steps_ms]
    for name, times in (("alone", alone), ("saving", beside)):
        yield row("beside", name, summarise(times), shape=shape)


# --- processes ---


def process_rows(run: Run, size: Size, batch: int, count: int) -> Iterator[Row]:
    """Rows of the case `processes`: a step of one process, and of several that share the same batch."""
    common = options(run.device, batch, *size.options, "--data.name", "synthetic")
    commands = {name: [*common, *more] for name, more in MODES.items()}
    check_batch(load_config(common)[0], count)
    repeats = run.arguments.repeats or size.repeats
    task = processes.Task(options=commands, steps=size.checked, repeats=repeats)
    results = processes.launch(task, count, int(run.setting["threads"]))
    shape = f"{size.model} B={batch} processes={count}"
    for name, result in results.items():
        config, _ = load_config(commands[name])
        parameters = count_parameters(config)
        layout = resolve_layout(config, Machine(1 if name == processes.ONE else count, "H100"), parameters)
        formula, _ = communication(config, parameters, layout)
        if wrong := result.get("wrong") or wrong_bytes(result["sent"], formula):
            run.wrong(shape, name, wrong)
            continue
        timing = Timing(**result["timing"])
        yield row(
            "processes",
            name,
            timing,
            shape=shape,
            images_per_s=1e3 * batch / timing.median_ms,
            sent_mb=result["sent"] / 1e6,
            formula_mb=formula / 1e6,
            loss=result["losses"][-1],
        )


def num_processes(device: torch.device) -> int:
    """Processes that are held against one: as many as there are GPUs, on the CPU two."""
    return torch.cuda.device_count() if device.type == "cuda" else 2


def wrong_bytes(sent: float, formula: float) -> str | None:
    """What is wrong with the bytes that a process sends in a step."""
    if LEAST_SENT * formula <= sent <= MOST_SENT * formula:
        return None
    return f"it sends {sent / 1e6:.5g} MB a step, {formula / 1e6:.5g} by the formula"


def parts(run: Run) -> list[Part]:
    size, count = SIZES[run.device.type], num_processes(run.device)
    batch = run.arguments.batch or size.batch
    found = [
        Part(case="step", label="step", rows=partial(step_rows, run, size, batch)),
        Part(case="save", label="save, and steps beside", rows=partial(save_rows, run, size)),
    ]
    if count == 1:
        print("processes: left out, there is one GPU")
        return found
    several = partial(process_rows, run, size, batch, count)
    return [*found, Part(case="processes", label=f"{count} processes", rows=several)]


SUITE = Suite(
    name="train",
    parts=parts,
    baselines=("synthetic", "sync", "alone", processes.ONE),
    plots={"": ("median_ms", "data_wait", "stall_share")},
    cpu_threads=1,  # of each process; several share the cores
)
