"""One training step, as in the algorithm box of arXiv 2602.02493, and all state that it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pixelgen_kernels import philox_normal, philox_uniform
from torch import Tensor

from pixelgen.conditions import Condition, dropped, part_of
from pixelgen.config.resolve import Mode, check_batch, resolve_mode
from pixelgen.config.train_config import TrainConfig
from pixelgen.data.order import Share
from pixelgen.data.source import Source
from pixelgen.flow import logit_normal_time, shift_time
from pixelgen.losses.build import build_objective
from pixelgen.losses.objective import Outcome
from pixelgen.losses.times import Times
from pixelgen.models.families import build_denoiser
from pixelgen.models.float8 import use_float8
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.ema import Averages
from pixelgen.training.guard import FiniteGuard
from pixelgen.training.optim import Optimizers
from pixelgen.training.processes.shard import shard, sum_over_copies
from pixelgen.training.processes.world import World

# Philox streams, one per random draw of a step; 0 is the noise of noise_patchify, 4 the loader's crops.
TIME_STREAM, LABEL_DROP_STREAM, FLIP_STREAM = 1, 2, 3
FEATURE_IMAGES = 4096  # images that embedded features are trained on


class Trainer:
    """Model, objective, optimizers and averages of one run, in one process or one of several.

    Features that are trained on the run's own images are kept in ``run_dir``, which exists.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, dataset: Source, world: World) -> None:
        self.config, self.run_dir, self.dataset = config, run_dir, dataset
        self.world, self.device = world, world.device
        check_batch(config, world.size)
        self.step = 0
        torch.manual_seed(config.seed)  # initialisation: the same in every process
        self.model = build_denoiser(config.model_config(), config.kernels)
        self.num_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.objective = world.in_turn(
            "preparing the losses",
            lambda: build_objective(
                config.loss,
                self.model,
                run_dir=run_dir,
                images=self._images_for_features,
                t_eps=config.time.t_eps,
                seed=config.seed,
                micro_batches=config.train.micro_batches,
                kernels=config.kernels,
            ),
        ).to(self.device)
        is_half = config.dtype == "bfloat16" and self.device.type == "cuda"
        self.objective.networks.speed_up(half=is_half, compiled=config.loss.compile_networks)
        # Key of this process's balance weight where each process has a different one.
        is_own = config.loss.balance == "released" and world.size > 1
        self._own_balance = f"balance_of_rank_{world.rank}" if is_own else None
        self.mode = self._distribute()
        self.optimizers = Optimizers(config, self.model, self.objective, world)
        self.averages = Averages(self.model, config.ema)
        self.guard = FiniteGuard(self.device)

    def _images_for_features(self) -> tuple[Tensor, Tensor]:
        """For features trained on the run's own images."""
        num_images = self.dataset.num_images
        some = "the stream's first" if num_images is None else f"{min(num_images, FEATURE_IMAGES):,}"
        print(f"training embedded features on {some} images", flush=True)
        return self.dataset.examples(FEATURE_IMAGES, self.config.seed)

    def _distribute(self) -> Mode:
        """Activation checkpointing, float8, compilation and sharding, which must come in this order."""
        config, world = self.config, self.world
        self.model.checkpoint_blocks(config.train.activation_checkpointing)
        if config.float8:
            use_float8(self.model, self.device)
        if config.compile:
            self.model.compile_blocks()
        sizes = {"size": world.size, "local_size": world.local_size}
        mode = resolve_mode(config.parallel, **sizes, num_parameters=self.num_parameters)
        if mode == "none":
            self.model.to(self.device)
        else:
            # From whole weights on the host, equal in every process: a run starts alike on any number.
            others = list(self.objective.trained_with_the_denoiser().values())
            shard(self.model, others, mode, config.parallel, world, half=config.dtype == "bfloat16")
        return mode

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes training, this process's shards of it.

        No random state: every draw of a step is a function of the seed, the step and the sample.
        """
        model = self.model.state_dict()
        tables = {name: model[name] for name, _ in self.model.named_buffers() if name in model}
        state: dict[str, Any] = {
            "model": model,
            "tables": tables,
            "objective": self.objective.state_dict(),
            "ema": self.averages.state_dict(),
            "step": self.step,
            **self.optimizers.state_dict(),
        }
        if self._own_balance is not None:
            state[self._own_balance] = state["objective"]["balance.weight"].clone()
        return state

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restores what ``state_dict`` gave, on any number of processes; returns the position in the data."""
        position = self.world.together(lambda: self._load(checkpoint))
        steps = set(self.world.gather(self.step))
        if len(steps) > 1:
            self.world.fail(f"{checkpoint}: the processes read different steps, {sorted(steps)}")
        return position

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        state = self.state_dict() | {"data": checkpoints.stored_values(checkpoint, "data")}
        if self._own_balance is not None and self._own_balance not in checkpoints.stored_entries(checkpoint):
            del state[self._own_balance]  # saved by fewer processes: another one's will do
        checkpoints.load_state(checkpoint, state)
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        if self._own_balance in state:
            self.objective.load_state_dict({"balance.weight": state[self._own_balance]}, strict=False)
        self.averages.load_state_dict(state["ema"])
        self.optimizers.load_state_dict(state)
        self.step = state["step"]
        return state["data"]

    # --- one step ---

    def draw_time(self, step: int) -> Tensor:
        """The times (B,) of the whole batch of a step, on the host.

        Drawn there, so that the host knows, without asking the device, which samples pass the noise gate,
        those of other processes included.
        """
        config = self.config.time
        index = torch.arange(self.config.train.batch_size)
        if config.distribution == "logit_normal":
            draw = philox_normal(self.config.seed, step, index, 1, stream=TIME_STREAM)[:, 0]
            t = logit_normal_time(draw, config.mean, config.std)
        else:
            t = philox_uniform(self.config.seed, step, index, 1, stream=TIME_STREAM)[:, 0]
        return shift_time(t, config.timeshift)

    def train_step(self, images: Tensor, condition: Condition) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            images: (B / world.size, C, H, W) uint8 on the device, this process's part of the batch.
            condition: of these images, on the device.

        Returns:
            Loss terms, gradient norms and the share of gated samples: scalars on the device. Those of all
            processes add up to the values of the batch, or are the same in all: see ``is_share``.
        """
        step = self.step
        whole_t = self.draw_time(step)
        size = len(images) // self.config.train.micro_batches
        parts = [range(first, first + size) for first in range(0, len(images), size)]
        balance = self.objective.balance
        balances_first = balance is not None and balance.is_due(step) and len(parts) > 1
        if balances_first:  # by all parts, before the first one is weighted with it
            for part in parts:
                self._forward(images, condition, part, whole_t, update_balance=True)
        self.optimizers.zero_grad()
        terms: dict[str, Tensor] = {}
        per_sample: list[tuple[int, dict[str, Tensor]]] = []
        for part in parts:
            outcome = self._forward(images, condition, part, whole_t, update_balance=not balances_first)
            sum_over_copies(self.optimizers.trained.values(), part is parts[-1])
            outcome.loss.backward()
            for name, value in {"loss": outcome.loss.detach(), **outcome.terms}.items():
                terms[name] = terms[name] + value.detach() if name in terms else value.detach()
            per_sample.append((len(part), outcome.per_sample))
        if balance is not None:
            terms["balance_weight"] = balance.weight
        terms |= self.optimizers.step(step, terms)
        self.averages.update(self.model)
        self.step += 1
        self.guard.update(self.step, terms, _joined(per_sample))
        return terms

    def _forward(
        self, images: Tensor, condition: Condition, part: range, whole_t: Tensor, *, update_balance: bool
    ) -> Outcome:
        """The objective's value on the images of ``part``, as a share of the whole batch's."""
        config, step = self.config, self.step
        first = self.world.rank * len(images) + part.start
        images, condition = images[part.start : part.stop], part_of(condition, part.start, part.stop)
        index = torch.arange(first, first + len(part), device=self.device)
        # Dropout is not counter-based, so it is seeded: by the step and the first sample.
        torch.manual_seed(((config.seed * 2**32 + step) ^ (first << 44)) % 2**63)

        def uniform(stream: int) -> Tensor:
            return philox_uniform(config.seed, step, index, 1, stream=stream)[:, 0]

        if config.data.flip:
            flipped = uniform(FLIP_STREAM) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        times = Times.of(whole_t, range(first, first + len(part)), self.device)
        model = self.model
        draw: dict[str, Any] = {"seed": config.seed, "step": step, "sample_index": index}
        draw["noise_scale"] = config.time.noise_scale
        tokens, clean = model.ops.noise_patchify(
            images,
            times.t,
            model.config.patch_size,
            **draw,
            channel_order=model.input_order,
            return_clean=True,
            clean_channel_order=model.output_order,
            dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
        )
        noise = None
        if model.prediction == "velocity":
            # The same draw at t = 0 is the noise alone: exact, which x_t - t * x is not near t = 1.
            noise = model.ops.noise_patchify(
                images,
                torch.zeros_like(times.t),
                model.config.patch_size,
                **draw,
                channel_order=model.output_order,
            )
        is_dropped = uniform(LABEL_DROP_STREAM) < config.optimizer.label_drop
        condition = dropped(condition, model.null(condition), is_dropped)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            tap = self.objective.feature_layer(step)
            output, features = model.forward_tokens(tokens, model.config.grid, times.t, condition, tap)
            return self.objective(
                output, clean, images, times, features, noise=noise, step=step, update_balance=update_balance
            )

    # --- what a run shows ---

    def describe_sample(self, step: int, place: int) -> str:
        """A sample of a step, both from 0, in words: its place in the batch, its image and its t."""
        t = float(self.draw_time(step)[place])
        share = Share(self.config.train.batch_size, self.config.seed)
        name = self.dataset.name(int(self.dataset.order(step, share)[place]))
        return f"{place} (t {t:.4g})" if name is None else f"{place} ({name}, t {t:.4g})"


def is_share(name: str) -> bool:
    """Whether a figure of ``train_step`` is summed over the processes; others are averaged."""
    return name != "balance_weight" and not name.endswith("grad_norm")


def _joined(parts: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The values per sample of all parts, given with their sizes; 0 where a part did not compute a term."""
    if len(parts) == 1:
        return parts[0][1]
    examples = {name: value for _, values in parts for name, value in values.items()}
    return {
        name: torch.cat([values.get(name, like.new_zeros(size)) for size, values in parts])
        for name, like in examples.items()
    }
