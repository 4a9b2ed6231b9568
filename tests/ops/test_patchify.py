"""patchify and unpatchify: exact permutations, in both channel orders and on every layout of the image."""

import pytest
import torch
from op_testing import (
    DEVICES,
    Inputs,
    check_refuses,
    draw,
)
from pixelgen_kernels import patchify, unpatchify

ORDERS = ("first", "last")


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8)])
def test_empty(shape: tuple[int, ...], device: str) -> None:
    tokens = patchify(draw(*shape, device=device), 4)
    assert tokens.shape == (shape[0], shape[2] * shape[3] // 16, 48)
    assert unpatchify(tokens, 4, shape[2:]).shape == shape


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
