"""What a run tells: progress bar or lines, metrics.jsonl, TensorBoard, sample grids, the loss curve."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from pixelgen.checkpoint import list_checkpoints
from pixelgen.config import TrainConfig
from pixelgen.errors import UserError
from pixelgen.guard import FiniteGuard, NotFinite
from pixelgen.plots import save_grid, save_loss_curves

METRICS_FILE = "metrics.jsonl"


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines after ``step``: a resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # the run was killed while writing this line
        if record["step"] <= step:
            kept.append(line)
    path.write_text("".join(f"{line}\n" for line in kept))


class TrainLog:
    """Means of the loss terms over the steps since the last line; the host waits for the device only there.

    Args:
        run_dir: where metrics.jsonl, tensorboard/, samples/ and loss.png go.
        config: the run's configuration.
        step: optimizer steps done before this process.
        guard: has seen every step.
        image_name: what to call the image at a place of the batch of a step, counted from 0.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrainConfig,
        step: int,
        guard: FiniteGuard,
        image_name: Callable[[int, int], str],
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir, self.config, self.guard, self.image_name = run_dir, config, guard, image_name
        self.seconds = 0.0  # of training, without sampling and saving
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._count = 0
        self._since = time.perf_counter()
        self._paused = 0.0
        self._file = (run_dir / METRICS_FILE).open("a")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=config.train.max_steps,
            initial=step,
            unit="step",
            desc=run_dir.name,
            disable=not self._is_terminal,
            dynamic_ncols=True,
        )

    def add(self, terms: dict[str, Tensor]) -> None:
        """Adds one step's scalars, without reading them."""
        for name, value in terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._count += 1
        self._bar.update()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def write(self, step: int, lr: float) -> None:
        """Writes the means since the last call; nothing when there was no step.

        Raises:
            UserError: a term is not finite; names the step, the terms and the samples.
        """
        if not self._count:
            return
        # a term that comes or goes with a schedule has fewer steps than the others; waits here
        means = {name: (total / self._counts[name]).item() for name, total in self._sums.items()}
        now = time.perf_counter()
        seconds = now - self._since - self._paused
        self.seconds += seconds
        ms_per_step = 1000 * seconds / self._count
        images_per_second = self._count * self.config.train.batch_size / seconds
        record = {"step": step, **means, "lr": lr, "ms_per_step": ms_per_step, "img_per_s": images_per_second}
        problem = self.guard.first()
        if problem is not None:
            raise UserError(self._not_finite(problem))
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name != "step":
                self._tensorboard.add_scalar(name, value, step)
        shown = {name: f"{value:.4g}" for name, value in means.items()} | {
            "img/s": f"{images_per_second:.0f}"
        }
        if self._is_terminal:
            self._bar.set_postfix(shown)
        else:
            left = (self.config.train.max_steps - step) * seconds / self._count
            values = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(
                f"step {step}  {values}  lr {lr:.3g}  {ms_per_step:.1f} ms/step  ETA {left:.0f} s", flush=True
            )
        self._sums, self._counts, self._count, self._paused = {}, {}, 0, 0.0
        self._since = time.perf_counter()

    def image(self, step: int, images: Tensor, columns: int) -> None:
        """Saves a grid of samples (N, C, H, W) uint8 and draws the loss curves anew."""
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        save_grid(images, folder / f"step_{step:08d}.png", columns=columns)
        self.curves()

    def curves(self) -> None:
        """Draws the loss curves anew."""
        save_loss_curves(self.run_dir / METRICS_FILE, self.run_dir / "loss.png")

    def _not_finite(self, problem: NotFinite) -> str:
        """Where the run went wrong, what there is to go back to, and what to change."""
        text = f"training stopped at step {problem.step}: not finite: {', '.join(problem.terms)}"
        for term, places in problem.samples.items():
            named = [f"{place} ({self.image_name(problem.step - 1, place)})" for place in places[:8]]
            text += f"; {term} of samples {', '.join(named)}{' and more' if len(places) > 8 else ''}"
        found = list_checkpoints(self.run_dir)
        text += f". The newest checkpoint is {found[-1]}" if found else ". There is no checkpoint yet"
        bad = set(problem.terms) - {"loss", "grad_norm"}  # those follow from the others
        if bad and bad <= {"adversarial", "discriminator", "discriminator_grad_norm"}:
            return f"{text}. Lower loss.adversarial_lr or loss.adversarial_weight"
        clip = "lower" if self.config.optimizer.max_grad_norm else "set"
        return f"{text}. Lower optimizer.lr or {clip} optimizer.max_grad_norm"

    def close(self) -> None:
        """Closes files and the progress bar."""
        self._bar.close()
        self._file.close()
        self._tensorboard.close()
