"""Matrix products of the blocks in float8, by torchao."""

from __future__ import annotations

import torch
from torch import nn

from pixelgen.errors import UserError
from pixelgen.models.denoiser import Denoiser


def use_float8(model: Denoiser, device: torch.device, *, emulate: bool = False) -> None:
    """Replaces the linear layers of every block by torchao's, under the same parameter names.

    Inputs, weights and gradients are scaled tensor by tensor, just in time; parameters stay as they are. Only
    layers whose widths are multiples of 16 are replaced: the hardware takes no others.

    Args:
        model: the denoiser, before compilation and sharding.
        device: where it will run.
        emulate: compute the same numbers without the hardware, slowly.

    Raises:
        UserError: torchao is missing, the device has no float8 products, or no layer fits.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError('float8 needs torchao: pip install "pixelgen[float8]"') from error
    if not emulate and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise UserError(
            f"float8 needs a GPU of compute capability 8.9 or newer, got {device}; leave it out, or false"
        )
    count = 0
    # products of a row per image, which are small, and those inside an op
    others = [*model.adaln_modules(), *model.modules_in_ops()]
    left_out = {id(part) for module in others for part in module.modules()}

    def fits(module: nn.Module, name: str) -> bool:
        nonlocal count
        if not isinstance(module, nn.Linear) or id(module) in left_out:
            return False
        is_taken = module.in_features % 16 == 0 and module.out_features % 16 == 0
        count += is_taken
        return is_taken

    for block in model.fsdp_units():
        convert_to_float8_training(block, config=Float8LinearConfig(emulate=emulate), module_filter_fn=fits)
    if not count:
        raise UserError("float8: no layer of the blocks has widths that are multiples of 16")
