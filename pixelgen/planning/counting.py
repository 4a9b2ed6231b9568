"""FLOPs and activations of one image, counted by running the networks on tensors without memory.

``dtype`` is that of matrix products: bfloat16 for what is trained under autocast, else float32.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pixelgen.losses.build import build_skeleton
from pixelgen.losses.features import Seen
from pixelgen.losses.options import LossConfig
from pixelgen.losses.term import TERMS, Term
from pixelgen.losses.times import Times
from pixelgen.models.families import Architecture, build_denoiser
from pixelgen.models.layers import Checkpointing


class FlopCounter(TorchDispatchMode):
    """Adds up FLOPs of what runs inside, second derivatives included, by PyTorch's own table."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.count += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages made inside that are still alive, but for those of ``known`` tensors."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        return result


class FakeObjective:
    """A run's objective of tensors that have shapes and no memory.

    On the meta device, which is quick, or with a dtype on a fake CPU, which knows autocast.
    """

    def __init__(self, loss: LossConfig, model: Architecture, dtype: torch.dtype | None = None) -> None:
        self._model, self._dtype = model, dtype
        with torch.device("meta"):
            self.objective = build_skeleton(loss, build_denoiser(model, "eager"))
            self.objective.networks.speed_up(half=dtype == torch.bfloat16, compiled=False)
        networks = (self.objective.networks.encoder, self.objective.networks.lpips)
        self._parts = nn.ModuleList(filter(None, [*self.objective.children(), *networks]))
        if dtype is None:
            self._parts.to("meta")  # tables too, wherever they were computed
            return
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            for module in self._parts.modules():  # each once, though both networks may hold it
                module.to_empty(device="cpu", recurse=False)

    def inputs(self, t: tuple[float, ...]) -> tuple[tuple[Any, ...], Tensor]:
        """Arguments of ``Objective.forward`` for images at some times, and the noise."""
        model, dtype, batch = self._model, self._dtype or torch.float32, len(t)
        with torch.device("meta") if self._dtype is None else self._mode:
            patches = torch.empty(batch, model.num_tokens, model.patch_dim, dtype=dtype)
            images = torch.empty(batch, model.channels, *model.image_height_width, dtype=torch.uint8)
            noise = torch.empty(batch, model.num_tokens, model.patch_dim)
            features = torch.empty(batch, model.num_tokens, model.width, dtype=dtype)
            on_device = torch.empty(batch)
        # The host's own times are real: by them it chooses the samples of a term.
        times = Times(torch.tensor(t), range(batch), on_device)
        return (patches.clone().requires_grad_(), patches, images, times, features.requires_grad_()), noise

    def bytes_kept(self, *t: float) -> int:
        """What a forward pass for images at some times keeps for its backward pass."""
        inputs, noise = self.inputs(t)
        known = [*self._parts.parameters(), *self._parts.buffers(), *inputs[:3], inputs[4], noise]
        assert self._dtype is not None
        return _bytes_kept(
            known, self._dtype, lambda: self.objective(*inputs, noise=noise, update_balance=False)
        )


def _bytes_kept(known: Iterable[Tensor], dtype: torch.dtype, forward: Callable[[], object]) -> int:
    """Bytes of what a forward pass leaves behind, its results included."""
    gc.freeze()  # what was there before need not be looked through
    try:
        is_half = dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half), LiveStorages(known) as storages:
            output = forward()
        gc.collect()
        total = sum(storages.alive.values())
        del output
        return total
    finally:
        gc.unfreeze()


@lru_cache(maxsize=64)
def activation_bytes(model: Architecture, dtype: torch.dtype, checkpointing: Checkpointing = "none") -> int:
    """Bytes of one image that are kept between the denoiser's forward and backward pass."""
    with FakeTensorMode():
        denoiser = build_denoiser(model)
        denoiser.checkpoint_blocks(checkpointing)
        tap = min(1, model.depth - 1)

        def kept(batch: int) -> int:
            tokens = torch.empty(batch, model.num_tokens, model.patch_dim, dtype=dtype)
            t, condition = torch.empty(batch), denoiser.example_condition(batch)
            known = [*denoiser.parameters(), *denoiser.buffers(), tokens, t, *condition.values()]
            return _bytes_kept(
                known, dtype, lambda: denoiser.forward_tokens(tokens, model.grid, t, condition, tap=tap)
            )

        return kept(2) - kept(1)  # what does not grow with the batch are weights


@lru_cache(maxsize=64)
def objective_bytes(loss: LossConfig, model: Architecture, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that the objective keeps for its backward pass for one image.

    Returns:
        Those for any image, and how many more for one that passes the noise gate.
    """
    fake = FakeObjective(loss, model, dtype)
    one = fake.bytes_kept(1.0)
    passing = fake.bytes_kept(1.0, 1.0) - one  # what does not grow with the batch are weights
    if fake.objective.gate.first_t <= 0:  # rejects nothing: what it adds shows beside a gate that does
        fake = FakeObjective(replace(loss, gate="hard", gate_t=0.5), model, dtype)
        one = fake.bytes_kept(1.0)
    rejected = fake.bytes_kept(1.0, 0.0) - one
    return rejected, passing - rejected


@lru_cache(maxsize=16)
@sdpa_kernel(SDPBackend.MATH)  # attention as the two products that it is
def denoiser_flops(model: Architecture) -> int:
    """FLOPs of one forward pass of the denoiser for one image: those of matrix products and convolutions."""
    with torch.device("meta"), torch.no_grad():
        denoiser = build_denoiser(model, "eager").to("meta")  # tables too, wherever they were computed
        tokens, t = torch.empty(1, model.num_tokens, model.patch_dim), torch.empty(1)
        with FlopCounter() as counter:
            denoiser.forward_tokens(tokens, model.grid, t, denoiser.example_condition(1))
    return counter.count


@lru_cache(maxsize=64)
@sdpa_kernel(SDPBackend.MATH)
def objective_flops(
    loss: LossConfig, model: Architecture, step: int, t: tuple[float, ...]
) -> tuple[int, int]:
    """FLOPs of the objective's forward and backward pass for images at some times.

    Returns:
        Those of networks that terms train, and those of frozen ones.
    """
    fake = FakeObjective(loss, model)
    inputs, noise = fake.inputs(t)
    look = fake.objective.look(*inputs, noise=noise, step=step)
    with FlopCounter() as forward:
        outputs = [value for name, seen in look.seen.items() for value in _frozen_features(TERMS[name], seen)]
    outputs = [output for output in outputs if output.requires_grad]
    with FlopCounter() as backward:
        if outputs:
            torch.autograd.backward(outputs, list(map(torch.ones_like, outputs)), retain_graph=True)
    with FlopCounter() as total:  # of all but the frozen networks' forward pass, which is done
        fake.objective.evaluate(look, update_balance=False).loss.backward()
    return total.count - backward.count, forward.count + backward.count


def _frozen_features(term: type[Term], seen: Seen) -> list[Tensor]:
    """What the frozen networks make of the images for a term."""
    found = []
    for need in term.needs & {"target_tokens", "tokens", "maps", "images"}:
        sides = (seen.target,) if need == "target_tokens" else (seen.target, seen.predicted)
        for side in sides:
            value = getattr(side, need.removeprefix("target_"))
            found += value if isinstance(value, list) else [value]
    return found
