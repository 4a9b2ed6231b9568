"""PixelDiT: sizes, tables, dtypes, image sizes, options. The golden vectors are in test_parity.py."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from pixelgen_kernels import select
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pixelgen.errors import UserError
from pixelgen.models.pixeldit import (
    PixelBlock,
    PixelDiT,
    extent_rope_table,
    pixel_position_table,
)
from pixelgen.models.pixeldit_sizes import PIXELDIT_SIZES, PixelDiTConfig
from pixelgen.planning.counting import denoiser_flops

TINY = PIXELDIT_SIZES["PixelDiT-tiny/8"]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "post-modulation": {"post_modulation": True},
    "patch modulation": {"pixel_modulation": "patch"},
    "patch post-modulation": {"pixel_modulation": "patch", "post_modulation": True},
    "no positions": {"pixel_positions": False, "pixel_width": 6},
    "no pixel path": {"pixel_depth": 0},
}


def randomized(config: PixelDiTConfig = TINY, kernels: Any = "auto") -> PixelDiT:
    """A fresh model predicts zeros, so tests need other weights."""
    torch.manual_seed(0)
    model = PixelDiT(config, kernels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(config: PixelDiTConfig = TINY, batch: int = 2, size: tuple[int, int] | None = None):
    generator = torch.Generator().manual_seed(1)
    size = size or config.image_height_width
    x = torch.randn(batch, config.channels, *size, generator=generator)
    return x, torch.linspace(0.0, 1.0, batch), torch.arange(batch) % (config.num_classes + 1)


def gradients(model: PixelDiT, output: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    output.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value is not None and torch.equal(actual[name], value), name


# --- sizes and costs ---


@pytest.mark.parametrize(
    ("size", "parameters"), [("B", 184_749_155), ("L", 569_648_963), ("XL", 797_383_203)]
)
def test_parameter_counts(size: str, parameters: int):
    """XL to the last one as published; B and L are given as 184 M and 569 M."""
    with torch.device("meta"):
        model = PixelDiT(PIXELDIT_SIZES[f"PixelDiT-{size}/16"])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_flops_of_xl_are_the_published_ones():
    config = PIXELDIT_SIZES["PixelDiT-XL/16"]
    assert denoiser_flops(config) / 1e9 == pytest.approx(311.2, abs=0.3)
    with torch.device("meta"):
        block = PixelBlock(config, select("eager"))
        h, rope = torch.empty(1, 256, 256 * 16), torch.empty(256, 36)
        with FlopCounterMode(display=False) as counter:
            block.expand_from_attn(block.attn(block.compress_to_attn(h), (rope, rope)))
    without_attention = denoiser_flops(config) - config.pixel_depth * counter.get_total_flops()
    assert without_attention / 1e9 == pytest.approx(279.8, abs=0.3)


def test_the_fused_path_has_the_flops_of_the_eager_one():
    """What is inside of `pixel_mlp` counts too, for users of PyTorch's counter."""
    counts = []
    for kernels in ("auto", "eager"):
        model = randomized(kernels=kernels)
        with FlopCounterMode(display=False) as counter:
            gradients(model, model(*inputs()))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# --- tables ---


def test_rope_positions_fill_one_extent_whatever_the_grid():
    cos, sin = extent_rope_table(8, 3, 5)
    assert cos.shape == sin.shape == (15, 4)
    token = 1 * 5 + 3  # row 1 of 3 at 8, column 3 of 5 at 12
    angles = [12.0, 8.0, 12.0 / 100, 8.0 / 100]  # frequencies 1 and 10000^(-4/8)
    assert torch.allclose(cos[token], torch.tensor(angles).cos(), atol=1e-6)
    assert torch.allclose(sin[token], torch.tensor(angles).sin(), atol=1e-6)


def test_an_axis_of_one_patch_sits_at_the_origin():
    cos, sin = extent_rope_table(8, 1, 3)
    assert torch.equal(cos[:, 1::2], torch.ones(3, 2)) and not sin[:, 1::2].any()
    assert math.isclose(sin[-1, 0].item(), math.sin(16), rel_tol=1e-6)


def test_pixel_positions_are_columns_first_and_grouped_by_patch():
    table = pixel_position_table(8, 2, 3, 4)
    assert table.shape == (6, 16, 8) and table.dtype == torch.float32
    patch, pixel = 1 * 3 + 2, 2 * 4 + 1  # pixel (row 4 + 2, column 8 + 1)
    row, column, low = 6.0, 9.0, 1e-2
    expected = [
        *(math.sin(column), math.sin(column * low), math.cos(column), math.cos(column * low)),
        *(math.sin(row), math.sin(row * low), math.cos(row), math.cos(row * low)),
    ]
    assert torch.allclose(table[patch, pixel], torch.tensor(expected), atol=1e-6)


