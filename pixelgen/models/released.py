"""Reading checkpoints of the public code, Lightning files of PixelGen and PixelDiT, strictly."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

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


def require_kind(
    architecture: Architecture, state: Mapping[str, Tensor], source: str, size: str | None = None
) -> None:
    """Refuses a state dict that another kind of model was saved with; one of an unknown kind passes.

    Args:
        architecture: of the model that is to be filled.
        state: by the names of the published code.
        source: what to call the place where the state is from.
        size: the name that ``architecture`` was asked for by, if it was.

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
        words = " and ".join(_in_words(name, value) for name, value in options.items())
        held = " ".join([f"{source} holds a {denoiser.__name__} denoiser", *filter(None, [words])])
        if family is not own:
            wanted = f"{size} is of family" if size else "model.family is"
            raise UserError(f"{held}, {wanted} {own.name}")
        for name, value in options.items():
            if (wanted_value := getattr(architecture, name)) != value:
                raise UserError(f"{held}, model.{name} is {str(wanted_value).lower()}")
        return


def _in_words(name: str, value: bool | str) -> str:
    """``with post-modulation``, or ``with pixel-modulation patch``."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"{'with' if value else 'without'} {option}"
    return f"with {option} {value}"


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
    image_size: int | None = None,
) -> Denoiser:
    """A denoiser with the weights of a published checkpoint.

    Args:
        path: a ``.ckpt`` file written by the public PixelGen or PixelDiT code.
        config: its architecture, for example ``model_config("PixelGen-XL/16")``; or the name of a size of any
            family, such as ``"PixelDiT-XL/16"``, whose variant is then recognised from the file: PixelDiT's
            post-modulation.
        weights: ``"ema"`` for the averaged weights, ``"raw"`` for the trained ones.
        kernels: as in ``JiT``.
        image_size: side of the images in pixels; by default that of ``config``.

    Raises:
        FileNotFoundError: no such file.
        UserError: an unknown size, a file of another kind, other weights than those two, a denoiser of
            another kind than ``config``, or weights that do not fit it.
    """
    if weights not in _PREFIX:
        raise UserError(f"{path}: a .ckpt has ema and raw weights only, got {weights!r}")
    architecture = architecture_of_size(config) if isinstance(config, str) else config
    if image_size is not None:
        architecture = replace(architecture, image_size=image_size)
    published = read_released_checkpoint(path)[weights]
    if not published:
        other = next(name for name in _PREFIX if name != weights)
        raise UserError(f"{path} has no {weights} weights ({_PREFIX[weights]}*), only {other}")
    size = config if isinstance(config, str) else None
    if size is not None:
        recognised: dict[str, Any] = dict(family_of(architecture).denoiser().options_of(published) or {})
        architecture = replace(architecture, **recognised)
    require_kind(architecture, published, str(path), size)
    model = build_denoiser(architecture, kernels)
    load_strictly(model, model.convert(published), str(path))
    return model.eval()
