"""The configuration of a training run: ``TrainConfig``, presets, command line, YAML. Imports no torch.

The defaults are the preset ``digits``; the other presets in ``config/presets`` say what differs from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pixelgen.data.options import DataConfig
from pixelgen.errors import UserError
from pixelgen.losses.options import LossConfig
from pixelgen.models.families import Architecture
from pixelgen.models.options import ModelOptions
from pixelgen.options import Section
from pixelgen.sampling.options import SampleConfig
from pixelgen.training.options import EmaConfig, LoopConfig, OptimizerConfig, ParallelConfig, TimeConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Trains a class-conditional pixel-space diffusion transformer.

    Args:
        name: the run's folder under out_dir; the preset's name and the time if not given.
        out_dir: where runs go.
        init: begin with the weights of this run, checkpoint of a run, or .ckpt of the public code; null for
            random ones.
        seed: of weights, order of images, noise and dropout.
        device: auto is CUDA where there is one, else the CPU.
        dtype: of matrix products; bfloat16 by autocast, weights and statistics stay float32.
        float8: matrix products of the blocks in float8, by torchao; needs compute capability 8.9 or newer.
        kernels: auto runs the compiled kernels; eager runs plain PyTorch.
        compile: torch.compile the blocks of the denoiser.
        threads: CPU threads; 0 leaves the choice to PyTorch.
    """

    name: str | None = None
    out_dir: str = "runs"
    init: str | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    float8: bool = False
    kernels: Literal["auto", "eager"] = "auto"
    compile: bool = False
    threads: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelOptions = field(default_factory=ModelOptions)
    time: TimeConfig = field(default_factory=TimeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        self._require_choices()
        is_folder_name = self.name is None or (self.name not in ("", ".", "..") and "/" not in self.name)
        self._require("name", is_folder_name, "be the name of a folder, without /")
        self._require("seed", 0 <= self.seed < 2**63, "lie in [0, 2^63)")
        self._require("threads", self.threads >= 0, "be 0 or more")
        if self.float8 and self.dtype != "bfloat16":
            raise UserError(f"float8 needs dtype bfloat16, got {self.dtype}")
        self.model_config()  # the sections fit together
        for options in self.loss.of_terms().values():
            options.check(self)

    def model_config(self) -> Architecture:
        """The denoiser's architecture, of the class that its family has for it."""
        return self.model.architecture(self.data)
