"""Reading checkpoints of the public code, Lightning files of PixelGen and PixelDiT, strictly."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pixelgen.errors import UserError
from pixelgen.models.denoiser import Denoiser
from pixelgen.models.families import (
    FAMILIES,
    Architecture,
    architecture_of_size,
    build_denoiser,
    family_of,
)

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


def require_kind(architecture: Architecture, state: Mapping[str, Tensor], source: str) -> None:
    """Refuses a state dict that another kind of model was saved with; one of an unknown kind passes.

    Args:
        architecture: of the model that is to be filled.
        state: by the names of the published code.
        source: what to call the place where the state is from.

    Raises:
        UserError: the state is of another family, or of a variant of it with other parameters; the message
            names what it is and what ``architecture`` is.
    """
    own = family_of(architecture)
    for family in (own, *FAMILIES.values()):
        denoiser = family.denoiser()
        options = denoiser.options_of(state)
        if options is None:
            continue
        words = [f"{'with' if on else 'without'} {name.replace('_', '-')}" for name, on in options.items()]
        held = " ".join([f"{source} holds a {denoiser.__name__} denoiser", *words])
        if family is not own:
            raise UserError(f"{held}, model.family is {own.name}")
        for name, value in options.items():
            if getattr(architecture, name) != value:
                raise UserError(f"{held}, model.{name} is {str(not value).lower()}")
        return


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
        raise UserError(
            f"{path} is not a PixelGen checkpoint, nor one of PixelDiT: "
            "it has no 'state_dict' with 'denoiser.*' keys"
        )
    return {
        name: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for name, prefix in _PREFIX.items()
    }


def load_released_checkpoint(
    path: str | Path,
    config: Architecture | str,
    weights: str = "ema",
    kernels: Literal["auto", "eager"] = "auto",
) -> Denoiser:
    """A denoiser with the weights of a published checkpoint.

    Args:
        path: a ``.ckpt`` file written by the public PixelGen or PixelDiT code.
        config: its architecture, for example ``model_config("PixelGen-XL/16")``; or the name of a size of any
            family, such as ``"PixelDiT-XL/16"``, whose variant is then recognised from the file: PixelDiT's
            post-modulation.
        weights: ``"ema"`` for the averaged weights, ``"raw"`` for the trained ones.
        kernels: as in ``JiT``.

    Raises:
        FileNotFoundError: no such file.
        UserError: an unknown size, a file of another kind, other weights than those two, a denoiser of
            another kind than ``config``, or weights that do not fit it.
    """
    if weights not in _PREFIX:
        raise UserError(f"{path}: a .ckpt has ema and raw weights only, got {weights!r}")
    architecture = architecture_of_size(config) if isinstance(config, str) else config
    published = read_released_checkpoint(path)[weights]
    if isinstance(config, str):
        recognised = family_of(architecture).denoiser().options_of(published) or {}
        architecture = replace(architecture, **recognised)
    require_kind(architecture, published, str(path))
    model = build_denoiser(architecture, kernels)
    load_strictly(model, model.convert(published), str(path))
    return model.eval()
