"""Every layer of the denoiser computes its own part in its own call, so that others' code can wrap it."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from pixelgen.models.jit import JiT
from pixelgen.models.layers import Block, FinalLayer
from pixelgen.models.sizes import ModelConfig

CONFIG = ModelConfig(
    width=32,
    depth=3,
    heads=2,
    patch_size=4,
    image_size=16,
    num_classes=5,
    in_context_len=2,
    in_context_start=1,
)


def model_of(config: ModelConfig = CONFIG) -> JiT:
    """Nothing in it is zero."""
    torch.manual_seed(0)
    model = JiT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    return x, torch.tensor([0.3, 0.8]), torch.tensor([1, 4])


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    output.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def layers_of(model: JiT) -> dict[str, nn.Module]:
    """All that hold a weight and compute with it themselves: norms hold theirs for the fused ops."""
    kinds = nn.Linear | nn.Conv2d | nn.Embedding | Block | FinalLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("grad", [False, True])
def test_a_hook_on_every_layer_is_called_and_changes_nothing_by_itself(grad):
    model, called = model_of(), []
    with torch.set_grad_enabled(grad):
        expected = model(*inputs())
        for name, layer in layers_of(model).items():
            layer.register_forward_hook(lambda *_, name=name: called.append(name))
        torch.testing.assert_close(model(*inputs()), expected, rtol=0, atol=1e-5)
    assert sorted(called) == sorted(layers_of(model))


def test_one_hook_on_one_adaln_layer_is_called_in_a_training_step():
    model, called = model_of(), []
    model.blocks[1].adaLN_modulation[1].register_forward_hook(lambda *_: called.append(1))
    expected = gradients(model_of(), model_of()(*inputs()))
    actual = gradients(model, model(*inputs()))
    assert called == [1] and actual.keys() >= expected.keys()


class LowRank(nn.Module):
    """Adds to a weight, as adapters do."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(weight.shape[0], 1))
        self.b = nn.Parameter(torch.ones(1, weight.flatten(1).shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.a @ self.b).view_as(weight)


@pytest.mark.parametrize("grad", [False, True])
def test_an_adapter_around_every_weight_is_used(grad):
    model = model_of()
    layers = [
        layer for layer in layers_of(model).values() if isinstance(getattr(layer, "weight", None), Tensor)
    ]
    with torch.set_grad_enabled(grad):
        expected = model(*inputs())
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
        torch.testing.assert_close(model(*inputs()), expected, rtol=0, atol=1e-5)
    found = gradients(model, model(*inputs()))
    assert {name for name in found if name.endswith(".a")} == {
        f"{name}.parametrizations.weight.0.a" for name, layer in layers_of(model).items() if layer in layers
    }
    for layer in layers:  # each of them matters
        before = model(*inputs())
        with torch.no_grad():
            layer.parametrizations.weight[0].a.add_(0.1)
        assert not torch.allclose(model(*inputs()), before)


def test_an_adapter_in_the_place_of_a_layer_is_used():
    class Doubled(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x)

    model, expected = model_of(), model_of()
    for block in model.blocks:
        block.adaLN_modulation[1] = Doubled(block.adaLN_modulation[1])
    with torch.no_grad():
        for block in expected.blocks:
            block.adaLN_modulation[1].weight.mul_(2)
            block.adaLN_modulation[1].bias.mul_(2)
    for model_input in (inputs(),):
        torch.testing.assert_close(model(*model_input), expected(*model_input))


@pytest.fixture
def one_process():
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_somebody_elses_fully_shard_on_every_block(one_process):
    mesh = init_device_mesh("cpu", (1,))
    plain, model = model_of(), model_of()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs()), plain(*inputs()), rtol=0, atol=1e-5)
    expected, actual = gradients(plain, plain(*inputs())), gradients(model, model(*inputs()))
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value.full_tensor(), expected[name], rtol=1e-4, atol=1e-4, msg=name)


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and not func.is_view:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_sampling_packs_no_weights():
    model = model_of(
        ModelConfig(width=128, depth=4, heads=2, image_size=32, num_classes=5, in_context_start=1)
    )
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode(), Largest() as largest:
        model(x, torch.tensor([0.5]), torch.tensor([3]))
    packed = sum(p.nbytes for block in model.blocks for p in block.adaLN_modulation.parameters())
    tokens = 4 + 32
    assert largest.bytes <= 4 * tokens * 2 * model.config.mlp_width  # an activation of one image
    assert packed > 10 * largest.bytes
