"""Reading the weights of frozen networks: a file or a download, checked key by key, never half loaded."""

from __future__ import annotations

import re
import urllib.request
import warnings
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from pixelgen.errors import UserError

_ANSWER_SECONDS = 5


def load_weights(
    module: nn.Module,
    weights: str | Path,
    *,
    url: str,
    what: str,
    option: str,
    names: str,
    own_key: Callable[[str], str | None],
) -> None:
    """Load the weights that an option asks for; ``"random"`` leaves the module as it is, with a warning.

    Args:
        module: the network.
        weights: ``"pretrained"``, the path of a file, or ``"random"``.
        url: where the pretrained weights are.
        what, option, names: the network, the option and the keys of the file, as error texts call them.
        own_key: the module's key for one of the file; None for what the module does not have.

    Raises:
        UserError: the weights cannot be downloaded or read, or are those of another network.
    """
    if weights == "random":
        warnings.warn(
            f"{option}: {what} has random weights: good for tests and timing only, as a loss it costs as "
            "much as the trained network and was measured to gain nothing",
            UserWarning,
            stacklevel=3,
        )
        return
    if weights == "pretrained":
        source, found = url, download_state_dict(url, what=what, option=option, names=names)
    else:
        source, found = str(weights), read_state_dict(weights, what=what, option=option)
    state = {own: value for key, value in found.items() if (own := own_key(key)) is not None}
    load_strictly(module, state, source=source, what=f"{what} ({names})", option=option)


def download_state_dict(url: str, *, what: str, option: str, names: str) -> dict[str, Tensor]:
    """Read a state dict from torch.hub's cache; a file that is not there yet is downloaded into it first.

    A file name that ends in -HASH.pth is checked against that SHA-256.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(urlsplit(url).path).name)
    if not path.exists():
        try:
            # Asked first with a time limit: torch.hub waits minutes for a host that a firewall hides.
            with urllib.request.urlopen(url, timeout=_ANSWER_SECONDS):
                pass
            path.parent.mkdir(parents=True, exist_ok=True)
            sha256 = torch.hub.HASH_REGEX.search(path.name)
            torch.hub.download_url_to_file(url, str(path), sha256[1] if sha256 else None)
        except (OSError, RuntimeError, HTTPException) as error:
            raise UserError(
                f"{option}: the weights of {what} could not be downloaded ({_first_sentence(error)}). Fetch "
                f"{url} on a machine with a network and copy it to {path}, or set {option} to the file (keys "
                f"{names}), or set the encoder to 'embedded'"
            ) from error
    try:
        return read_state_dict(path, what=what, option=option)
    except UserError as error:
        # torch.hub keeps a download that broke off where the name has no hash.
        raise UserError(f"{error} It is kept from {url}; delete it and it is downloaded anew") from error


def read_state_dict(path: str | Path, *, what: str, option: str) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` file or a PyTorch file (``weights_only=True``).

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
    except Exception as error:  # of any type: torch's unpickler runs into whatever a broken file leads to
        # Torch's own texts advise to load without weights_only, so they are passed on in part.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            reason = f"it holds {refused[1]}, and only tensors are read, as others could run code"
        elif isinstance(error, EOFError | OSError | RuntimeError):
            reason = _first_sentence(error)
        else:
            reason = "it is not as torch.save writes it"
        raise UserError(
            f"{option}: {path} cannot be read ({reason}); expected a complete .safetensors or PyTorch file "
            f"with the weights of {what}: is it truncated?"
        ) from error
    _check_flat(state, path, what=what, option=option)
    return dict(state)


def _check_flat(state: Any, path: Path, *, what: str, option: str) -> None:
    """Raises UserError unless ``state`` maps names to tensors; points to the dicts inside a checkpoint."""
    problem = type(state).__name__
    if isinstance(state, Mapping):
        others = {
            key: value
            for key, value in state.items()
            if not isinstance(key, str) or not isinstance(value, Tensor)
        }
        if not others:
            return
        inner = [repr(key) for key, value in others.items() if isinstance(value, Mapping)]
        problem = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in list(others.items())[:3])
        if inner:
            problem += (
                f"; the weights may be in {' or '.join(inner[:3])}, save them as a file of their own: "
                f"torch.save(torch.load({str(path)!r}, weights_only=True)[{inner[0]}], NEW_FILE)"
            )
    raise UserError(
        f"{option}: {path} must hold a flat state dict of tensors (the weights of {what}), got {problem}"
    )


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], *, source: str, what: str, option: str
) -> None:
    """Load ``state`` into ``module``; a UserError counts keys that are missing, unexpected or misshapen."""
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


def _first_sentence(error: BaseException) -> str:
    line = (str(error).splitlines() or [""])[0]
    return line.split(". ")[0].rstrip(".") or type(error).__name__
