"""What MFU is made of: the arithmetic of a training step.

Counted, by PyTorch's counter on tensors without memory, is what the algorithm needs: matrix products,
convolutions and attention, two FLOPs for a multiply-add. The backward pass of a trained layer is twice its
forward, that of a frozen one the gradient of its input alone. Not counted: norms, activations, the optimizer,
padding of selected samples, the balance's two extra backward passes every `loss.balance_every` steps, and
what is computed again to save memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from pixelgen.config.train_config import TrainConfig
from pixelgen.losses.gate import NoiseGate
from pixelgen.losses.options import LossConfig
from pixelgen.planning.counting import denoiser_flops, objective_flops


@dataclass(frozen=True)
class StepFlops:
    """Useful FLOPs of one optimizer step, for the whole global batch.

    Attributes:
        denoiser: forward and backward.
        projector: the networks that loss terms train, such as the alignment's projector.
        frozen: the stage and token networks: targets, predictions, and from these back to the image.
    """

    denoiser: float
    projector: float
    frozen: float

    @property
    def total(self) -> float:
        """The sum: what MFU divides by the time and the peak."""
        return self.denoiser + self.projector + self.frozen


def train_step_flops(config: TrainConfig, step: int = 0) -> StepFlops:
    """Useful FLOPs of one optimizer step of a run.

    Exact but for the denoiser's two layers that read data, patches and time features: their inputs need no
    gradient, less than 0.1 % at the published sizes.

    Args:
        config: of the run; its batch is the step's.
        step: matters where terms have a schedule.
    """
    model, loss, batch = config.model_config(), config.loss, config.train.batch_size
    # Counts change only where a term's weight does.
    first = max(edge for edge in schedule_edges(loss) if edge <= step)
    share = expected_gate_share(config)

    def flops(*t: float) -> np.ndarray:
        return np.array(objective_flops(loss, model, first, t), dtype=float)

    if share == 0:  # where no image passes, terms of the whole batch rest too
        trained, frozen = flops(0.0)
    else:
        passing = flops(1.0)
        trained, frozen = share * passing + (1 - share) * (flops(1.0, 0.0) - passing)
    return StepFlops(batch * 3.0 * denoiser_flops(model), float(batch * trained), float(batch * frozen))


def schedule_edges(loss: LossConfig) -> list[int]:
    """The steps at which the weight of some term changes, with 0, in order."""
    return sorted({step for options in loss.used_terms().values() for step, _ in options.schedule})


def expected_gate_share(config: TrainConfig) -> float:
    """Share of the samples that the noise gate lets pass: P(t >= first_t) under the distribution of t."""
    loss, time = config.loss, config.time
    first_t = NoiseGate(loss.gate, loss.gate_t, loss.gate_width).first_t
    if not 0 < first_t < 1:
        return 1.0 if first_t <= 0 else 0.0
    # t = s / (s + (1 - s) timeshift) rises with s, the time before the shift
    first_s = first_t * time.timeshift / (1 - first_t + first_t * time.timeshift)
    if time.distribution == "uniform":
        return 1 - first_s
    return 1 - NormalDist(time.mean, time.std).cdf(math.log(first_s / (1 - first_s)))
