"""What a run logs: progress bar or lines, metrics.jsonl, TensorBoard, W&B, sample grids, the loss curves."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from pixelgen.config.train_config import TrainConfig
from pixelgen.data.loader import Loader
from pixelgen.errors import UserError
from pixelgen.files import write_whole
from pixelgen.planning.devices import peak_flops
from pixelgen.planning.flops import train_step_flops
from pixelgen.sampling.images import save_grid
from pixelgen.training.checkpoint.read import list_checkpoints
from pixelgen.training.checkpoint.write import CheckpointWriter
from pixelgen.training.curves import save_loss_curves
from pixelgen.training.step import Trainer, is_share

METRICS_FILE = "metrics.jsonl"


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines after ``step``: a resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        with suppress(ValueError, TypeError, KeyError):  # the run was killed while writing this line
            if json.loads(line)["step"] <= step:
                kept.append(line)
    write_whole(path, "".join(f"{line}\n" for line in kept))


def check_logging(config: TrainConfig) -> None:
    """Raises UserError where a package that the configuration logs to is not installed."""
    if config.train.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError('train.wandb needs a package: pip install "pixelgen[wandb]"')


class TrainLog:
    """Means of the loss terms over the steps since the last line; the host waits for the device only there.

    All processes call it, and the main one prints and writes.
    """

    def __init__(self, trainer: Trainer, batches: Loader, writer: CheckpointWriter) -> None:
        self.trainer, self.config, self.world = trainer, trainer.config, trainer.world
        self.run_dir, self.batches, self._writer = trainer.run_dir, batches, writer
        self.seconds = 0.0  # of training, without sampling and saving
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._count = 0
        train_step_flops(self.config)  # counted here, once, and not in the time of a step
        self._since = time.perf_counter()
        self._paused = self._waited = 0.0
        self._peak = _stated_peak(trainer.device, "bf16" if self.config.dtype == "bfloat16" else "fp32")
        self._files = _LogFiles(trainer) if self.world.is_main else None
        self._bar = tqdm(
            total=self.config.train.max_steps,
            initial=trainer.step,
            unit="step",
            desc=self.run_dir.name,
            disable=None if self.world.is_main else True,  # None: where it is not a terminal
            dynamic_ncols=True,
        )

    def add(self, terms: dict[str, Tensor]) -> None:
        """Adds one step's scalars, without reading them."""
        for name, value in terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._count += 1
        self._bar.update()

    def waited(self, seconds: float) -> None:
        """Adds time for which the process waited for a step's images."""
        self._waited += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        if self.trainer.device.type == "cuda":  # steps that are still running do
            torch.cuda.synchronize(self.trainer.device)
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def write(self, step: int, lr: float) -> None:
        """Writes the means since the last call, if there was a step; ``lr`` is that of the last one.

        Raises:
            UserError: a term is not finite; names the step, the terms and the samples.
        """
        if not self._count:
            return
        size = self.world.size
        # A term that comes or goes with a schedule has fewer steps than the others.
        shares = {name: total / self._counts[name] for name, total in self._sums.items()}
        figures = {"waited": self._waited / size, "broken": float(self.batches.num_broken)}
        own = torch.stack([value.float() for value in shares.values()])
        own = torch.cat([own, torch.tensor(list(figures.values()), device=own.device)])
        values = self.world.sum(own).tolist()  # waits here
        now = time.perf_counter()
        means = dict(zip((*shares, *figures), values, strict=True))
        means |= {name: means[name] / size for name in shares if not is_share(name)}
        waited, broken = means.pop("waited"), means.pop("broken")
        if not all(map(math.isfinite, means.values())):
            self._fail_not_finite()
        seconds = max(now - self._since - self._paused, 1e-9)
        self.seconds += seconds
        record = {"step": step, **means, "lr": lr} | self._rates(step, seconds)
        record["data_wait"] = min(1.0, waited / seconds)
        if self.config.optimizer.skip_grad_norm is not None:
            record["skipped_steps"] = int(self.trainer.optimizers.skipped)
        if broken:
            record["broken_images"] = int(broken)
        if self._files is not None:
            self._files.write(record)
            self._show(record, [name for name in means if name != "gated_fraction"])
        self._sums, self._counts, self._count = {}, {}, 0
        self._paused = self._waited = 0.0
        self._since = now

    def _rates(self, step: int, seconds: float) -> dict[str, Any]:
        size = self.world.size
        per_second = self._count * self.config.train.batch_size / seconds
        rates: dict[str, Any] = {"ms_per_step": 1000 * seconds / self._count, "img_per_s": per_second}
        if size > 1:
            rates["img_per_s_per_process"] = per_second / size
        flops = train_step_flops(self.config, step - 1).total * self._count / seconds
        rates["tflop_per_s_per_process"] = flops / size / 1e12
        if self._peak is not None:
            rates["mfu"] = flops / size / self._peak
        rates["memory_gb"] = _most_memory(self.trainer.device) / 1e9
        rates["eta_s"] = (self.config.train.max_steps - step) * seconds / self._count
        return rates

    def _show(self, record: dict[str, Any], terms: list[str]) -> None:
        shown = {name: f"{record[name]:.4g}" for name in terms}
        rates = {"img/s": f"{record['img_per_s']:.0f}"}
        if "img_per_s_per_process" in record:
            rates["img/s per process"] = f"{record['img_per_s_per_process']:.0f}"
        # Against a peak that the vendor states; of a CPU none is known, and a share of nothing would mislead.
        if "mfu" in record:
            rates["MFU"] = f"{record['mfu']:.1%}"
        else:
            rates["GFLOP/s"] = f"{1000 * record['tflop_per_s_per_process']:.3g}"
        rates["mem"] = f"{record['memory_gb']:.3g} GB"
        rates["data"] = f"{record['data_wait']:.0%}"
        if record.get("skipped_steps"):
            rates["skipped"] = str(record["skipped_steps"])
        if record.get("broken_images"):
            rates["broken images"] = str(record["broken_images"])
        if not self._bar.disable:
            self._bar.set_postfix(shown | rates)
            return
        shown |= {"lr": f"{record['lr']:.3g}"}
        first, rest = ("  ".join(f"{k} {v}" for k, v in part.items()) for part in (shown, rates))
        left = timedelta(seconds=round(record["eta_s"]))
        print(
            f"step {record['step']}  {first}  {record['ms_per_step']:.1f} ms/step  {rest}  ETA {left}",
            flush=True,
        )

    def image(self, step: int, images: Tensor, columns: int) -> None:
        """Saves a grid of samples (N, C, H, W) uint8 and draws the loss curves again."""
        if self._files is not None:
            self._files.image(images, step, columns)
        self.curves()

    def curves(self) -> None:
        """Draws the loss curves again."""
        if self._files is not None:
            self._files.curves()

    def _fail_not_finite(self) -> NoReturn:
        """Ends the run in all processes; says where it failed, where it can go on, and what to change."""
        self._writer.wait()  # what is being written is from before
        problems = self.world.gather(self.trainer.guard.first())
        step = min(problem.step for problem in problems if problem is not None)
        first = [(rank, problem) for rank, problem in enumerate(problems) if problem and problem.step == step]
        terms = list(dict.fromkeys(term for _, problem in first for term in problem.terms))
        share = self.config.train.batch_size // self.world.size
        samples: dict[str, list[int]] = {}
        for rank, problem in first:
            for term, places in problem.samples.items():
                samples.setdefault(term, []).extend(rank * share + place for place in places)
        text = f"training stopped at step {step}: not finite: {', '.join(terms)}"
        for term, places in samples.items():
            named = [self.trainer.describe_sample(step - 1, place) for place in places[:8]]
            text += f"; {term} of samples {', '.join(named)}{' and more' if len(places) > 8 else ''}"
        found = list_checkpoints(self.run_dir)
        newest = f"The newest checkpoint is {found[-1]}" if found else "There is no checkpoint yet"
        bad = set(terms) - {"loss", "grad_norm"}  # those follow from the others
        remedy = self.trainer.objective.remedy(bad) if bad else None
        if remedy is None:
            clip = "lower" if self.config.optimizer.max_grad_norm else "set"
            remedy = f"optimizer.lr or {clip} optimizer.max_grad_norm"
        self.world.fail(f"{text}. {newest}. Lower {remedy}")

    def close(self) -> None:
        """Closes files and the progress bar."""
        self._bar.close()
        if self._files is not None:
            self._files.close()


