"""Pixel-space diffusion transformers: training and sampling without a VAE.

Importing this package loads neither torch nor anything else that is heavy; the names below load what they
need when they are first used::

    from pixelgen import Pipeline

    images = Pipeline.from_run("runs/NAME").sample([0, 1, 2])  # (3, C, H, W) uint8
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixelgen.config.load import load_config as load_config
    from pixelgen.config.train_config import TrainConfig as TrainConfig
    from pixelgen.errors import UserError as UserError
    from pixelgen.models.jit import JiT as JiT
    from pixelgen.models.sizes import SIZES as SIZES
    from pixelgen.models.sizes import ModelConfig as ModelConfig
    from pixelgen.models.sizes import model_config as model_config
    from pixelgen.sampling.pipeline import Pipeline as Pipeline

    __version__: str

_HOME = {
    "JiT": "pixelgen.models.jit",
    "ModelConfig": "pixelgen.models.sizes",
    "Pipeline": "pixelgen.sampling.pipeline",
    "SIZES": "pixelgen.models.sizes",
    "TrainConfig": "pixelgen.config",
    "UserError": "pixelgen.errors",
    "load_config": "pixelgen.config",
    "model_config": "pixelgen.models.sizes",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("pixelgen")  # as pyproject.toml states it
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
