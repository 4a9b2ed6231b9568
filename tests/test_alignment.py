"""Alignment with an encoder of another number of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from objectives import MeanTokens, grad_of, make_batch, make_objective, terms_of
from torch import Tensor

from pixelgen.losses.terms.alignment import resized_to


def test_projected_features_are_resized_to_the_grid_of_the_encoder():
    four = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 4, 1)
    assert resized_to(four, 1).tolist() == [[[3.0]]]
    assert resized_to(four, 4) is four
    # pixel centres: a new column sits a quarter of the way from an old one to the next
    rows = torch.tensor([[1.0, 1.25, 1.75, 2.0], [3.0, 3.75, 5.25, 6.0]])
    expected = torch.stack([rows[0], rows[0].lerp(rows[1], 0.25), rows[0].lerp(rows[1], 0.75), rows[1]])
    torch.testing.assert_close(resized_to(four, 16), expected.view(1, 16, 1))
    nine = torch.arange(9.0).view(1, 9, 1)  # overlapping windows of two
    assert resized_to(nine, 4).flatten().tolist() == [2.0, 3.0, 5.0, 6.0]
    channels = torch.cat([nine, -2 * nine], 2)
    assert resized_to(channels, 4)[..., 1].flatten().tolist() == [-4.0, -6.0, -10.0, -12.0]
    line = torch.arange(6.0).view(1, 6, 1)
    assert resized_to(line, 6) is line  # 2 x 3, as the encoder's


@pytest.mark.parametrize(("count", "wanted"), [(6, 4), (4, 6), (4, 0)])
def test_grids_that_are_not_square_are_not_resized(count, wanted):
    with pytest.raises(
        ValueError, match=rf"square grids where their numbers differ, got {count} and {wanted}"
    ):
        resized_to(torch.zeros(1, count, 2), wanted)


@pytest.mark.parametrize("patch", [2, 8])
def test_alignment_with_an_encoder_of_another_grid(patch):
    """The denoiser has 4 tokens, the encoder 16 or 1; the projector sees the denoiser's."""

    class Other(MeanTokens):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, patch).flatten(2).transpose(1, 2) @ self.matrix

    encoder, batch = Other(), make_batch()
    objective = make_objective(encoder=encoder)
    found = terms_of(objective, batch)["alignment"]
    target = encoder(batch["x"])
    projected = resized_to(objective.projector(batch["features"]), target.shape[1])
    torch.testing.assert_close(found, (1 - F.cosine_similarity(projected, target, dim=-1)).mean())
    assert (grad_of(found, batch["features"])[0] != 0).any((0, 2)).all()