class _LogFiles:
    """The files and services that the main process writes to, with one warning for each that fails."""

    def __init__(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run_dir, step = trainer.run_dir, trainer.step
        self._failed: set[str] = set()
        folder = str(self._run_dir / "tensorboard")
        self._tensorboard = SummaryWriter(folder, purge_step=step + 1 if step else None)
        self._wandb: Any = None
        if trainer.config.train.wandb:
            import wandb

            self._wandb = wandb.init(
                project="pixelgen",
                name=self._run_dir.name,
                id=self._run_dir.name,  # a resumed run goes on in the same place
                resume="allow",
                dir=str(self._run_dir),
                config=asdict(trainer.config),
            )

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """A full disk must not end a run, whose checkpoints may go elsewhere or fit again later."""
        try:
            yield
        except OSError as error:
            if what not in self._failed:
                self._failed.add(what)
                print(f"warning: {what} cannot be written: {error.strerror}", file=sys.stderr, flush=True)

    def write(self, record: dict[str, Any]) -> None:
        with self._writing(METRICS_FILE), (self._run_dir / METRICS_FILE).open("a") as file:
            file.write(json.dumps(record) + "\n")
        step = record["step"]
        with self._writing("tensorboard"):
            for name, value in record.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(record, step=step)

    def image(self, images: Tensor, step: int, columns: int) -> None:
        path = self._run_dir / "samples" / f"step_{step:08d}.png"
        with self._writing("samples"):
            save_grid(images, path, columns=columns)
            if self._wandb is not None:
                import wandb

                self._wandb.log({"samples": wandb.Image(str(path))}, step=step)

    def curves(self) -> None:
        metrics = self._run_dir / METRICS_FILE
        if metrics.is_file() and metrics.stat().st_size:
            with self._writing("loss.png"):
                save_loss_curves(metrics, self._run_dir / "loss.png")

    def close(self) -> None:
        with self._writing("tensorboard"):
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _stated_peak(device: torch.device, dtype: str) -> float | None:
    """FLOP/s that the vendor states for a device; None where that is not known, as for a CPU."""
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def _most_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the device's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes
