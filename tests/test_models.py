"""The class-conditional denoiser: sizes, shapes, devices, dtypes, both kernel settings."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from pixelgen_kernels import select
from safetensors.torch import load_model, save_model
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from pixelgen.errors import UserError
from pixelgen.models.embeddings import rope_table, sincos_position_table
from pixelgen.models.jit import JiT
from pixelgen.models.layers import packed_modulations
from pixelgen.models.sizes import SIZES, ModelConfig, model_config

PUBLISHED_MILLIONS = {
    "JiT-B/16": 131,
    "JiT-B/32": 133,
    "JiT-L/16": 459,
    "JiT-L/32": 462,
    "JiT-H/16": 953,
    "JiT-H/32": 956,
    "JiT-G/16": 2000,
    "JiT-G/32": 2000,
    "PixelGen-L/16": 459,
    "PixelGen-XL/16": 676,
}


def small(**overrides) -> ModelConfig:
    return model_config("tiny/4", **overrides)


def randomized(config: ModelConfig, kernels: str = "auto") -> JiT:
    """A fresh model predicts zeros, so tests need other weights."""
    model = JiT(config, kernels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def inputs(config: ModelConfig, batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.channels, *config.image_height_width, generator=generator)
    return x, torch.linspace(0.0, 0.9, batch), torch.arange(batch) % (config.num_classes + 1)


@pytest.mark.parametrize("size", [size for size in SIZES if not size.startswith("tiny")])
def test_parameter_counts_are_the_published_ones(size):
    with torch.device("meta"):
        model = JiT(SIZES[size])
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED_MILLIONS[size], rel=0.01 if "G" not in size[:5] else 0.03)


def test_a_model_built_on_meta_equals_one_built_directly():
    config = small()
    with torch.device("meta"):
        model = JiT(config)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    direct = JiT(config)
    for either in (model, direct):
        torch.manual_seed(0)
        either.reset_parameters()
    for (name, a), (_, b) in zip(model.state_dict().items(), direct.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(model.rope(), direct.rope(), strict=True):
        assert torch.equal(a, b)


def test_a_fresh_model_predicts_zeros():
    config = small()
    assert not JiT(config)(*inputs(config)).any()


@pytest.mark.parametrize("image_size", [32, (16, 32), (48, 8)])
def test_image_sizes_that_the_patch_divides(image_size):
    config = small(image_size=image_size)
    model = randomized(config)
    x, t, y = inputs(config)
    x_pred, features = model(x, t, y, tap=2)
    assert x_pred.shape == x.shape
    assert features.shape == (2, config.num_tokens, config.width)
    assert x_pred.abs().max() > 0.01


def test_tokens_and_images_are_the_same_computation():
    config = small()
    model = randomized(config)
    x, t, y = inputs(config)
    ops = select("eager")
    tokens, _ = model.forward_tokens(ops.patchify(x, 4, channel_order="first"), config.grid, t, {"label": y})
    assert torch.equal(ops.unpatchify(tokens, 4, (32, 32), channel_order="last"), model(x, t, y))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_features_are_the_input_of_the_block_without_class_tokens(layer):
    config = small()
    model = randomized(config)
    seen = []
    model.blocks[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, features = model(*inputs(config), tap=layer)
    image_tokens = seen[0][:, -config.num_tokens :]
    assert torch.equal(features, image_tokens)


def test_class_tokens_and_label_change_the_prediction():
    config = small()
    model = randomized(config)
    x, t, _ = inputs(config)
    predictions = [model(x, t, torch.full((2,), label)) for label in (0, 1, config.num_classes)]
    assert not torch.allclose(predictions[0], predictions[1], atol=1e-3)
    assert not torch.allclose(predictions[0], predictions[2], atol=1e-3)


def test_without_class_tokens():
    config = small(in_context_len=0)
    model = randomized(config)
    assert "in_context_posemb" not in model.state_dict()
    assert model(*inputs(config)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("size", ["tiny/2", "tiny/4"])
def test_fused_and_eager_ops_agree(size):
    config = model_config(size)
    fused, eager = randomized(config), randomized(config, "eager")
    assert list(fused.state_dict()) == list(eager.state_dict())
    batch = inputs(config, 3)
    outputs = []
    for model in (fused, eager):
        x_pred = model(*batch)
        x_pred.square().mean().backward()
        outputs.append([x_pred.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*outputs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_autocast_and_pure_bfloat16_stay_near_float32():
    config = small()
    model = randomized(config)
    x, t, y = inputs(config)
    expected = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x, t, y)
    pure = copy.deepcopy(model).bfloat16()
    assert all(table.dtype == torch.float32 for table in pure.rope())
    assert torch.equal(pure.rope()[0], model.rope()[0])
    half = pure(x.bfloat16(), t, y)
    assert autocast.dtype == half.dtype == torch.bfloat16
    scale = expected.abs().max()
    assert (autocast.float() - expected).abs().max() < 0.05 * scale
    assert (half.float() - expected).abs().max() < 0.05 * scale


def test_dropout_acts_in_the_middle_blocks_only():
    config = small(depth=8, proj_dropout=0.5, attn_dropout=0.25)
    rates = [
        (block.attn.proj_dropout, block.mlp.dropout, block.attn.attn_dropout) for block in JiT(config).blocks
    ]
    assert rates == [(0, 0, 0)] * 2 + [(0.5, 0.5, 0.25)] * 4 + [(0, 0, 0)] * 2
    model = randomized(config)
    batch = inputs(config)
    assert torch.equal(model(*batch), model(*batch))
    model.train()
    assert not torch.equal(model(*batch), model(*batch))


def test_compiles_without_graph_breaks():
    config = model_config("tiny/2", depth=2, in_context_start=1)
    model = randomized(config)
    batch = inputs(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*batch), model(*batch), atol=1e-5)


def test_position_tables():
    # Channels of the first half follow the column, those of the second half the row.
    table = sincos_position_table(8, 2, 3)[0]
    assert table.shape == (6, 8)
    assert torch.equal(table[0, :4], table[3, :4])
    assert torch.equal(table[0, 4:], table[2, 4:])
    assert table[4, 0] == pytest.approx(torch.tensor(1.0).sin())
    cos, sin = rope_table(8, 2, 3)
    assert cos.shape == sin.shape == (6, 4)
    angle = torch.atan2(sin, cos)
    assert torch.allclose(angle[5], torch.tensor([1.0, 0.01, 2.0, 0.02]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"image_size": 30}, "multiple of patch_size 4"),
        ({"image_size": (32, 30)}, "multiple of patch_size 4"),
        ({"heads": 3}, "width / heads"),
        ({"in_context_start": 3}, "in_context_start"),
        ({"proj_dropout": 1.0}, "proj_dropout"),
        ({"depth": 0}, "depth"),
    ],
)
def test_configurations_that_make_no_sense(overrides, words):
    with pytest.raises(UserError, match=words):
        small(**overrides)


def test_unknown_size_lists_the_known_ones():
    with pytest.raises(UserError, match=r"JiT-B/16.*PixelGen-XL/16"):
        model_config("JiT-XXL/16")


def test_wrong_inputs():
    config = small()
    model = JiT(config)
    x, t, y = inputs(config)
    with pytest.raises(ValueError, match=r"JiT: the grid must be \(8, 8\), .* got \(4, 8\)"):
        model(x[:, :, :16], t, y)
    with pytest.raises(ValueError, match=r"tap must lie in \[0, 3\), got 3"):
        model(x, t, y, tap=3)


def test_one_product_gives_the_modulations_of_all_layers(monkeypatch):
    config = small(depth=3)
    model = randomized(config)
    C = config.width
    wide = []
    linear = F.linear

    def counted(x, weight, bias=None):
        if weight.shape[0] > 6 * C:
            wide.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr("pixelgen.models.layers.F.linear", counted)
    condition = torch.randn(2, C)
    parts = packed_modulations(condition, [block.adaLN_modulation for block in model.blocks], torch.float32)
    for part, block in zip(parts, model.blocks, strict=True):
        torch.testing.assert_close(part, block.adaLN_modulation(condition))
    wide.clear()
    model(*inputs(config))
    assert wide == [(3 * 6 * C + 2 * C, C)]


def test_a_model_can_be_pickled_and_saved(tmp_path):
    config = small()
    model = randomized(config)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(*inputs(config)), model(*inputs(config)))
    save_model(model, str(tmp_path / "model.safetensors"))
    fresh = JiT(config).eval()
    load_model(fresh, str(tmp_path / "model.safetensors"))
    assert torch.equal(fresh(*inputs(config)), model(*inputs(config)))
    assert get_model_state_dict(model).keys() == set(model.state_dict())


def test_pending_branches_are_added_where_the_sum_is_needed():
    """Taking the features adds what the block before has left, and must change nothing else."""
    config = small(depth=3, in_context_start=1)
    model = randomized(config)
    x, t, y = inputs(config)
    expected = model(x, t, y)
    for layer in range(3):
        x_pred, _ = model(x, t, y, tap=layer)
        assert torch.allclose(x_pred, expected, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_blocks_have_the_same_gradients_and_keep_less(mode, dropout):
    """Also with dropout, which has to draw the same numbers again."""

    def run(mode: str) -> tuple[torch.Tensor, int]:
        torch.manual_seed(0)
        model = JiT(model_config("tiny/4", depth=4, attn_dropout=dropout, proj_dropout=dropout))
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        model.checkpoint_blocks(mode)
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x, t, y = torch.randn(2, 3, 32, 32), torch.rand(2), torch.tensor([1, 2])
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            prediction = model(x, t, y)
        prediction.square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), sum(kept.values())

    gradients, memory = run(mode)
    expected, all_memory = run("none")
    assert torch.equal(gradients, expected)
    assert memory < 0.6 * all_memory


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_blocks_compile(mode):
    model = randomized(small(depth=2, in_context_start=1))
    batch = inputs(model.config)

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(*batch).square().mean(), list(model.parameters())))

    expected = gradients()
    model.checkpoint_blocks(mode)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for found, value in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, value)
