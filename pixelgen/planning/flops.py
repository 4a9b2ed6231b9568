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
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pixelgen.config.train_config import TrainConfig
from pixelgen.losses.gate import NoiseGate
from pixelgen.losses.options import LossConfig
from pixelgen.models.families import Architecture, build_denoiser
from pixelgen.planning.skeleton import build


@lru_cache(maxsize=16)
def denoiser_flops(model: Architecture) -> int:
    """FLOPs of one forward pass of the denoiser for one image, as PyTorch counts them.

    Those of matrix products, with attention as the two products that it is.
    """
    with torch.device("meta"), torch.no_grad():
        denoiser = build_denoiser(model, "eager").to("meta")  # tables too, wherever they were computed
        tokens, t = torch.empty(1, model.num_tokens, model.patch_dim), torch.empty(1)
        with FlopCounter() as counter:
            denoiser.forward_tokens(tokens, model.grid, t, denoiser.example_condition(1))
    return counter.count


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
    passing, both = (_objective_flops(loss, model, first, times) for times in ((1.0,), (1.0, 0.0)))
    other = (
        _objective_flops(loss, model, first, (0.0,))
        if share == 0
        else tuple(two - one for two, one in zip(both, passing, strict=True))
    )
    trained, frozen = (share * one + (1 - share) * rest for one, rest in zip(passing, other, strict=True))
    return StepFlops(batch * 3.0 * denoiser_flops(model), batch * trained, batch * frozen)


def schedule_edges(loss: LossConfig) -> list[int]:
    """The steps at which the weight of some term changes, with 0, in order."""
    return sorted({step for options in loss.used_terms().values() for step, _ in options.schedule})


@lru_cache(maxsize=64)
def _objective_flops(
    loss: LossConfig, model: Architecture, step: int, t: tuple[float, ...]
) -> tuple[int, int]:
    """FLOPs of the objective's forward and backward pass for images at some times.

    Returns:
        Those of networks that terms train, and those of frozen ones.
    """
    skeleton = build(loss, model)
    with FlopCounter() as frozen:
        found = skeleton.objective.frozen_features(*skeleton.inputs(t), step=step)
        outputs = [value for value in found if value.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    with FlopCounter() as total:
        outcome = skeleton.objective(*skeleton.inputs(t), step=step, update_balance=False)
        outcome.loss.backward()
    return total.count - frozen.count, frozen.count


class FlopCounter(TorchDispatchMode):
    """FLOPs of what runs inside, second derivatives included, by PyTorch's own table; attention as products.

    Attributes:
        count: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._math = sdpa_kernel(SDPBackend.MATH)

    def __enter__(self) -> FlopCounter:
        self._math.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._math.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.count += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


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