def test_tables_are_not_rounded_by_a_half_precision_call():
    model, arguments = randomized(), inputs()
    expected = model(*arguments)
    model.pixel_positions._made.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(*arguments)
    model.to(torch.bfloat16)(arguments[0].bfloat16(), *arguments[1:])
    again = randomized()
    again.pixel_positions = model.pixel_positions
    assert torch.equal(again(*arguments), expected)


def test_tables_made_in_inference_mode_serve_training():
    model = randomized()
    with torch.inference_mode():
        model(*inputs())
    gradients(model, model(*inputs()))


# --- forward ---


def test_a_fresh_model_predicts_zeros():
    assert not PixelDiT(TINY)(*inputs()).any()


def test_a_model_built_on_meta_equals_one_built_directly():
    with torch.device("meta"):
        model = PixelDiT(TINY)
    assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())
    model.to_empty(device="cpu")
    direct = PixelDiT(TINY)
    for either in (model, direct):
        torch.manual_seed(0)
        either.reset_parameters()
    for (name, a), (_, b) in zip(model.state_dict().items(), direct.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert model(*inputs()).shape == (2, 3, 32, 32)


def test_initial_weights():
    torch.manual_seed(0)
    model = PixelDiT(replace(TINY, width=256))
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.t_embedder.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.t_embedder.mlp[2].bias.abs().max() > 0.01  # PyTorch's default
    limit = math.sqrt(6 / (256 + 192))
    assert model.s_embedder["proj"].weight.abs().max().item() == pytest.approx(limit, rel=0.01)
    for block in model.fsdp_units():
        assert not block.adaLN_modulation[0].weight.any() and not block.adaLN_modulation[0].bias.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_and_eager_ops_agree(variant: str):
    config = replace(TINY, **VARIANTS[variant])
    outputs, grads = [], []
    for kernels in ("auto", "eager"):
        model = randomized(config, kernels)
        outputs.append(model(*inputs(config)))
        grads.append(gradients(model, outputs[-1]))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5 * outputs[1].abs().max().item())
    for name, expected in grads[1].items():
        assert expected is not None and grads[0][name] is not None, name
        scale = expected.abs().max().item()
        assert torch.allclose(grads[0][name], expected, rtol=0, atol=1e-4 * scale + 1e-7), name
        assert scale > 0 or variant == "no pixel path", name


@pytest.mark.parametrize("size", [(8, 8), (8, 40), (24, 16), (64, 64)])
def test_any_image_that_the_patch_divides(size: tuple[int, int]):
    model = randomized()
    output, features = model(*inputs(size=size), tap=2)
    assert output.shape == (2, 3, *size)
    assert features.shape == (2, size[0] * size[1] // 64, TINY.width)


def test_features_are_the_residual_stream_after_so_many_blocks():
    model = randomized()
    seen: list[Tensor] = []
    for block in model.patch_blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, first = model(*inputs(), tap=1)
    assert torch.equal(first, seen[1])
    _, last = model(*inputs(), tap=2)
    stream = model._patch_path(
        select("eager").patchify(inputs()[0], 8, channel_order="last"),
        (4, 4),
        model.t_embedder(inputs()[1]),
        {"label": inputs()[2]},
        None,
    )[0]
    assert torch.equal(last, stream)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_batch(variant: str):
    model = randomized(replace(TINY, **VARIANTS[variant]))
    x, t, y = (values[:0] for values in inputs())
    assert model(x, t, y).shape == x.shape


def test_a_given_conditioning_replaces_the_patch_path():
    model = randomized()
    x, t, y = inputs()
    seen: list[Tensor] = []
    hook = model.pixel_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    output = model(x, t, y)
    hook.remove()
    model.patch_blocks = torch.nn.ModuleList()  # not needed
    assert torch.equal(model(x, t, y, s=seen[0]), output)
    with pytest.raises(ValueError, match=r"s must have shape \(B, T, D\) = \(2, 16, 64\)"):
        model(x, t, y, s=seen[0][:, :3])


def test_autocast_keeps_the_pixel_stream_in_float32():
    model = randomized()
    x, t, y = inputs()
    kinds: dict[str, set[torch.dtype]] = {"patch": set(), "pixel": set()}
    for kind, blocks in (("patch", model.patch_blocks), ("pixel", model.pixel_blocks)):
        for block in blocks:
            block.register_forward_hook(lambda _, args, result, kind=kind: kinds[kind].add(args[0].dtype))
    expected = model(x, t, y)
    scale = expected.abs().max().item()
    for dtypes in kinds.values():
        dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, t, y)
    assert kinds == {"patch": {torch.bfloat16}, "pixel": {torch.float32}} and half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), expected, atol=0.05 * scale)
    pure = model.to(torch.bfloat16)(x.bfloat16(), t, y)
    assert pure.dtype == torch.bfloat16
    assert torch.allclose(pure.float(), expected, atol=0.05 * scale)


