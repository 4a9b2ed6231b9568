"""The report of the first loss that is not finite."""

import math

import torch

from pixelgen.training.guard import FiniteGuard, NotFinite

CPU = torch.device("cpu")


def step_terms(loss: float, lpips: float = 1.0) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(loss), "lpips": torch.tensor(lpips)}


def test_finite_steps_give_no_report():
    guard = FiniteGuard(CPU)
    for step in range(1, 4):
        guard.update(step, step_terms(1.0), {"lpips": torch.ones(3)})
    assert guard.first() is None


def test_the_first_bad_step_is_named_with_terms_and_samples():
    guard = FiniteGuard(CPU)
    guard.update(1, step_terms(1.0), {"lpips": torch.ones(4)})
    guard.update(
        2,
        step_terms(math.nan, math.inf),
        {"lpips": torch.tensor([1.0, math.nan, 1.0, math.inf]), "p_dino": torch.ones(4)},
    )
    guard.update(3, step_terms(math.nan), {"lpips": torch.full((4,), math.nan)})
    guard.update(4, {"loss": torch.tensor(math.nan)}, {})  # a term that is not computed any more
    assert guard.first() == NotFinite(2, ("loss", "lpips"), {"lpips": [1, 3]})
