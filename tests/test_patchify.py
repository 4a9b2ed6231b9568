"""patchify and unpatchify: exact permutations, in both channel orders and on every layout of the image."""

import pytest
import torch
from op_testing import (
    DEVICES,
    DTYPES,
    Inputs,
    as_chunk,
    check_compiles,
    check_gradcheck,
    check_no_alias,
    check_opcheck,
    check_refuses,
    draw,
)
from pixelgen_kernels import patchify, unpatchify
from pixelgen_kernels.patchify import patchify_ref, unpatchify_ref

ORDERS = ("first", "last")
# smallest, odd in every dimension, one channel, digits, JiT-L/16, JiT-L/32, a patch size without its own code
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((3, 5, 9, 21), 3),
    ((2, 1, 8, 12), 4),
    ((2, 1, 8, 8), 2),
    ((2, 3, 256, 256), 16),
    ((1, 3, 256, 128), 32),
    ((2, 3, 16, 40), 8),
]


def image_layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same image, contiguous and as the strided views that callers have."""
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "chunk_of_channels": as_chunk(x, dim=1),
        "crop": as_chunk(x, dim=3),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "P"), SHAPES)
def test_exact(shape: tuple[int, ...], P: int, order: str, dtype: torch.dtype, device: str) -> None:
    x = draw(*shape, dtype=dtype, device=device)
    expected = patchify_ref(x, P, channel_order=order)
    for name, view in image_layouts(x).items():
        tokens = patchify(view, P, channel_order=order)
        assert tokens.is_contiguous() and tokens.dtype == dtype
        assert torch.equal(tokens, expected), name
    image = unpatchify(expected, P, shape[2:], channel_order=order)
    assert image.is_contiguous() and torch.equal(image, x)
    # image tokens behind a prefix, and a chunk of a packed projection
    padded = torch.cat([torch.full_like(expected[:, :1], float("nan")), expected], 1)[:, 1:]
    for view in (padded, as_chunk(expected)):
        assert torch.equal(unpatchify(view, P, shape[2:], channel_order=order), x)


def test_element_by_element() -> None:
    """Against the definition, written without reshapes."""
    x = draw(2, 3, 4, 6)
    for order in ORDERS:
        tokens = patchify(x, 2, channel_order=order)
        for c in range(3):
            for h in range(4):
                for w in range(6):
                    row, col = h % 2, w % 2
                    index = (c * 2 + row) * 2 + col if order == "first" else (row * 2 + col) * 3 + c
                    assert torch.equal(tokens[:, (h // 2) * 3 + w // 2, index], x[:, c, h, w])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "P"), SHAPES[:4])
def test_gradients_are_exact(shape: tuple[int, ...], P: int, order: str) -> None:
    x = draw(*shape).requires_grad_()
    grad_tokens = draw(*patchify_ref(x, P).shape, seed=1)
    expected = unpatchify_ref(grad_tokens, P, shape[2:], channel_order=order)
    # a gradient that came as a chunk, and one expanded from a single number
    for grad in (grad_tokens, as_chunk(grad_tokens)):
        (grad_x,) = torch.autograd.grad(patchify(x, P, channel_order=order), x, grad)
        assert torch.equal(grad_x, expected)
    (grad_x,) = torch.autograd.grad(patchify(x, P, channel_order=order).sum(), x)
    assert torch.equal(grad_x, torch.ones_like(x))

    tokens = grad_tokens.clone().requires_grad_()
    grad_image = draw(*shape, seed=2)
    expected = patchify_ref(grad_image, P, channel_order=order)
    for grad in image_layouts(grad_image).values():
        image = unpatchify(tokens, P, shape[2:], channel_order=order)
        assert torch.equal(torch.autograd.grad(image, tokens, grad)[0], expected)
    (grad_tokens,) = torch.autograd.grad(unpatchify(tokens, P, shape[2:], channel_order=order).sum(), tokens)
    assert torch.equal(grad_tokens, torch.ones_like(tokens))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8)])
def test_empty(shape: tuple[int, ...], device: str) -> None:
    tokens = patchify(draw(*shape, device=device), 4)
    assert tokens.shape == (shape[0], shape[2] * shape[3] // 16, 48)
    assert unpatchify(tokens, 4, shape[2:]).shape == shape


@pytest.mark.parametrize("order", ORDERS)
def test_opcheck(order: str) -> None:
    x = draw(2, 3, 4, 6).requires_grad_()
    check_opcheck(torch.ops.pixelgen.patchify.default, x, 2, order)
    check_opcheck(torch.ops.pixelgen.patchify.default, as_chunk(x.detach(), dim=1), 1, order)
    tokens = draw(2, 6, 12).requires_grad_()
    check_opcheck(torch.ops.pixelgen.unpatchify.default, tokens, 2, 4, 6, order)
    check_opcheck(torch.ops.pixelgen.unpatchify.default, as_chunk(tokens.detach()), 2, 4, 6, order)


@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(order: str) -> None:
    inputs: Inputs = {"x": draw(2, 3, 4, 6), "patch_size": 2, "channel_order": order}
    check_gradcheck(patchify, inputs, ["x"])
    inputs = {"tokens": draw(2, 6, 12), "patch_size": 2, "image_size": (4, 6), "channel_order": order}
    check_gradcheck(unpatchify, inputs, ["tokens"])
    # a linear op is its own second derivative's building block: this differentiates the backward
    x = draw(1, 2, 4, 4).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: patchify(x, 2, channel_order=order).square(), [x])


def test_compiles() -> None:
    check_compiles(patchify, {"x": draw(2, 3, 8, 12), "patch_size": 4}, ["x"])
    check_compiles(unpatchify, {"tokens": draw(2, 6, 48), "patch_size": 4, "image_size": (8, 12)}, ["tokens"])


def test_outputs_do_not_alias_inputs() -> None:
    for P in (1, 2):
        check_no_alias(patchify, {"x": draw(2, 1, 4, 4), "patch_size": P})
        check_no_alias(
            unpatchify, {"tokens": draw(2, 16, P * P), "patch_size": P, "image_size": (4 * P, 4 * P)}
        )


def test_refuses() -> None:
    inputs: Inputs = {"x": draw(2, 3, 8, 12), "patch_size": 4}
    for error, match, changes in (
        (ValueError, r"patchify: x must have shape \(B, C, H, W\), got \(3, 8, 12\)", {"x": draw(3, 8, 12)}),
        (TypeError, r"patchify: x must be .*, got torch\.uint8", {"x": draw(2, 3, 8, 12).to(torch.uint8)}),
        (TypeError, r"patchify: x must be a tensor, got list", {"x": [1.0]}),
        (ValueError, r"multiples of patch_size 5, got \(8, 12\)", {"patch_size": 5}),
        (ValueError, r"patch_size must be between 1 and .*, got 0", {"patch_size": 0}),
        (TypeError, r"patch_size must be an int, got float", {"patch_size": 4.0}),
        (ValueError, r"channel_order must be one of first, last, got 'middle'", {"channel_order": "middle"}),
    ):
        check_refuses(patchify, inputs, error, match, **changes)
    inputs = {"tokens": draw(2, 6, 48), "patch_size": 4, "image_size": (8, 12)}
    for error, match, changes in (
        (ValueError, r"unpatchify: tokens must have shape \(B, T, P\*P\*C\)", {"tokens": draw(6, 48)}),
        (
            TypeError,
            r"unpatchify: tokens must be .*, got torch\.int64",
            {"tokens": torch.ones(2, 6, 48).long()},
        ),
        (ValueError, r"multiple of P\*P = 16 columns, got 40", {"tokens": draw(2, 6, 40)}),
        (
            ValueError,
            r"must number H\*W/P\^2 = 12 for image_size \(16, 12\), got 6",
            {"image_size": (16, 12)},
        ),
        (ValueError, r"multiples of patch_size 4, got \(8, 10\)", {"image_size": (8, 10)}),
        (ValueError, r"contiguous in its last dimension", {"tokens": draw(2, 48, 6).transpose(1, 2)}),
        (ValueError, r"channel_order must be one of first, last, got None", {"channel_order": None}),
    ):
        check_refuses(unpatchify, inputs, error, match, **changes)
