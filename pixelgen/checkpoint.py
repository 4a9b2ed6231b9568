"""Checkpoints: one folder per step, complete or absent.

    RUN/checkpoints/step_00001000/
        meta.json          step, format and library versions; written last
        config.yaml        the run's configuration
        ema.safetensors    averaged weights, all that sampling needs
        *.distcp .metadata everything that changes training (torch.distributed.checkpoint)

A checkpoint is written under a temporary name, flushed to disk and renamed, so that a folder called
``step_*`` is always whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixelgen.errors import UserError

FORMAT = 1
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
META_FILE, CONFIG_FILE, EMA_FILE = "meta.json", "config.yaml", "ema.safetensors"


def save_checkpoint(
    run_dir: Path,
    step: int,
    state: dict[str, Any],
    ema_weights: Mapping[str, Tensor],
    config_yaml: str,
    keep: int,
) -> Path:
    """Writes one checkpoint and removes the oldest ones beyond ``keep``.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        state: nested state dicts; everything that changes training.
        ema_weights: averaged weights by parameter name.
        config_yaml: the run's configuration.
        keep: how many checkpoints to keep, at least 1; 0 keeps all.

    Returns:
        The folder of the new checkpoint.
    """
    root = run_dir / "checkpoints"
    final, partial = root / f"step_{step:08d}", root / f".step_{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed while saving
    partial.mkdir(parents=True)
    with _single_process():
        dcp.save(state, checkpoint_id=partial, no_dist=True)
    save_file({key: value.contiguous().cpu() for key, value in ema_weights.items()}, partial / EMA_FILE)
    (partial / CONFIG_FILE).write_text(config_yaml)
    meta = {"format": FORMAT, "step": step, "torch": str(torch.__version__)}
    (partial / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")
    for path in partial.iterdir():
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)  # without meta.json, or it would have been resumed from
    partial.rename(final)
    _flush(root)
    if keep:
        for old in list_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    return final


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = []
    for path in (run_dir / "checkpoints").glob("step_*"):
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and (path / META_FILE).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that ``path`` names: a checkpoint's folder, or a run's folder and then its newest one.

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
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        if not (path / "checkpoints").is_dir():
            if (path / CONFIG_FILE).is_file():
                raise UserError(f"{path} has no checkpoint yet; delete it or start under another --name")
            inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise UserError(f"{path} is not a run: it has no 'checkpoints' folder (found: {inside})")
        partial = [entry.name for entry in (path / "checkpoints").iterdir()]
        found = ", ".join(sorted(partial)) or "nothing"
        raise UserError(f"{path} holds no complete checkpoint (found in {path / 'checkpoints'}: {found})")
    return checkpoints[-1]


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The contents of ``meta.json``.

    Raises:
        UserError: written by another version of the format, or unreadable.
    """
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

    Args:
        checkpoint: folder from ``find_checkpoint``.
        state: nested state dicts of the same structure as saved.

    Raises:
        UserError: a damaged checkpoint, or one of another configuration.
    """
    read_meta(checkpoint)
    try:
        with _single_process():
            dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    except dcp.api.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise UserError(f"{checkpoint} cannot be restored: {str(reason).splitlines()[0]}") from error


@contextmanager
def _single_process() -> Iterator[None]:
    """torch warns that no process group exists; with one process that is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in a single process.*")
        yield


def load_ema_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Averaged weights by parameter name, fp32 on the CPU.

    Raises:
        UserError: a missing or damaged file.
    """
    from safetensors import SafetensorError

    path = checkpoint / EMA_FILE
    if not path.is_file():
        raise UserError(f"{checkpoint} has no {EMA_FILE}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