def test_it_compiles_without_graph_breaks():
    model = randomized()
    expected = model(*inputs())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs()), expected)
    torch.testing.assert_close(
        gradients(model, compiled(*inputs())), gradients(model, model(*inputs())), rtol=1e-4, atol=1e-5
    )


def test_patch_blocks_are_compiled_one_by_one(monkeypatch: pytest.MonkeyPatch):
    model, compiled = randomized(), []
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward) or forward)
    model.compile_blocks()
    assert [forward.__self__ for forward in compiled] == list(model.patch_blocks)


def test_a_model_can_be_copied_and_pickled():
    model = randomized()
    expected = model(*inputs())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*inputs()), expected)


# --- what backward keeps ---


@pytest.mark.parametrize("variant", ["default", "post-modulation", "patch modulation"])
def test_recomputed_modulations_give_the_same_gradients_and_are_not_kept(variant: str):
    config = replace(TINY, **VARIANTS[variant])
    grads = []
    for is_recomputed in (False, True):
        model = randomized(replace(config, recompute_modulation=is_recomputed))
        made: list[Tensor] = []
        saved: set[int] = set()
        for block in model.pixel_blocks:
            block.adaLN_modulation[0].register_forward_hook(
                lambda _, args, result, made=made: made.append(result)
            )

        def note(tensor: Tensor, saved: set[int] = saved) -> Tensor:
            saved.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(*inputs(config))
        assert len(made) == 1 and (made[0].untyped_storage().data_ptr() in saved) != is_recomputed
        grads.append(gradients(model, output))
    assert_same(grads[1], grads[0])


def test_recomputed_modulations_have_the_dtype_of_autocast():
    grads = []
    for is_recomputed in (False, True):
        model = randomized(replace(TINY, recompute_modulation=is_recomputed))
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*inputs())
        grads.append(gradients(model, output.float()))
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(mode: Any, is_recomputed: bool):
    model = randomized(replace(TINY, recompute_modulation=is_recomputed))
    expected = gradients(model, model(*inputs()))
    model.checkpoint_blocks(mode)
    assert_same(gradients(model, model(*inputs())), expected)


def test_a_graph_is_good_for_one_backward_pass():
    model = randomized()
    loss = model(*inputs()).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="this graph has been used for a backward pass"):
        loss.backward()


# --- what does not fit ---


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"pixel_width": 6}, "pixel_width must be a multiple of 4 for the table of pixel positions, got 6"),
        ({"pixel_width": 68}, "pixel_width must lie between 1 and 64, got 68"),
        ({"image_size": (32, 20)}, r"image_size must be a multiple of patch_size 8, got \(32, 20\)"),
        ({"heads": 3}, "heads must make width / heads, 64 / heads, a multiple of 4, got 3"),
        ({"heads": 32}, "heads must make width / heads, 64 / heads, a multiple of 4, got 32"),
        ({"pixel_depth": -1}, "pixel_depth must not be negative"),
        ({"prediction": "noise"}, "prediction must be one of velocity, x, got noise"),
        ({"pixel_modulation": "image"}, "pixel_modulation must be one of pixel, patch, got image"),
    ],
)
def test_configurations_that_make_no_sense(overrides: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        replace(TINY, **overrides)


def test_wrong_inputs():
    model = randomized()
    x, t, y = inputs()
    with pytest.raises(ValueError, match="H and W multiples of 8, got"):
        model(x[:, :, :20], t, y)
    with pytest.raises(ValueError, match=r"tap must lie in \[0, 2\], got 3"):
        model(x, t, y, tap=3)


def test_other_classes_and_channels():
    given = randomized().state_dict()
    grey = PixelDiT(replace(TINY, channels=1, num_classes=3))
    own = grey.state_dict()
    for name, value in given.items():
        if value.shape == own[name].shape:
            own[name] = value
            continue
        resized = grey.resized(name, value, own[name], {0: 4, 1: 9})
        assert resized is not None, name
        assert resized[0].shape == own[name].shape, name
        own[name] = resized[0]
    table = given["y_embedder.embedding_table.weight"]
    assert torch.equal(own["y_embedder.embedding_table.weight"][[0, 1, 3]], table[[4, 9, 10]])
    grey.load_state_dict(own)
    # a grey image gives the mean of what the colour model makes of it
    x, t, y = inputs()
    x = x[:, :1]
    s = torch.randn(2, 16, TINY.width, generator=torch.Generator().manual_seed(2))
    colour = randomized()(x.expand(-1, 3, -1, -1), t, y, s=s)
    torch.testing.assert_close(grey.eval()(x, t, y, s=s), colour.mean(1, keepdim=True), rtol=1e-4, atol=1e-5)
