"""Reading the weights of frozen networks: a file or a download, checked key by key, never half loaded."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pixelgen.errors import UserError


def read_state_dict(path: str | Path, *, what: str, option: str) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` file or a PyTorch file (``weights_only=True``).

    Args:
        path: the file.
        what: the network the file should hold, for the error texts.
        option: the configuration option that named the file, for the error texts.

    Raises:
        UserError: the file is missing, truncated, not a weights file, or holds something else than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{option}: {path} is not a file; it must hold the weights of {what}")
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                state = load_file(path)
            except SafetensorError as error:
                raise EOFError(str(error)) from error
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{option}: {path} cannot be read ({reason}); expected a complete .safetensors or PyTorch file "
            f"with the weights of {what}: is it truncated?"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{option}: {path} must hold a flat state dict of tensors (the weights of {what})")
    return dict(state)


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], *, source: str, what: str, option: str
) -> None:
    """Load ``state`` into ``module``; every key and every shape must match.

    Raises:
        UserError: lists the missing, unexpected and misshapen keys.
    """
    expected = module.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    problems = [
        f"{len(keys)} {name} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for name, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if problems:
        raise UserError(
            f"{option}: {source} does not hold the weights of {what}: {'; '.join(problems)}; expected "
            f"{len(expected)} tensors such as {next(iter(expected))}"
        )
    module.load_state_dict(dict(state))


def offline_error(*, what: str, url: str, option: str, names: str, reason: BaseException) -> UserError:
    """The error for weights that should be downloaded and cannot be."""
    text = (str(reason).splitlines() or [type(reason).__name__])[0].rstrip(".")
    return UserError(
        f"{option}: the weights of {what} could not be downloaded ({text}). Fetch {url} on a machine with "
        f"a network and set {option} to the file (keys {names}), or set the encoder to 'embedded'"
    )


def warn_random(what: str, option: str) -> None:
    """Say what random weights are worth."""
    warnings.warn(
        f"{option}: {what} has random weights: good for tests and timing only, as a loss it costs as "
        "much as the trained network and was measured to gain nothing",
        UserWarning,
        stacklevel=3,
    )
