"""patchify and unpatchify: exact permutations, in both channel orders."""

import pytest
import torch
from op_testing import check_refuses, draw
from pixelgen_kernels import patchify, unpatchify


@pytest.mark.parametrize("order", ["first", "last"])
def test_element_by_element(order: str) -> None:
    """Against the definition, written without reshapes."""
    x = draw(2, 3, 4, 6)
    tokens = patchify(x, 2, channel_order=order)
    for c in range(3):
        for h in range(4):
            for w in range(6):
                row, col = h % 2, w % 2
                index = (c * 2 + row) * 2 + col if order == "first" else (row * 2 + col) * 3 + c
                assert torch.equal(tokens[:, (h // 2) * 3 + w // 2, index], x[:, c, h, w])
    assert torch.equal(unpatchify(tokens, 2, (4, 6), channel_order=order), x)


def test_errors() -> None:
    refused = {
        "ValueError: x must have shape (B, C, H, W), got (3, 8, 12)": {"x": draw(3, 8, 12)},
        "TypeError: x must be ... got torch.uint8": {"x": draw(2, 3, 8, 12).to(torch.uint8)},
        "TypeError: x must be a tensor, got list": {"x": [1.0]},
        "ValueError: multiples of patch_size 5, got (8, 12)": {"patch_size": 5},
        "ValueError: patch_size must be between 1 and ... got 0": {"patch_size": 0},
        "TypeError: patch_size must be an int, got float": {"patch_size": 4.0},
        "ValueError: channel_order must be one of first, last, got 'middle'": {"channel_order": "middle"},
    }
    check_refuses(patchify, {"x": draw(2, 3, 8, 12), "patch_size": 4}, refused)
    refused = {
        "ValueError: tokens must have shape (B, T, P*P*C)": {"tokens": draw(6, 48)},
        "TypeError: tokens must be ... got torch.int64": {"tokens": torch.ones(2, 6, 48).long()},
        "ValueError: multiple of P*P = 16 columns, got 40": {"tokens": draw(2, 6, 40)},
        "ValueError: number H*W/P^2 = 12 for image_size (16, 12), got 6": {"image_size": (16, 12)},
        "ValueError: multiples of patch_size 4, got (8, 10)": {"image_size": (8, 10)},
        "ValueError: contiguous in its last dimension": {"tokens": draw(2, 48, 6).transpose(1, 2)},
        "ValueError: channel_order must be one of first, last, got None": {"channel_order": None},
    }
    check_refuses(unpatchify, {"tokens": draw(2, 6, 48), "patch_size": 4, "image_size": (8, 12)}, refused)
