"""Settings of the frozen networks: half precision, and compilation that keeps to few shapes."""

from __future__ import annotations

import pytest
import torch
from objectives import SIDE, B, C, MeanTokens, P, TwoStages, make_batch
from pixelgen_kernels import select
from torch import Tensor, nn

from pixelgen.losses.features import FeatureNetworks, ImageFeatures, SelectedFeatures
from pixelgen.losses.gate import BUCKETS, NoiseGate, select_samples
from pixelgen.losses.lpips import LPIPS
from pixelgen.losses.times import Times


class LinearTokens(MeanTokens):
    """Mean colour of each patch, through a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(C, self.width)
        self.freeze()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(nn.functional.avg_pool2d(x, P).flatten(2).transpose(1, 2))


def networks() -> FeatureNetworks:
    lpips = LPIPS(TwoStages(), ops=select("auto"))
    return FeatureNetworks(LinearTokens(), lpips)


def features_of(networks: FeatureNetworks, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
    rows = select_samples(Times.of(t), NoiseGate())
    found = ImageFeatures(networks, lambda selected: selected.rows(x), has_gradient=torch.is_grad_enabled())
    selected = SelectedFeatures(found, rows)
    return selected.tokens, selected.maps


def test_half_precision_holds_the_weights_in_bf16_and_channels_last():
    plain = networks()
    half = networks()
    half.encoder.load_state_dict(plain.encoder.state_dict())
    half.lpips.load_state_dict(plain.lpips.state_dict())
    half.speed_up(half=True, compiled=False)
    first = half.lpips.stages.first.weight
    assert first.dtype == half.encoder.linear.weight.dtype == torch.bfloat16
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert half.encoder.matrix.dtype == torch.float32  # neither a convolution nor a linear layer
    x = make_batch()["x"]
    expected_tokens, expected_maps = features_of(plain, x, torch.ones(B))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, maps = features_of(half, x, torch.ones(B))
    torch.testing.assert_close(tokens.float(), expected_tokens, rtol=2e-2, atol=2e-2)
    for actual, wanted in zip(maps, expected_maps, strict=True):
        torch.testing.assert_close(actual.float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_compiled_networks_see_one_graph_for_each_size_of_a_selection():
    """Static shapes, and none of the sizes falls back to running uncompiled."""
    torch.compiler.reset()
    compiled = networks()
    graphs: list[torch.Size] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        assert all(isinstance(size, int) for value in inputs for size in value.shape)
        graphs.append(inputs[-1].shape)
        return graph.forward

    for network in (compiled.encoder, compiled.lpips.stages):
        compile_ = network.compile
        network.compile = lambda compile_=compile_, **options: compile_(backend=backend, **options)
    compiled.speed_up(half=False, compiled=True)
    plain = networks()
    plain.encoder.load_state_dict(compiled.encoder.state_dict())
    plain.lpips.load_state_dict(compiled.lpips.state_dict())
    batch = 2 * BUCKETS
    x = torch.randn(batch, C, SIDE, SIDE)
    for _ in range(2):
        for count in range(1, batch + 1):
            t = torch.zeros(batch)
            t[:count] = 1
            for is_grad in (False, True):
                with torch.set_grad_enabled(is_grad):
                    x_ = x.clone().requires_grad_(is_grad)
                    tokens, _ = features_of(compiled, x_, t)
                    expected, _ = features_of(plain, x_, t)
            torch.testing.assert_close(tokens, expected)
    assert len(graphs) == 2 * 2 * BUCKETS  # two networks, with and without gradient
