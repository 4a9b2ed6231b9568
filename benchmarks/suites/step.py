"""The suite of whole training steps: forward, loss, backward, clipping, AdamW and EMA of the real trainer."""

import argparse
import contextlib
import gc
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import plots, report, setting, tables
from benchmarks.measure import Timing, elapsed_ms, in_turns, matmul_flops, peak_bytes
from pixelgen.config import TrainConfig, load_config
from pixelgen.flops import peak_flops, train_step_flops
from pixelgen.trainer import Trainer

PROVIDERS = {
    "eager": ("--kernels", "eager", "--compile", "false"),
    "compile": ("--kernels", "eager", "--compile", "true"),
    "ours": ("--kernels", "auto", "--compile", "false"),
    "ours_compile": ("--kernels", "auto", "--compile", "true"),
}
BATCH = {"cpu": 8, "cuda": 64}
# Flow matching alone: the frozen networks' weights are not on every machine, and are not what differs.
FLOW_MATCHING = (
    *("--loss.alignment_weight", "0", "--loss.lpips_weight", "0", "--loss.p_dino_weight", "0"),
    *("--loss.balance", "off"),
)
# A model that two CPU cores can train, with the tokens of the real ones: 256 of the image and 32 in context.
# All blocks see all of them, so that one compilation serves every block.
SMALL = (
    *("--data.image_size", "64", "--data.channels", "3", "--data.num_classes", "1000"),
    *("--model.size", "JiT-B/16", "--model.patch_size", "4", "--model.width", "256", "--model.depth", "4"),
    *("--model.heads", "4", "--model.in_context_start", "0"),
)
MODELS = {"cpu": ("small", SMALL), "cuda": ("XL/16", ("--config", "pixelgen-xl-256"))}
# Relative differences from eager that the first step's loss and gradient norm may have: rounding in the dtype
# of the matrix products, averaged over all outputs (loss) and over all parameters (norm).
TOLERANCES = {
    "float32": {"loss": 1e-5, "grad_norm": 1e-4},
    "bfloat16": {"loss": 1e-3, "grad_norm": 1e-2},
}
DTYPES = {"float32": ("fp32", torch.float32), "bfloat16": ("bf16", torch.bfloat16)}
WARM_UP, SECONDS, FEWEST = 2, 10.0, 5


