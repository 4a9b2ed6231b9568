"""The suite of whole training steps: forward, loss, backward, clipping, AdamW and EMA of the real trainer."""

import contextlib
import gc
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import Timing, elapsed_ms, in_turns, matmul_flops, peak_bytes
from benchmarks.report import Row, row
from benchmarks.suite import Part, Run, Suite
from pixelgen.config import TrainConfig, load_config
from pixelgen.data.source import ReadBatch, Source
from pixelgen.planning.devices import peak_flops
from pixelgen.planning.flops import expected_gate_share, train_step_flops
from pixelgen.training.processes.world import World
from pixelgen.training.step import Trainer

KERNELS = {"eager": "eager", "ours": "auto", "compile": "eager", "ours_compile": "auto"}
BATCH = {"cpu": 8, "cuda": 64}
# A model that two CPU cores can train, with the tokens of the real ones: 256 of the image and 32 in context.
# All blocks see all of them, so that one compilation serves every block.
SMALL = (
    *("--data.image_size", "64", "--data.channels", "3", "--data.num_classes", "1000"),
    *("--model.size", "JiT-B/16", "--model.patch_size", "4", "--model.width", "256", "--model.depth", "4"),
    *("--model.heads", "4", "--model.in_context_start", "0", "--loss.balance", "off"),
    *("--loss.stages", "vgg16", "--loss.tokens", "dinov2_vits14"),
)
MODELS = {"cpu": ("small", SMALL), "cuda": ("XL/16", ("--config", "pixelgen-xl-256"))}
# The same tokens, and 16 pixels in each.
PIXELDIT = {
    "cpu": (
        "small PixelDiT",
        (
            *("--data.image_size", "64", "--data.channels", "3", "--data.num_classes", "1000"),
            *("--model.family", "pixeldit", "--model.size", "PixelDiT-B/16", "--model.patch_size", "4"),
            *("--model.width", "256", "--model.depth", "3", "--model.heads", "4", "--model.pixel_depth", "1"),
        ),
    ),
    "cuda": ("PixelDiT-XL/16", ("--config", "pixeldit-xl-256")),
}
NO_NETWORKS = ("--loss.alignment_weight", "0", "--loss.lpips_weight", "0", "--loss.p_dino_weight", "0")
FLOW_MATCHING = (*NO_NETWORKS, "--loss.balance", "off")
CASES = {
    # Random weights cost what trained ones do, and the trained ones are not on every machine.
    "all_terms": ("--loss.stages_weights", "random", "--loss.tokens_weights", "random"),
    "flow_matching": FLOW_MATCHING,
    "pixeldit": FLOW_MATCHING,
}
# Relative differences from eager that the first step's loss and gradient norm may have: rounding in the dtype
# of the matrix products, averaged over all outputs (loss) and over all parameters (norm); in bf16 that of the
# frozen networks as well.
TOLERANCES = {
    ("flow_matching", "float32"): {"loss": 1e-5, "grad_norm": 1e-4},
    ("all_terms", "float32"): {"loss": 1e-5, "grad_norm": 1e-3},
    ("flow_matching", "bfloat16"): {"loss": 1e-3, "grad_norm": 1e-2},
    ("all_terms", "bfloat16"): {"loss": 1e-2, "grad_norm": 5e-2},
    ("pixeldit", "float32"): {"loss": 1e-5, "grad_norm": 1e-4},
    ("pixeldit", "bfloat16"): {"loss": 1e-3, "grad_norm": 1e-2},
}
DTYPES = {"float32": ("fp32", torch.float32), "bfloat16": ("bf16", torch.bfloat16)}
WARM_UP, SECONDS, FEWEST = 2, 10.0, 5


