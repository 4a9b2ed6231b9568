"""The experimental adversarial term: both sides of the game, their gradients, and a game that is won."""

import torch

from pixelgen.losses.discriminator import Discriminator

B, T, D = 6, 4, 5


def tokens(seed: int, shift: float = 0.0) -> torch.Tensor:
    values = torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))
    values[..., 0] += shift
    return values


def test_each_side_has_gradients_of_its_own_only():
    torch.manual_seed(0)
    discriminator = Discriminator(D, 8)
    fake, real = tokens(1).requires_grad_(), tokens(2).requires_grad_()
    discriminator.generator_term(fake).sum().backward()
    assert fake.grad is not None and fake.grad.any()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    fake.grad = None
    discriminator.discriminator_term(real, fake).sum().backward()
    assert fake.grad is None and real.grad is None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_both_sides_follow_their_formulas_in_float32_under_autocast():
    torch.manual_seed(0)
    discriminator = Discriminator(D, 8, r1_weight=0.0)
    real, fake = tokens(1) * 30, tokens(2) * 7 + 1  # normalised first, whatever their scale
    of_real, of_fake = (
        discriminator.head(torch.nn.functional.layer_norm(values, (D,))) for values in (real, fake)
    )
    expected = (1 - of_real).relu().mean((1, 2)) + (1 + of_fake).relu().mean((1, 2))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            per_sample = discriminator.discriminator_term(real, fake)
            generator = discriminator.generator_term(fake)
        assert per_sample.dtype == generator.dtype == torch.float32
        torch.testing.assert_close(per_sample, expected)
        torch.testing.assert_close(generator, -of_fake.mean((1, 2)))


def test_r1_is_the_squared_gradient_at_real_tokens():
    torch.manual_seed(0)
    plain, penalised = Discriminator(D, 8, r1_weight=0.0), Discriminator(D, 8, r1_weight=3.0)
    penalised.load_state_dict(plain.state_dict())
    real, fake = tokens(1), tokens(2)
    normalised = torch.nn.functional.layer_norm(real, (D,)).requires_grad_()
    (gradient,) = torch.autograd.grad(plain.head(normalised).sum(), normalised)
    penalty = 1.5 * gradient.square().sum(2).mean(1)
    difference = penalised.discriminator_term(real, fake) - plain.discriminator_term(real, fake)
    torch.testing.assert_close(difference, penalty)


def test_the_discriminator_learns_and_the_generator_follows():
    torch.manual_seed(0)
    discriminator = Discriminator(D, 32, r1_weight=0.1)
    shift = torch.zeros(D, requires_grad=True)
    players = (
        torch.optim.Adam(discriminator.parameters(), 5e-3, betas=(0.0, 0.99)),
        torch.optim.Adam([shift], 5e-2, betas=(0.0, 0.99)),
    )
    for step in range(300):
        real, fake = tokens(2 * step, shift=3.0), tokens(2 * step + 1) + shift
        loss = discriminator.discriminator_term(real, fake).mean()
        loss = loss + discriminator.generator_term(fake).mean()
        for player in players:
            player.zero_grad()
        loss.backward()
        for player in players:
            player.step()
    assert loss.isfinite()
    assert shift[0] > 1.0  # towards the channel in which real tokens stand out
