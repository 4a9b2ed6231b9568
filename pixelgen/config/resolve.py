"""What a configuration means on a machine: its device, the share of each process, how weights are sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pixelgen.config.train_config import TrainConfig
from pixelgen.errors import UserError
from pixelgen.training.options import ParallelConfig

if TYPE_CHECKING:
    import torch


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Refuses a batch that processes and micro-batches cannot share evenly.

    Raises:
        UserError: names the nearest sizes that they can.
    """
    batch, unit = config.train.batch_size, world_size * config.train.micro_batches
    if batch % unit:
        below, above = batch // unit * unit, -(-batch // unit) * unit
        near = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"train.batch_size must be a multiple of {unit} ({world_size} processes x "
            f"{config.train.micro_batches} micro-batches), such as {near}; got {batch}"
        )


SMALL_MODEL = 200_000_000  # parameters below which parallel.mode auto keeps a copy in every process

Mode = Literal["none", "ddp", "fsdp", "hsdp"]


def resolve_mode(parallel: ParallelConfig, *, size: int, local_size: int, num_parameters: int) -> Mode:
    """What ``parallel.mode`` means for a number of processes and a model."""
    if size == 1:
        return "none"
    if parallel.mode != "auto":
        return parallel.mode
    if num_parameters < SMALL_MODEL:
        return "ddp"
    return "fsdp" if local_size == size else "hsdp"


def num_shards(mode: Mode, parallel: ParallelConfig, *, size: int, local_size: int) -> int:
    """Parts into which a mode cuts the weights."""
    return {"none": 1, "ddp": 1, "fsdp": size, "hsdp": parallel.shard_size or local_size}[mode]


def pick_device(name: str) -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU.

    Raises:
        UserError: another name, or CUDA asked for where there is none.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' was asked for but PyTorch sees no CUDA device; use --device cpu")
    return torch.device(name)
