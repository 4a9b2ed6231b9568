"""The experimental adversarial term: both sides of the game, their gradients, and a game that is won."""

import pytest
import torch

from pixelgen.losses.adversarial import Discriminator

B, T, D = 6, 4, 5


def tokens(seed: int, shift: float = 0.0) -> torch.Tensor:
    values = torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))
    values[..., 0] += shift
    return values


def test_each_side_has_gradients_of_its_own_only() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(D, 8)
    fake, real = tokens(1).requires_grad_(), tokens(2).requires_grad_()
    discriminator.generator_term(fake).sum().backward()
    assert fake.grad is not None and fake.grad.any()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    fake.grad = None
    discriminator.discriminator_term(real, fake, torch.ones(B, dtype=torch.bool)).backward()
    assert fake.grad is None and real.grad is None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(D, 8)
    is_real = torch.tensor([True] * 4 + [False] * 2)
    real, fake = tokens(1), tokens(2)
    expected = discriminator.discriminator_term(real[:4], fake[:4], torch.ones(4, dtype=torch.bool))
    fake[4:] = float("nan")
    torch.testing.assert_close(discriminator.discriminator_term(real, fake, is_real), expected)


def test_r1_is_the_squared_gradient_at_real_tokens() -> None:
    torch.manual_seed(0)
    plain, penalised = Discriminator(D, 8, r1_weight=0.0), Discriminator(D, 8, r1_weight=3.0)
    penalised.load_state_dict(plain.state_dict())
    real, fake, everyone = tokens(1), tokens(2), torch.ones(B, dtype=torch.bool)
    normalised = torch.nn.functional.layer_norm(real, (D,)).requires_grad_()
    (gradient,) = torch.autograd.grad(plain.head(normalised).sum(), normalised)
    penalty = 1.5 * gradient.square().sum(2).mean()
    difference = penalised.discriminator_term(real, fake, everyone) - plain.discriminator_term(
        real, fake, everyone
    )
    torch.testing.assert_close(difference, penalty)


def test_the_discriminator_learns_and_the_generator_follows() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(D, 32, r1_weight=0.1)
    shift = torch.zeros(D, requires_grad=True)
    players = (
        torch.optim.Adam(discriminator.parameters(), 5e-3, betas=(0.0, 0.99)),
        torch.optim.Adam([shift], 5e-2, betas=(0.0, 0.99)),
    )
    everyone = torch.ones(B, dtype=torch.bool)
    for step in range(300):
        real, fake = tokens(2 * step, shift=3.0), tokens(2 * step + 1) + shift
        loss = discriminator.discriminator_term(real, fake, everyone)
        loss = loss + discriminator.generator_term(fake).mean()
        for player in players:
            player.zero_grad()
        loss.backward()
        for player in players:
            player.step()
    assert loss.isfinite()
    assert shift[0] > 1.0  # towards the channel in which real tokens stand out


def test_a_negative_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match=r"r1_weight must not be negative, got -1.0"):
        Discriminator(D, r1_weight=-1.0)
