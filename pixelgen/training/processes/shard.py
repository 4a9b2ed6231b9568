"""How weights are sharded over the processes of a run.

One process works without any of this. Several work through FSDP2 (``fully_shard``) on a mesh of (copies,
shards): FSDP is (1, N), HSDP (N / S, S), and DDP (N, 1), where every process has all weights. The loss of a
process is its share of the global batch's, so gradients are summed, never averaged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from pixelgen.config.resolve import Mode, num_shards
from pixelgen.errors import UserError
from pixelgen.models.denoiser import Denoiser
from pixelgen.training.options import ParallelConfig
from pixelgen.training.processes.world import World


def shard(
    model: Denoiser, others: list[nn.Module], mode: Mode, parallel: ParallelConfig, world: World, half: bool
) -> None:
    """Shards a model's weights in place, block by block, and those of other modules, each as a whole.

    Args:
        model: the denoiser, with equal weights in all processes.
        others: modules with a plain forward pass, such as the projector.
        mode: not ``"none"``.
        half: gather weights in bf16; gradients are summed in fp32 either way.

    Raises:
        UserError: a shard size that does not divide the number of processes.
    """
    shards = num_shards(mode, parallel, size=world.size, local_size=world.local_size)
    if world.size % shards:
        raise UserError(
            f"parallel.shard_size must divide the {world.size} processes, got {shards}; the others would "
            f"have no complete copy of the weights"
        )
    sizes = (world.size // shards, shards)
    mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=("copies", "shards"))
    # The shard axis alone where there is one copy: FSDP then has no all-reduce to do.
    options: dict[str, Any] = {
        "mesh": mesh["shards"] if shards == world.size else mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # autocast does that, and t must stay fp32
        ),
    }
    # Nothing here writes to outputs in place, which is what FSDP warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    blocks: list[Any] = model.fsdp_units()
    for block in blocks:
        fully_shard(block, **options, reshard_after_forward=parallel.reshard_after_forward)
    fully_shard(model, **options)  # keeps what is left gathered: it is needed again at once
    register_fsdp_forward_method(model, "forward_tokens")
    units: list[nn.Module] = [*blocks, *others, model]
    for module in others:
        fully_shard(module, **options)
    for index, block in enumerate(blocks):
        ahead = range(1, parallel.prefetch + 1)
        block.set_modules_to_forward_prefetch([blocks[index + i] for i in ahead if index + i < len(blocks)])
        block.set_modules_to_backward_prefetch([blocks[index - i] for i in ahead if index - i >= 0])
    for unit in units:
        assert isinstance(unit, FSDPModule)
        # Sums, for the shares of a batch; by plain sums, which every backend knows.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def sum_over_copies(modules: Iterable[nn.Module], is_last: bool) -> None:
    """Sums gradients over the copies of the weights in the last of several backward passes only."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(is_last)


def give_up_gathered(model: nn.Module) -> None:
    """Frees weights that are still gathered after a forward pass; ``parameters()`` are the shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes, on each of them; a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
