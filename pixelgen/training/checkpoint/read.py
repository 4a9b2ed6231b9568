"""Checkpoints: one folder per step, complete or absent.

    RUN/checkpoints/step_00001000/
        meta.json               step, format, averages, classes of the data; written last
        config.yaml             the run's configuration
        ema_0.9999.safetensors  averaged weights, all that sampling needs; a file for each average
        *.distcp .metadata      everything that changes training (torch.distributed.checkpoint)

A checkpoint is written under a temporary name, flushed to disk and renamed (``checkpoint.write``), so that a
folder called ``step_*`` is always whole.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pixelgen.errors import UserError

FORMAT = 2
_STEP_FOLDER = re.compile(r"step_\d{8,}")
META_FILE, CONFIG_FILE = "meta.json", "config.yaml"


def ema_file(name: str) -> str:
    """File name of the average called ``name``."""
    return f"ema_{name}.safetensors"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (run_dir / "checkpoints").glob("step_*")
    found = [path for path in folders if _STEP_FOLDER.fullmatch(path.name) and (path / META_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at ``path``: a checkpoint's own folder, or a run's folder and then its newest one.

    Raises:
        FileNotFoundError: nothing at ``path``.
        UserError: something else is there; the message says what was found.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no run or checkpoint at {path}")
    if not path.is_dir():
        raise UserError(
            f"{path} is a file; expected the folder of a run (runs/NAME) or of one of its checkpoints"
        )
    if (path / META_FILE).is_file():
        return path
    folder = path / "checkpoints"
    if checkpoints := list_checkpoints(path):
        return checkpoints[-1]
    if folder.is_dir():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise UserError(f"{path} holds no complete checkpoint (found in {folder}: {found})")
    if (path / CONFIG_FILE).is_file():
        raise UserError(f"{path} has no checkpoint yet; delete it or start under another --name")
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise UserError(f"{path} is not a run: it has no 'checkpoints' folder (found: {inside})")


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The contents of ``meta.json``; raises UserError if it is damaged or of another format."""
    try:
        meta = json.loads((checkpoint / META_FILE).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{checkpoint / META_FILE} is damaged: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        version = meta.get("format") if isinstance(meta, dict) else meta
        raise UserError(f"{checkpoint} has checkpoint format {version}; this version reads format {FORMAT}")
    return meta


def load_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Fills the tensors of ``state`` in place, and its other values, from a checkpoint.

    ``state`` is nested as it was saved. Every process of a run calls it with its own shards; their number may
    differ from that of the saving run.

    Raises:
        UserError: a damaged checkpoint, or one of another configuration.
    """
    try:
        with single_process():
            dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    except dcp.api.CheckpointException as error:
        raise _damaged(checkpoint, first_failure(error)) from error


def stored_entries(checkpoint: Path) -> dict[str, Any]:
    """Metadata of everything in a checkpoint by name, nested names joined by dots; UserError if damaged."""
    try:
        return dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # it is a pickle: a part of one may raise anything
        raise _damaged(checkpoint, first_failure(error)) from error


def _damaged(checkpoint: Path, reason: str) -> UserError:
    older = [path.name for path in list_checkpoints(checkpoint.parent.parent) if path.name < checkpoint.name]
    remedy = f"; remove it to go on from {older[-1]}" if older else ""
    return UserError(f"{checkpoint} cannot be restored: {reason}{remedy}")


def stored_values(checkpoint: Path, prefix: str) -> dict[str, Any]:
    """None for each value that a checkpoint has under ``prefix.``, for ``load_state`` to fill in."""
    prefix = f"{prefix}."
    return {name.removeprefix(prefix): None for name in stored_entries(checkpoint) if name.startswith(prefix)}


def load_part(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors whose names in the checkpoint begin with ``prefix``, without it, whole and on the CPU."""
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored_entries(checkpoint).items()
        if key.startswith(prefix) and isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    load_state(checkpoint, state)
    return {key.removeprefix(prefix): value for key, value in state.items()}


def first_failure(error: BaseException) -> str:
    """One line on what went wrong while a checkpoint was read or written."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def single_process() -> Iterator[None]:
    """Silences torch's warning that no process group takes part, which here is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in a single process.*")
        yield


def load_ema_weights(checkpoint: Path, name: str | None = None) -> dict[str, Tensor]:
    """Averaged weights by parameter name, fp32 on the CPU.

    Args:
        checkpoint: folder from ``find_checkpoint``.
        name: which average, such as ``"0.9999"``; None takes the run's first.

    Raises:
        UserError: no such average, a missing or damaged file.
    """
    names = read_meta(checkpoint)["averages"]
    if name is not None and name not in names:
        raise UserError(f"{checkpoint} has no average {name}; it has {', '.join(names)}")
    path = checkpoint / ema_file(name or names[0])
    if not path.is_file():
        raise UserError(f"{checkpoint} has no {path.name}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
