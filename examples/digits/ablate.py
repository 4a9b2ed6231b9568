"""``python examples/digits/ablate.py``: what each loss term does on the digits, as in the paper's Table 5."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ablation import FIGURES, ROWS, TERM_ROWS, Line, Table

from pixelgen.config.command_line import describe_error, parse, run
from pixelgen.config.load import config_from_yaml, load_config
from pixelgen.config.train_config import TrainConfig
from pixelgen.errors import UserError
from pixelgen.files import replacing

if TYPE_CHECKING:
    from pixelgen.training.loop import Run

PROG = "examples/digits/ablate.py"
KEY = ("row", "seed", "steps", "sample_steps", "options")
COLUMNS = (*KEY, *FIGURES, "failed")  # the last is the reason, without figures then; else empty
CELLS_FILE, TABLE_FILE, PLOT_FILE = "ablation.csv", "ablation.md", "ablation.png"
SHARED = "features"  # OUT/features/SEED: embedded features, the same for all rows of a preset


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """Trains the digits with each set of loss terms at equal steps and compares the samples.

    Writes OUT/ablation.csv (a line per row and seed), ablation.md and ablation.png (means and standard
    deviations over the seeds). The runs stay in OUT/runs. What is finished is not run again: the same command
    continues a grid that was stopped, and with more rows or seeds adds to it. A run whose training fails is
    noted with the reason, the others go on, and the exit code is 1.

    Args:
        out: folder of the results; a grid that is there already is continued. A run whose training failed,
            such as by a loss that is not finite, is not tried again: for that, delete its line in
            ablation.csv and its folder in OUT/runs.
        rows: rows of the grid separated by commas, from flow, repa, lpips, p_dino, gate_0.1, gate_0.3,
            gate_0.6, gate_cosine, gate_sigmoid, gate_snr, gate_learned, no_repa, lpips_0.5, p_dino_0.04,
            which are all that null takes; and of PixelDiT no_pixels, per_patch, pixeldit, and with the
            perceptual terms no_pixels_terms, per_patch_terms, pixeldit_terms.
        steps: optimizer steps of every run. The default grid, 14 rows and 3 seeds, takes about 70 minutes on
            two idle cores.
        seeds: seeds separated by commas, each of weights, data order, noise, embedded features and samples.
        sample_steps: solver steps of the samples that are judged.
        device: auto, cpu or cuda.
        threads: CPU threads; 0 leaves the choice to PyTorch.
    """

    out: str = "ablation"
    rows: str | None = None
    steps: int = 1600
    seeds: str = "0,1,2"
    sample_steps: int = 10
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("sample_steps", 1), ("threads", 0)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} must be at least {least}, got {getattr(self, name)}")
        for name in self.row_names:
            if name not in ROWS:
                raise UserError(f"--rows must be some of {', '.join(ROWS)}, got {name!r}")
        if not all(map(_is_seed, _names(self.seeds))):
            raise UserError(
                f"--seeds must be whole numbers below 2^63 separated by commas, got {self.seeds!r}"
            )

    @property
    def row_names(self) -> list[str]:
        """Names in ``ROWS``, each once."""
        return TERM_ROWS if self.rows is None else list(dict.fromkeys(_names(self.rows)))

    @property
    def seed_names(self) -> list[str]:
        """Seeds as text, each once: 00 is 0."""
        return list(dict.fromkeys(str(int(part)) for part in _names(self.seeds)))


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _is_seed(text: str) -> bool:
    try:
        return text.isdecimal() and int(text) < 2**63
    except ValueError:  # thousands of digits
        return False


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row with a seed: one run and its samples."""

    row: str
    seed: str
    steps: int
    sample_steps: int

    @property
    def name(self) -> str:
        """Folder of the run, which does not depend on how it is sampled."""
        return f"{self.row}-{self.steps}-seed{self.seed}"

    @property
    def shared(self) -> str:
        """Folder of the embedded features, which see patches of one size."""
        preset = ROWS[self.row].config
        return self.seed if preset == "digits" else f"{preset}-{self.seed}"

    @property
    def key(self) -> tuple[str, ...]:
        """The columns of ``KEY``: a row whose definition has changed is another cell."""
        return (
            self.row,
            self.seed,
            str(self.steps),
            str(self.sample_steps),
            " ".join(ROWS[self.row].options),
        )

    def config(self, device: str, threads: int) -> TrainConfig:
        """The row's preset with its terms and model; nothing is drawn on the way."""
        log_every = max(1, min(50, self.steps // 6))
        argv = [*ROWS[self.row].options, "--train.max_steps", str(self.steps), "--seed", self.seed]
        argv += ["--train.log_every", str(log_every), "--train.sample_every", "0"]
        argv += ["--device", device, "--threads", str(threads), "--name", self.name]
        return load_config(argv, prog=PROG)[0]


def read_options(argv: list[str] | None) -> AblateOptions:
    """Parses the command line; its help says how a file is run, where ``parse`` says how a module is."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            return parse(AblateOptions, argv, prog=PROG)
    finally:
        print(told.getvalue().replace(f"python -m {PROG}", f"python {PROG}"), end="")


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, runs what is missing, writes table and plot."""
    options = read_options(argv)
    # torch is imported only after the command line has been checked.
    import torch

    from pixelgen.config.resolve import pick_device

    pick_device(options.device)
    torch.set_float32_matmul_precision("high")
    if options.threads:
        torch.set_num_threads(options.threads)
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made a folder: {error.strerror}") from error
    # Seed by seed: a grid that is stopped has every row of the first seeds.
    cells = [
        Cell(row=row, seed=seed, steps=options.steps, sample_steps=options.sample_steps)
        for seed in options.seed_names
        for row in options.row_names
    ]
    lines = read_lines(out / CELLS_FILE)
    missing = [cell for cell in cells if cell.key not in lines]
    failed = sum(bool(lines[cell.key]["failed"]) for cell in cells if cell.key in lines)
    finished = f"{len(cells) - len(missing) - failed} of them finished"
    print(f"{out}: {len(cells)} runs, {finished}" + (f" and {failed} failed" if failed else ""), flush=True)
    began = time.perf_counter()
    for count, cell in enumerate(missing, 1):
        code, result = run_cell(out, cell, options)
        if code:
            print(f"stopped in {cell.name}; the same command goes on from there", file=sys.stderr)
            return code
        lines[cell.key] = dict(zip(KEY, cell.key, strict=True)) | result
        write_lines(out / CELLS_FILE, lines.values())
        left = (time.perf_counter() - began) / count * (len(missing) - count) / 60
        shown = ", ".join(f"{heading} {result[column]}" for column, (heading, _) in FIGURES.items())
        told = f"{cell.name} failed: {result['failed']}" if result["failed"] else f"{cell.name}: {shown}"
        print(f"{count} of {len(missing)}  {told}; about {left:.0f} min left", flush=True)
    table = Table([lines[cell.key] for cell in cells])
    text = table.markdown(options.steps, options.sample_steps)
    (out / TABLE_FILE).write_text(text)
    table.draw(options.steps).savefig(out / PLOT_FILE, format="png", dpi=110)
    print(f"\n{text}\n{out / TABLE_FILE}, {out / PLOT_FILE} and, a line per run, {out / CELLS_FILE}")
    names = [cell.name for cell in cells if lines[cell.key]["failed"]]
    if names:
        print(f"{len(names)} of {len(cells)} runs failed: {', '.join(names)}", file=sys.stderr)
    return 1 if names else 0


def run_cell(out: Path, cell: Cell, options: AblateOptions) -> tuple[int, Line]:
    """Trains a cell, or goes on where it was stopped, and evaluates it.

    Returns:
        The exit code of a training that was stopped, else 0, and then the columns of ``FIGURES`` and
        ``failed``.
    """
    from pixelgen import evaluate
    from pixelgen.training.curves import read_metrics
    from pixelgen.training.log import METRICS_FILE

    run_dir = out / "runs" / cell.name
    run_dir.parent.mkdir(exist_ok=True)
    # A line for every few steps would bury the grid's own; on a terminal a bar shows where training is.
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(Path(f"{run_dir}.log").open("a"))
        stack.enter_context(contextlib.redirect_stdout(log))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(log))
        config = cell.config(options.device, options.threads)
        run = build_run(run_dir, config, out / SHARED / cell.shared)
        try:
            code = run.train()
        except UserError as error:  # a loss that is not finite: no reason to keep the other cells waiting
            reason = describe_error(error)
            print(reason)
            return 0, {**dict.fromkeys(FIGURES, ""), "failed": reason}
        if code:
            return code, {}
        figures = run_dir / "figures.json"
        figures.unlink(missing_ok=True)
        argv = ["--model", str(run_dir), "--guidance", "1", "--seed", cell.seed, "--out", str(figures)]
        evaluate.main([*argv, "--steps", str(cell.sample_steps), "--device", options.device])
    report = json.loads(figures.read_text())[0]
    # The median: other work on the machine and the warm-up of the first steps are no property of the row.
    milliseconds = read_metrics(run_dir / METRICS_FILE)["ms_per_step"][1].tolist()
    values = {
        "frechet": report["frechet_distance"],
        "accuracy": report["svc_agreement"],
        "variance": report["variance_ratio"],
        "seconds_per_step": statistics.median(milliseconds) / 1000,
    }
    return 0, {column: f"{values[column]:.5g}" for column in FIGURES} | {"failed": ""}


def build_run(run_dir: Path, config: TrainConfig, shared: Path) -> Run:
    """A run, at its newest checkpoint if there is one.

    Args:
        run_dir: folder of the run, existing or not.
        config: its configuration.
        shared: folder of the seed's embedded features; the first run that needs them leaves them there.

    Raises:
        UserError: the run in ``run_dir`` has another configuration.
    """
    from pixelgen.data.sources.digits import Digits
    from pixelgen.encoders.embedded import FILE_NAME
    from pixelgen.training.checkpoint import read as checkpoints
    from pixelgen.training.loop import Run
    from pixelgen.training.processes.world import start_world
    from pixelgen.training.start import resume_run
    from pixelgen.training.step import Trainer

    world = start_world(config.device, config.parallel)
    if checkpoints.list_checkpoints(run_dir):
        kept = config_from_yaml((run_dir / checkpoints.CONFIG_FILE).read_text())
        if any(getattr(kept, part) != getattr(config, part) for part in ("model", "loss", "train", "seed")):
            raise UserError(f"{run_dir} was trained with other options; choose another --out")
        return resume_run(str(run_dir), config, world)
    if run_dir.exists():  # stopped before its first checkpoint
        shutil.rmtree(run_dir)
    run_dir.mkdir()
    if (shared / FILE_NAME).exists():
        shutil.copy(shared / FILE_NAME, run_dir)
    trainer = Trainer(config, run_dir, Digits(), world)
    if (run_dir / FILE_NAME).exists() and not (shared / FILE_NAME).exists():
        shared.mkdir(parents=True, exist_ok=True)
        with replacing(shared / FILE_NAME) as file:
            file.write((run_dir / FILE_NAME).read_bytes())
    return Run(trainer, contextlib.ExitStack(), {})


def read_lines(path: Path) -> dict[tuple[str, ...], Line]:
    """The finished and failed cells of a grid by the columns of ``KEY``; none where there is no file.

    Raises:
        UserError: the file has other columns, or a line without its figures.
    """
    if not path.exists():
        return {}
    lines = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise UserError(f"{path}: the columns must be {','.join(COLUMNS)}, got {reader.fieldnames}")
            for line in reader:
                if problem := _problem(line):
                    raise UserError(f"{path}, line {reader.line_num}: {problem}")
                lines[tuple(line[column] for column in KEY)] = line
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a CSV file: {describe_error(error)}") from error
    return lines


def _problem(line: dict[str, str]) -> str | None:
    """What keeps a line from being shown. Cells that it lacks are None, and None is the key of too many."""
    if None in line or None in line.values():
        return f"there must be {len(COLUMNS)} cells"
    for column in () if line["failed"] else FIGURES:
        try:
            is_number = math.isfinite(float(line[column]))
        except ValueError:
            is_number = False
        if not is_number:
            return f"{column} must be a number, got {line[column]!r}"
    return None


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """Writes the cells of a grid; a process that is killed leaves the old file."""
    with replacing(path, "w") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    run(main, PROG)
