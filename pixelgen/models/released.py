"""Reading the checkpoints of the public PixelGen code (Lightning files) into our models, strictly."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pixelgen.errors import UserError
from pixelgen.models.denoiser import Denoiser
from pixelgen.models.families import build_denoiser
from pixelgen.models.sizes import ModelConfig

_PREFIX = {"raw": "denoiser.", "ema": "ema_denoiser."}


def load_strictly(model: Denoiser, state: dict[str, Tensor], source: str) -> None:
    """Copies ``state`` into ``model`` and accepts no difference in names or shapes.

    The one exception are fixed tables, such as positions: a checkpoint trained at another resolution may
    carry another shape, and the model's own table is kept.

    Raises:
        UserError: begins with ``source`` and lists every missing, unexpected and misshapen key.
    """
    own = model.state_dict()
    state = dict(state)
    for name, table in model.tables().items():
        if name in state and state[name].shape != table.shape:
            state[name] = table
    problems = [f"missing {key}" for key in own.keys() - state.keys()]
    problems += [f"unexpected {key}" for key in state.keys() - own.keys()]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    if problems:
        raise UserError(f"{source} does not fit {model.config}: {'; '.join(sorted(problems))}")
    model.load_state_dict(state)


def read_released_checkpoint(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """The ``raw`` and ``ema`` weights of a Lightning checkpoint, read without running any pickled code.

    Raises:
        FileNotFoundError: no such file.
        UserError: a file of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a readable torch checkpoint: {str(error).splitlines()[0]}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not any(key.startswith("denoiser.") for key in state):
        raise UserError(f"{path} is not a PixelGen checkpoint: it has no 'state_dict' with 'denoiser.*' keys")
    return {
        name: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for name, prefix in _PREFIX.items()
    }


def load_released_checkpoint(
    path: str | Path,
    config: ModelConfig,
    weights: str = "ema",
    kernels: Literal["auto", "eager"] = "auto",
) -> Denoiser:
    """A denoiser with the weights of a published checkpoint.

    Args:
        path: a ``.ckpt`` file written by the public PixelGen code.
        config: its architecture, for example ``model_config("PixelGen-XL/16")``.
        weights: ``"ema"`` for the averaged weights, ``"raw"`` for the trained ones.
        kernels: as in ``JiT``.

    Raises:
        UserError: other weights than those two, or ones that do not fit ``config``.
    """
    if weights not in _PREFIX:
        raise UserError(f"{path}: a .ckpt has ema and raw weights only, got {weights!r}")
    published = read_released_checkpoint(path)[weights]
    model = build_denoiser(config, kernels)
    load_strictly(model, model.convert(published), str(path))
    return model.eval()
