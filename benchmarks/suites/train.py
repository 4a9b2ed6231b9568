"""The suite of the run: what data, checkpoints and more processes cost a training step."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import plots, processes, report, setting, tables
from benchmarks.data import make_folder, natural
from benchmarks.measure import Timing, elapsed_ms, summarise
from benchmarks.step import FLOW_MATCHING
from pixelgen import checkpoint as checkpoints
from pixelgen.config import config_to_yaml, load_config
from pixelgen.config_checks import check_batch
from pixelgen.data.prepare import PrepareOptions, prepare
from pixelgen.distributed import World
from pixelgen.errors import UserError
from pixelgen.loop import start_run
from pixelgen.memory import count_parameters
from pixelgen.plan import Machine, communication, resolve_layout
from pixelgen.saving import CheckpointWriter
from pixelgen.trainlog import METRICS_FILE

PARTS = ("step", "save", "processes")
SOURCES = ("synthetic", "folder", "prepared")
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


def row(op: str, provider: str, shape: str, timing: Timing, **more: str) -> report.Row:
    """A row without the columns of `setting`; what is not given is empty."""
    times = {f"{name}_ms": f"{getattr(timing, f'{name}_ms'):.5g}" for name in ("median", "p20", "p80")}
    empty = dict.fromkeys(report.TRAIN.columns[6:], "")
    return {"op": op, "provider": provider, "shape": shape, **times, **empty, **more}


# --- data ---


def make_images(size: Size, root: Path) -> dict[str, tuple[str, ...]]:
    """Sources of the same images, and their options."""
    image_size = load_config([*size.options, *FLOW_MATCHING, "--data.path", "."])[0].data.image_size
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


def step_rows(
    size: Size, device: torch.device, batch: int, repeats: int | None, bar: tqdm
) -> Iterator[report.Row]:
    """Rows of the op `step`: runs with each source of images, with some numbers of workers."""
    lines = size.lines if repeats is None else size.skipped + repeats
    with tempfile.TemporaryDirectory() as folder:
        bar.set_postfix_str("images")
        sources = make_images(size, Path(folder))
        for workers in size.workers:
            found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in SOURCES}
            for _ in range(size.rounds):
                for name, source in sources.items():
                    bar.set_postfix_str(f"{name}, {workers} workers")
                    more = ("--data.workers", str(workers), "--train.log_every", str(size.log_every))
                    more += ("--train.max_steps", str(lines * size.log_every))
                    command = options(device, batch, *size.options, *source, *more)
                    found[name].append(records(command, device))
                    bar.update()
            shape = f"{size.model} B={batch} workers={workers}"
            losses = {name: [line["loss"] for line in runs[0]] for name, runs in found.items()}
            for name, runs in found.items():
                # Shards hold the very images that the folder has.
                if name == "prepared" and (wrong := processes.wrong_losses(losses[name], losses["folder"])):
                    tqdm.write(f"{shape}: prepared is wrong: {wrong.replace('one process', 'the folder')}")
                    continue
                kept = [line for run in runs for line in run[size.skipped :]]
                times = [line["ms_per_step"] for line in kept]
                waited = sum(line["ms_per_step"] * line["data_wait"] for line in kept)
                timing = summarise(times)
                yield row(
                    "step",
                    name,
                    shape,
                    timing,
                    images_per_s=f"{1e3 * batch / timing.median_ms:.4g}",
                    data_wait=f"{waited / sum(times):.4f}",
                    loss=f"{losses[name][-1]:.7g}",
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
        self.writer = CheckpointWriter(run_dir, World(device), self.runner.trainer.averages.names, 1, 0)
        self.writer.prepare(self.runner.trainer.state_dict())  # as the training loop does

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
        while not wait and (self.writer.is_busy or len(steps) < 2):
            steps.append(self.step_ms())
        last = self.writer.wait()
        assert last is not None
        if last.error is not None:
            raise UserError(f"a checkpoint could not be written: {last.error}")
        stored = checkpoints.load_part(self.run_dir / "checkpoints" / f"step_{step:08d}", "model.")
        is_right = all(torch.equal(stored[name], value) for name, value in expected.items())
        return Stall(stall * 1e3, max(stall, collected + last.seconds), steps, is_right)


def save_rows(size: Size, device: torch.device, repeats: int | None, bar: tqdm) -> Iterator[report.Row]:
    """Rows of the ops `save`, milliseconds for which training waits, and `beside`, steps meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        bar.set_postfix_str("save")
        saver = Saver(size, device, Path(folder))
        saves: dict[str, list[Stall]] = {"sync": [], "async": [], "async_first": [saver.save(wait=False)]}
        bar.update()
        alone = []
        for _ in range(repeats or size.saves):
            for name in ("sync", "async"):
                saves[name].append(saver.save(wait=name == "sync"))
                bar.update()
            alone += [saver.step_ms() for _ in range(3)]
        saver.writer.close()
        shape = f"{saver.runner.trainer.num_parameters / 1e6:.1f}M B={size.saved_batch}"
    for name, found in saves.items():
        if not all(save.is_right for save in found):
            tqdm.write(f"{shape}: {name} is wrong and not told: it is not the state of its step")
            continue
        seconds = statistics.median(save.seconds for save in found)
        share = statistics.median(save.stall_ms / save.seconds / 1e3 for save in found)
        # quantiles of a single save do not exist
        stalls = [save.stall_ms for save in found] * (2 if len(found) == 1 else 1)
        told = {"save_s": f"{seconds:.4g}", "stall_share": f"{share:.4f}"}
        yield row("save", name, shape, summarise(stalls), **told)
    beside = [step for save in saves["async"] for step in save.steps_ms]
    for name, times in (("alone", alone), ("saving", beside)):
        yield row("beside", name, shape, summarise(times))


