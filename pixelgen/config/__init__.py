"""The configuration of a training run: its sections, presets, command line and YAML. Imports no torch."""

from pixelgen.config.load import config_from_yaml, config_to_yaml, load_config, preset_names
from pixelgen.config.train_config import TrainConfig
from pixelgen.data.options import DataConfig
from pixelgen.losses.options import LossConfig
from pixelgen.models.options import ModelOptions
from pixelgen.sampling.options import SampleConfig
from pixelgen.training.options import EmaConfig, LoopConfig, OptimizerConfig, ParallelConfig, TimeConfig

__all__ = [
    "DataConfig",
    "EmaConfig",
    "LoopConfig",
    "LossConfig",
    "ModelOptions",
    "OptimizerConfig",
    "ParallelConfig",
    "SampleConfig",
    "TimeConfig",
    "TrainConfig",
    "config_from_yaml",
    "config_to_yaml",
    "load_config",
    "preset_names",
]