@dataclass
class RandomImages:
    """Images that are noise: what the trainer asks of a data set, without one."""

    image_size: int
    channels: int
    num_classes: int
    labels: Tensor
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def name(self, index: int) -> str:
        return f"noise {index}"

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (len(indices), self.channels, self.image_size, self.image_size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return images, self.labels[torch.as_tensor(np.asarray(indices))]


def step_config(device: torch.device, provider: str, batch: int) -> TrainConfig:
    """The configuration of a provider."""
    _, model = MODELS[device.type]
    options = (*FLOW_MATCHING, "--device", device.type, "--train.batch_size", str(batch))
    return load_config([*model, *options, *PROVIDERS[provider]])[0]


def fill_zeros(model: nn.Module) -> None:
    """Makes every all-zero parameter small and random.

    A fresh denoiser predicts zeros whatever its blocks do, so its first loss would tell nothing about them.
    """
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout draws other numbers in compiled code, so losses are compared without it."""
    config = model.config
    has_dropout = bool(config.attn_dropout or config.proj_dropout)  # compiled code depends on the mode
    model.train(not has_dropout)
    yield
    model.train()


class Runner:
    """A trainer of one provider with one batch on its device."""

    def __init__(self, device: torch.device, provider: str, batch: int) -> None:
        self.device, self.config = device, step_config(device, provider, batch)
        data = self.config.data
        labels = torch.arange(batch) % data.num_classes
        images = RandomImages(data.image_size, data.channels, data.num_classes, labels)
        # the folder is not used: only features trained on the run's own images would be kept in it
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = Trainer(self.config, Path(folder), images)
        fill_zeros(self.trainer.model)
        self.batch = tuple(tensor.to(device) for tensor in images.batch(range(batch)))
        with without_dropout(self.trainer.model):
            terms = self.step()
        self.first = {name: terms[name].item() for name in TOLERANCES[self.config.dtype]}

    def step(self) -> dict[str, Tensor]:
        """One training step."""
        return self.trainer.train_step(*self.batch)

    def peak_mb(self) -> float:
        """Weights, gradients, averages and optimizer state, and what a step needs on top of them."""
        trainer = self.trainer
        kept = [*trainer.trained.parameters(), *trainer.trained.buffers()]
        kept += [value for average in trainer.averages.values.values() for value in average.values()]
        kept += [parameter.grad for parameter in trainer.parameters if parameter.grad is not None]
        kept += [
            value
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        resident = sum(tensor.nbytes for tensor in kept)
        # What the measured step finds and releases has to be allocated in sight of the measurement: by a step
        # before it, which finds nothing.
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.objective.per_sample = {}
        return (resident + peak_bytes(self.device, lambda _: self.step(), self.step)) / 1e6


def problems(first: dict[str, float], eager: dict[str, float], dtype: str) -> list[str]:
    """What differs from eager's first step by more than the tolerance."""
    return [
        f"{name} of the first step is {first[name]:.7g}, eager's {eager[name]:.7g}"
        for name, tolerance in TOLERANCES[dtype].items()
        if not abs(first[name] - eager[name]) <= tolerance * abs(eager[name])
    ]


def measure(
    device: torch.device, names: list[str], batch: int, repeats: int | None
) -> Iterator[tuple[str, TrainConfig, Timing, float, dict[str, float]]]:
    """(provider, configuration, timing, peak MB, values of the first step) of each provider that is right."""
    eager: dict[str, float] = {}
    # Side by side where it matters and the memory is there: a busy CPU slows whatever runs at that moment.
    groups = [names] if device.type == "cpu" else [[name] for name in names]
    with tqdm(total=2 * len(names), unit="part", dynamic_ncols=True) as bar:
        for group in groups:
            runners: dict[str, Runner] = {}
            for name in group:
                bar.set_postfix_str(f"{name}: check")
                runner = Runner(device, name, batch)
                eager = eager or runner.first
                if found := problems(runner.first, eager, runner.config.dtype):
                    tqdm.write(f"{name} is wrong and not timed: {'; '.join(found)}")
                else:
                    runners[name] = runner
                bar.update()
            bar.set_postfix_str(f"{', '.join(runners)}: time")
            once = {
                name: lambda runner=runner: elapsed_ms(device, runner.step)
                for name, runner in runners.items()
            }
            timings = in_turns(once, repeats, warm_up=WARM_UP, seconds=SECONDS, fewest=FEWEST) if once else {}
            for name, timing in timings.items():
                runner = runners[name]
                yield name, runner.config, timing, runner.peak_mb(), runner.first
            bar.update(len(group))
            del runner, once  # the next provider needs the memory, also what only cycles keep
            runners.clear()
            torch.compiler.reset()
            gc.collect()


def run(arguments: argparse.Namespace) -> int:
    """Times training steps, writes CSV, table and plot, prints the table.

    Returns:
        0, or 1 when a provider was wrong.
    """
    device, columns, folder = setting.start(arguments)
    names = setting.chosen("--providers", arguments.providers, list(PROVIDERS))
    names = [name for name in PROVIDERS if name == "eager" or name in names]
    batch = arguments.batch or BATCH[device.type]
    model, _ = MODELS[device.type]
    shown, dtype = DTYPES[step_config(device, "eager", batch).dtype]
    vendor = peak_flops(columns["device"], shown)
    peak = vendor or matmul_flops(device, dtype)
    source = "the vendor's dense peak" if vendor else "a matrix product measured in this run"
    print(f"{columns['device']}: {model}, batch {batch}, {shown}")
    print(f"MFU against {peak / 1e12:.4g} TFLOP/s, {source}")

    rows: list[report.Row] = []
    for name, config, timing, peak_mb, first in measure(device, names, batch, arguments.repeats):
        flops = train_step_flops(config).total
        per_second = 1e3 / timing.median_ms
        rows.append(
            {
                "provider": name,
                "model": model,
                "batch": str(batch),
                "dtype": shown,
                "median_ms": f"{timing.median_ms:.5g}",
                "p20_ms": f"{timing.p20_ms:.5g}",
                "p80_ms": f"{timing.p80_ms:.5g}",
                "images_per_s": f"{batch * per_second:.4g}",
                "tflops": f"{flops * per_second / 1e12:.4g}",
                "peak_tflops": f"{peak / 1e12:.4g}",
                "mfu": f"{flops * per_second / peak:.4f}",
                "peak_mb": f"{peak_mb:.1f}",
                "loss": f"{first['loss']:.7g}",
                "grad_norm": f"{first['grad_norm']:.6g}",
                **columns,
            }
        )
    path = folder / "step.csv"
    report.write_csv(path, report.STEP, rows)
    recorded = report.read_csv(path, columns)
    (folder / "step.md").write_text(tables.step(recorded))
    plots.step(recorded, folder / "step.png")
    print(tables.step(rows))
    print(f"{path} and, drawn from it, step.md and step.png")
    return 0 if len(rows) == len(names) else 1