class RandomImages(Source):
    """Images that are noise: what the trainer asks of a source, without one."""

    def read(self, order: np.ndarray, draws: np.ndarray | None) -> ReadBatch:
        generator = torch.Generator().manual_seed(1)
        shape = (len(order), self.channels, self.image_size, self.image_size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return ReadBatch(images.numpy(), order % self.num_classes)


def model_of(device: torch.device, case: str) -> tuple[str, tuple[str, ...]]:
    """Name and options of what a case trains."""
    return (PIXELDIT if case == "pixeldit" else MODELS)[device.type]


def step_config(device: torch.device, case: str, provider: str, batch: int) -> TrainConfig:
    """The configuration of a provider.

    Where blocks are compiled, so are the frozen networks; but on a CPU, where that takes minutes.
    """
    compiled = "compile" in provider
    options = ("--kernels", KERNELS[provider], "--compile", str(compiled).lower())
    options += ("--loss.compile_networks", str(compiled and device.type == "cuda").lower())
    options += ("--device", device.type, "--train.batch_size", str(batch))
    return load_config([*model_of(device, case)[1], *CASES[case], *options])[0]


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
    has_dropout = config != config.without_dropout()  # compiled code depends on the mode
    model.train(not has_dropout)
    yield
    model.train()


def usual_step(trainer: Trainer) -> int:
    """The first step in which the noise gate lets the share of samples pass that it does on average.

    Frozen networks are compiled for each number of samples that they see. A step that is repeated has one,
    and the usual one is what the count of FLOPs assumes.
    """
    config = trainer.config
    wanted = round(expected_gate_share(config) * config.train.batch_size)
    passing = ((trainer.draw_time(step) >= config.loss.gate_t).sum() for step in range(10_000))
    return next(step for step, count in enumerate(passing) if count == wanted)


class Runner:
    """A trainer of one provider with one batch on its device, which repeats one step."""

    def __init__(self, device: torch.device, case: str, provider: str, batch: int) -> None:
        self.device, self.config = device, step_config(device, case, provider, batch)
        data = self.config.data
        names = [str(label) for label in range(data.num_classes)]
        images = RandomImages(data.image_size, data.channels, names)
        # the folder is not used: only features trained on the run's own images would be kept in it
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # random weights
            self.trainer = Trainer(self.config, Path(folder), images, World(device))
        self._step = usual_step(self.trainer)
        fill_zeros(self.trainer.model)
        pixels, labels = images.batch(range(batch))
        self.batch = pixels.to(device), {"label": labels.to(device)}
        with without_dropout(self.trainer.model):
            terms = self.step()
        self.first = {name: terms[name].item() for name in ("loss", "grad_norm")}

    def step(self) -> dict[str, Tensor]:
        """One training step."""
        self.trainer.step = self._step
        return self.trainer.train_step(*self.batch)

    def peak_mb(self) -> float:
        """Weights, gradients, averages and optimizer state, and what a step needs on top of them."""
        trainer = self.trainer
        optimizers = trainer.optimizers
        kept = [*optimizers.trained.parameters(), *optimizers.trained.buffers()]
        kept += [value for average in trainer.averages.values.values() for value in average.values()]
        kept += [parameter.grad for parameter in optimizers.parameters if parameter.grad is not None]
        kept += [
            value
            for optimizer in optimizers.main
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        resident = sum(tensor.nbytes for tensor in kept)
        # What the measured step finds and releases has to be allocated in sight of the measurement: by a step
        # before it, which finds nothing.
        optimizers.zero_grad()
        return (resident + peak_bytes(self.device, lambda _: self.step(), self.step)) / 1e6


def problems(first: dict[str, float], eager: dict[str, float], tolerances: dict[str, float]) -> list[str]:
    """What differs from eager's first step by more than the tolerance."""
    return [
        f"{name} of the first step is {first[name]:.7g}, eager's {eager[name]:.7g}"
        for name, tolerance in tolerances.items()
        if not abs(first[name] - eager[name]) <= tolerance * abs(eager[name])
    ]


def free_memory() -> None:
    """Compiled code, and what only cycles keep: the next provider needs the memory."""
    torch.compiler.reset()
    gc.collect()


class Steps:
    """Times the steps of one case."""

    def __init__(self, run: Run, case: str, matmul: Callable[[], float]) -> None:
        self.run, self.case, self.device, self.matmul = run, case, run.device, matmul
        self.batch = run.arguments.batch or BATCH[run.device.type]
        self.expected: dict[str, float] | None = None  # of eager's first step

    def runner(self, name: str) -> Runner:
        """A new trainer of a provider, after its first step."""
        self.run.show(f"{self.case} {name}: check")
        return Runner(self.device, self.case, name, self.batch)

    def rows(self, names: list[str]) -> Iterator[Row]:
        """A row of each provider that is right; they are timed in turns."""
        runners: dict[str, Runner] = {}
        if self.expected is None and names[0] != "eager":
            self.expected = self.runner("eager").first
            free_memory()
        for name in names:
            runner = self.runner(name)
            self.expected = self.expected or runner.first
            tolerances = TOLERANCES[self.case, runner.config.dtype]
            if found := problems(runner.first, self.expected, tolerances):
                self.run.wrong(self.case, name, "; ".join(found))
            else:
                runners[name] = runner
        self.run.show(f"{self.case} {', '.join(runners)}: time")
        once = {name: partial(elapsed_ms, self.device, runner.step) for name, runner in runners.items()}
        repeats = self.run.arguments.repeats
        timings = in_turns(once, repeats, warm_up=WARM_UP, seconds=SECONDS, fewest=FEWEST) if once else {}
        for name, timing in timings.items():
            yield self.row(name, runners[name], timing)
        del once, runner
        runners.clear()
        free_memory()

    def row(self, name: str, runner: Runner, timing: Timing) -> Row:
        """The row of a provider."""
        dtype, _ = DTYPES[runner.config.dtype]
        rate = train_step_flops(runner.config).total * 1e3 / timing.median_ms
        vendor, matmul = peak_flops(self.run.setting["device"], dtype), self.matmul()
        return row(
            self.case,
            name,
            timing,
            shape=f"{model_of(self.device, self.case)[0]} B={self.batch}",
            dtype=dtype,
            mode="step",
            images_per_s=1e3 * self.batch / timing.median_ms,
            tflops=rate / 1e12,
            mfu_vendor=rate / vendor if vendor else None,
            mfu_matmul=rate / matmul,
            vendor_tflops=vendor / 1e12 if vendor else None,
            matmul_tflops=matmul / 1e12,
            peak_mb=runner.peak_mb(),
            **runner.first,
        )


def parts(run: Run) -> list[Part]:
    names = run.chosen("providers", list(KERNELS))
    # Side by side where it matters and the memory is there: a busy CPU slows whatever runs at that moment.
    groups = [names] if run.device.type == "cpu" else [[name] for name in names]
    dtype = DTYPES[step_config(run.device, "all_terms", "eager", 1).dtype][1]
    matmul = cache(lambda: matmul_flops(run.device, dtype))
    cases = {case: Steps(run, case, matmul) for case in CASES}
    return [
        Part(case=case, label=f"{case} {', '.join(group)}", rows=partial(steps.rows, group))
        for case, steps in cases.items()
        for group in groups
    ]


SUITE = Suite(
    name="step",
    parts=parts,
    baselines=("eager",),
    plots={"": ("median_ms", "mfu_matmul", "peak_mb")},
)