# --- processes ---


def process_rows(
    size: Size, device: torch.device, batch: int, repeats: int | None, threads: int, bar: tqdm
) -> Iterator[report.Row]:
    """Rows of the op `processes`: a step of one process, and of several that share the same batch."""
    count = num_processes(device)
    bar.set_postfix_str(f"{count} processes")
    common = options(device, batch, *size.options, "--data.name", "synthetic")
    commands = {name: [*common, *more] for name, more in MODES.items()}
    check_batch(load_config(common)[0], count)
    task = processes.Task(options=commands, steps=size.checked, repeats=repeats or size.repeats)
    results = processes.launch(task, count, threads)
    shape = f"{size.model} B={batch} processes={count}"
    for name, result in results.items():
        config, _ = load_config(commands[name])
        parameters = count_parameters(config)
        layout = resolve_layout(config, Machine(1 if name == processes.ONE else count, "H100"), parameters)
        formula, _ = communication(config, parameters, layout)
        if wrong := result.get("wrong") or wrong_bytes(result["sent"], formula):
            tqdm.write(f"{shape}: {name} is wrong: {wrong}")
            continue
        timing = Timing(**result["timing"])
        yield row(
            "processes",
            name,
            shape,
            timing,
            images_per_s=f"{1e3 * batch / timing.median_ms:.4g}",
            sent_mb=f"{result['sent'] / 1e6:.5g}",
            formula_mb=f"{formula / 1e6:.5g}",
            loss=f"{result['losses'][-1]:.7g}",
        )
    bar.update()


def num_processes(device: torch.device) -> int:
    """Processes that are held against one: as many as there are GPUs, on the CPU two."""
    return torch.cuda.device_count() if device.type == "cuda" else 2


def wrong_bytes(sent: float, formula: float) -> str | None:
    """What is wrong with the bytes that a process sends in a step."""
    if LEAST_SENT * formula <= sent <= MOST_SENT * formula:
        return None
    return f"it sends {sent / 1e6:.5g} MB a step, {formula / 1e6:.5g} by the formula"


def run(arguments: argparse.Namespace) -> int:
    """Times what the command line asks for, writes CSV, table and plot, prints the ratios.

    Returns:
        0, or 1 when something was wrong.
    """
    parts = setting.chosen("--only", arguments.only, list(PARTS))
    if setting.pick_device(arguments.device).type == "cpu":
        arguments.threads = arguments.threads or 1  # of each process; several share the cores
    device, columns, folder = setting.start(arguments)
    size = SIZES[device.type]
    batch, repeats = arguments.batch or size.batch, arguments.repeats
    if "processes" in parts and num_processes(device) == 1:
        print("processes: left out, there is one GPU")
        parts.remove("processes")
    # name -> rows, turns of the bar, and number of rows
    runs = len(SOURCES) * len(size.workers)
    threads = int(columns["threads"])
    bars = {"step": runs * size.rounds, "save": 1 + 2 * (repeats or size.saves), "processes": 1}
    expected = {"step": runs, "save": 5, "processes": len(MODES)}
    path = folder / "train.csv"
    rows: list[report.Row] = []
    with tqdm(total=sum(bars[part] for part in parts), unit="part", dynamic_ncols=True) as bar:
        timed = {
            "step": step_rows(size, device, batch, repeats, bar),
            "save": save_rows(size, device, repeats, bar),
            "processes": process_rows(size, device, batch, repeats, threads, bar),
        }
        for part in parts:
            measured = [{**found, **columns} for found in timed[part]]
            report.write_csv(path, report.TRAIN, measured)  # now: a run that is stopped keeps its rows
            rows.extend(measured)
    recorded = report.read_csv(path, columns)
    (folder / "train.md").write_text(tables.train(recorded))
    plots.train(recorded, folder / "train.png")
    print(tables.train(rows))
    print(f"{path} and, drawn from it, train.md and train.png")
    return 0 if len(rows) == sum(expected[part] for part in parts) else 1
