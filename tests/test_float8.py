"""Float8 products through torchao, emulated: the same parameters, nearly the same numbers."""

from dataclasses import replace

import pytest
import torch

from pixelgen.errors import UserError
from pixelgen.models.float8 import use_float8
from pixelgen.models.jit import JiT
from pixelgen.models.pixeldit import PixelDiT
from pixelgen.models.pixeldit_sizes import PIXELDIT_SIZES
from pixelgen.models.sizes import model_config

pytest.importorskip("torchao")
CPU = torch.device("cpu")


def make_model() -> JiT:
    torch.manual_seed(0)
    model = JiT(model_config("tiny/4"))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_the_blocks_products_are_replaced_and_nearly_equal():
    x, t, y = torch.randn(2, 3, 32, 32), torch.rand(2), torch.tensor([1, 2])
    plain, converted = make_model(), make_model()
    use_float8(converted, CPU, emulate=True)
    names = {type(module).__name__ for module in converted.blocks.modules()}
    assert "Float8Linear" in names and type(converted.final_layer.linear) is torch.nn.Linear
    assert converted.state_dict().keys() == plain.state_dict().keys()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = plain(x, t, y), converted(x, t, y)
    found.float().square().mean().backward()
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert 1e-4 < float(error) < 0.1
    assert all(parameter.grad.isfinite().all() for parameter in converted.parameters())


def test_the_weights_that_an_op_reads_stay_as_they_are():
    model = PixelDiT(replace(PIXELDIT_SIZES["PixelDiT-tiny/8"], pixel_width=16))
    use_float8(model, CPU, emulate=True)
    block = model.pixel_blocks[0]
    assert type(block.mlp.fc1) is type(block.mlp.fc2) is torch.nn.Linear
    assert type(block.compress_to_attn).__name__ == type(block.adaLN_modulation[0]).__name__ == "Float8Linear"


def test_what_cannot_be_done_is_said():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"compute capability 8\.9 or newer, got cpu"):
            use_float8(make_model(), CPU)
    odd = JiT(model_config("tiny/4", width=36, heads=3, mlp_ratio=3.3))
    with pytest.raises(UserError, match="no layer of the blocks has widths"):
        use_float8(odd, CPU, emulate=True)
