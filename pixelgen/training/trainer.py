"""One training step and everything it changes. Read aloud, ``train_step`` is the paper's algorithm box
(arXiv 2602.02493); the loop around it is ``pixelgen.training.loop``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pixelgen_kernels import philox_normal, philox_uniform
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor.experimental import implicit_replication

from pixelgen.conditions import Condition, dropped, part_of
from pixelgen.config.resolve import Mode, check_batch, pick_device, resolve_mode
from pixelgen.config.train_config import TrainConfig
from pixelgen.data.order import Share
from pixelgen.data.source import Source
from pixelgen.flow import logit_normal_time, shift_time, x_from_velocity
from pixelgen.losses.build import build_objective
from pixelgen.losses.gate import to_device
from pixelgen.models.families import build_denoiser
from pixelgen.models.float8 import use_float8
from pixelgen.sampling.pipeline import Pipeline, count_parameters
from pixelgen.training.begin import begin, fit, fresh_state, read_source
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.checkpoint.same_parts import check_same_parts
from pixelgen.training.ema import Averages
from pixelgen.training.guard import FiniteGuard
from pixelgen.training.optim import OPTIMIZERS, adamw, clip_gradients, learning_rate
from pixelgen.training.processes.shard import build_mesh, shard, sum_over_copies
from pixelgen.training.processes.world import World

# Streams of the counter-based generator: one per random draw of a step. 0 is the noise of noise_patchify, 4
# the loader's random crops.
TIME_STREAM, LABEL_DROP_STREAM, FLIP_STREAM = 1, 2, 3
GRID_ROWS, GRID_COLUMNS = 10, 8
VELOCITY_T_EPS = 1e-4  # keeps 0 / 0 away
FEATURE_IMAGES = 4096  # that embedded features are trained on


class Trainer:
    """Model, objective, optimizers and averages of one run, in one process or one of several.

    Args:
        config: the resolved configuration.
        run_dir: an existing folder; features trained on the run's own images are kept there.
        dataset: the images.
        world: the processes; None for this one alone.

    Raises:
        UserError: the batch cannot be divided, or weights of a frozen network cannot be had.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        dataset: Source,
        world: World | None = None,
    ) -> None:
        self.config, self.run_dir, self.dataset = config, run_dir, dataset
        self.world = World(pick_device(config.device)) if world is None else world
        self.device = self.world.device
        check_batch(config, self.world.size)
        self.step = 0
        torch.manual_seed(config.seed)  # initialisation: the same in every process
        self.model = build_denoiser(config.model_config(), config.kernels)
        self.num_parameters = count_parameters(self.model)
        self.objective = self.world.in_turn(
            "preparing the losses",
            lambda: build_objective(
                config.loss,
                self.model.config,
                run_dir=run_dir,
                images=self._images_for_features,
                # a predicted velocity needs no floor: what is divided by 1 - t was multiplied by it
                t_eps=config.time.t_eps if self.model.prediction == "x" else VELOCITY_T_EPS,
                seed=config.seed,
                kernels=config.kernels,
            ),
        ).to(self.device)
        is_half = config.dtype == "bfloat16" and self.device.type == "cuda"
        self.objective.speed_up_networks(half=is_half, compiled=config.loss.compile_networks)
        if self.objective.balance is not None:
            self.objective.balance.parts = config.train.micro_batches
        self.mode = self._distribute()
        self.trained = nn.ModuleDict(
            {"model": self.model, "projector": self.objective.projector, "gate": self.objective.gate}
        )
        self._build_optimizers()
        self.averages = Averages(self.model, config.ema)
        self.guard = FiniteGuard(self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)  # steps left out as spikes

    def _images_for_features(self) -> tuple[Tensor, Tensor]:
        """Up to 4096 images of the source, for features trained on the run's own images."""
        num_images = self.dataset.num_images
        some = "the stream's first" if num_images is None else f"{min(num_images, FEATURE_IMAGES):,}"
        print(f"training embedded features on {some} images", flush=True)
        return self.dataset.examples(FEATURE_IMAGES, self.config.seed)

    def _distribute(self) -> Mode:
        """Checkpointing, float8, compilation and sharding, in the order in which they go together."""
        config, world = self.config, self.world
        self.model.checkpoint_blocks(config.train.activation_checkpointing)
        if config.float8:
            use_float8(self.model, self.device)
        if config.compile:
            self.model.compile_blocks()
        mode = resolve_mode(
            config.parallel,
            size=world.size,
            local_size=world.local_size,
            num_parameters=self.num_parameters,
        )
        if mode == "none":
            self.model.to(self.device)
        else:
            # From whole weights on the host, equal in every process: a run starts alike on any number.
            mesh = build_mesh(mode, config.parallel, world)
            half = config.dtype == "bfloat16"
            shard(self.model, [self.objective.projector], mesh, config.parallel, half=half)
        return mode

    def _build_optimizers(self) -> None:
        config = self.config
        # Too small to be sharded: their gradients are summed one by one.
        self.gate_parameters = list(self.objective.gate.parameters())
        self.discriminator_parameters = list(self.objective.discriminator.parameters())
        sharded = [*self.model.parameters(), *self.objective.projector.parameters()]
        self.parameters = [p for p in (*sharded, *self.gate_parameters) if p.requires_grad]
        is_gate = {id(p) for p in self.gate_parameters}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if id(p) not in is_gate]},
            # Decay would pull the gate's learned weights to 1.
            {"params": self.gate_parameters, "weight_decay": 0.0},
        ]
        of_blocks = [p for block in self.model.fsdp_units() for p in block.parameters()]
        matrices = {id(p) for p in of_blocks if p.ndim == 2}
        self.optimizers = OPTIMIZERS[config.optimizer.name](config.optimizer, groups, matrices)
        # Of its own: the discriminator works against the denoiser, and other constants suit it.
        self.discriminator_optimizer: torch.optim.AdamW | None = None
        if self.discriminator_parameters:
            self.discriminator_optimizer = adamw(
                [{"params": self.discriminator_parameters}],
                lr=config.loss.adversarial_lr,
                betas=(0.0, 0.99),
                weight_decay=0.0,
            )

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
            "optimizer": get_optimizer_state_dict(self.trained, self.optimizers),
            "step": self.step,
            "skipped": self.skipped,
        }
        if self.discriminator_optimizer is not None:
            state["discriminator_optimizer"] = get_optimizer_state_dict(
                self.objective.discriminator, self.discriminator_optimizer
            )
        if self._own_balance is not None:
            state[self._own_balance] = self.objective.state_dict()["balance.weight"].clone()
        return state

    @property
    def _own_balance(self) -> str | None:
        """Where this process's balance weight is kept, in the form that gives each process one of its own."""
        balance = self.objective.balance
        is_own = balance is not None and balance.form == "released" and self.world.size > 1
        return f"balance_of_rank_{self.world.rank}" if is_own else None

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restores what ``state_dict`` gave, on any number of processes.

        Returns:
            The position in the data, ``{}`` where that is a function of the step.

        Raises:
            UserError: the checkpoint is damaged, or that of a run that trains other parts.
        """
        position = self.world.together(lambda: self._load(checkpoint))
        steps = set(self.world.gather(self.step))
        if len(steps) > 1:
            self.world.fail(f"{checkpoint}: the processes read different steps, {sorted(steps)}")
        return position

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        checkpoints.read_meta(checkpoint)
        check_same_parts(self.config, checkpoint, is_stream=bool(self.dataset.state_dict()))
        state = self.state_dict() | {"data": checkpoints.stored_values(checkpoint, "data")}
        if self._own_balance is not None and self._own_balance not in checkpoints.stored_names(checkpoint):
            del state[self._own_balance]  # saved by fewer processes: another one's will do
        checkpoints.load_state(checkpoint, state)
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        if self._own_balance in state:
            self.objective.load_state_dict({"balance.weight": state[self._own_balance]}, strict=False)
        self.averages.load_state_dict(state["ema"])
        set_optimizer_state_dict(self.trained, self.optimizers, state["optimizer"])
        if self.discriminator_optimizer is not None:
            set_optimizer_state_dict(
                self.objective.discriminator, self.discriminator_optimizer, state["discriminator_optimizer"]
            )
        self._set_options()
        self.skipped.copy_(state["skipped"])
        self.step = state["step"]
        return state["data"]

    def begin_from(self, path: str) -> None:
        """Takes the weights of another run, or of the public code, into the model and its averages.

        Raises:
            FileNotFoundError: nothing at ``path``.
            UserError: not a model, a damaged one, or one that fits in no way.
        """
        world, model, averages = self.world, self.model, self.averages
        class_names = tuple(getattr(self.dataset, "class_names", ()))
        source = world.in_turn("reading the weights to begin from", lambda: read_source(path, model))
        own = fresh_state(model)
        beginning = world.together(lambda: fit(source, model, own, averages.names, class_names))
        begin(model, averages, beginning)
        if world.is_main:
            print(beginning.told, flush=True)

    def _set_options(self) -> None:
        """Loading an optimizer brings its old options back; those of this configuration hold."""
        options = self.config.optimizer
        is_gate = {id(p) for p in self.gate_parameters}
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            if "betas" in group:
                group["betas"] = options.betas
            if id(group["params"][0]) not in is_gate:
                group["weight_decay"] = options.weight_decay
        if self.discriminator_optimizer is not None:
            for group in self.discriminator_optimizer.param_groups:
                group["lr"] = self.config.loss.adversarial_lr

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
            Loss terms, gradient norm and the share of gated samples: scalars on the device, of which those of
            all processes add up to the values of the batch.
        """
        step = self.step
        whole_t = self.draw_time(step)
        parts = self._parts(len(images))
        balance = self.objective.balance
        balances_first = balance is not None and balance.is_due(step) and len(parts) > 1
        if balances_first:  # by all parts, before the first one is weighted with it
            for part in parts:
                self._forward(images, condition, part, whole_t)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.discriminator_optimizer is not None:
            self.discriminator_optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        seen: list[tuple[int, dict[str, Tensor]]] = []
        for part in parts:
            found = self._forward(images, condition, part, whole_t, update_balance=not balances_first)
            sum_over_copies([self.model, self.objective.projector], part is parts[-1])
            found["loss"].backward()
            if "balance_weight" in found:  # not a share of anything, but logged as one
                found["balance_weight"] = found["balance_weight"] / (len(parts) * self.world.size)
            for name, value in found.items():
                terms[name] = terms[name] + value.detach() if name in terms else value.detach()
            seen.append((len(part), self.objective.per_sample))
        self._update(terms)
        self.step += 1
        self.guard.update(self.step, terms, _joined(seen))
        return terms

    def _parts(self, count: int) -> list[range]:
        """Places in this process's part of the batch that go through the model together."""
        size = count // self.config.train.micro_batches
        return [range(first, first + size) for first in range(0, count, size)]

    def _forward(
        self,
        images: Tensor,
        condition: Condition,
        part: range,
        whole_t: Tensor,
        *,
        update_balance: bool = True,
    ) -> dict[str, Tensor]:
        """The terms of some samples, as shares of the whole batch's; ``loss`` has the graph."""
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
        host_t = whole_t[first : first + len(part)]
        t = to_device(host_t, self.device)
        model = self.model
        tokens, clean = model.ops.noise_patchify(
            images,
            t,
            model.config.patch_size,
            seed=config.seed,
            step=step,
            sample_index=index,
            noise_scale=config.time.noise_scale,
            channel_order=model.input_order,
            return_clean=True,
            clean_channel_order=model.output_order,
            dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
        )
        is_dropped = uniform(LABEL_DROP_STREAM) < config.optimizer.label_drop
        condition = dropped(condition, model.null(condition), is_dropped)
        P = model.config.patch_size
        grid = (images.shape[2] // P, images.shape[3] // P)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            output, features = model.forward_tokens(tokens, grid, t, condition, self.feature_layer)
            return self.objective(
                output if model.prediction == "x" else self._x_pred(output, tokens, t),
                clean,
                t,
                features,
                step=step,
                balance_parameter=model.balance_weight(),
                host_t=host_t,
                whole_t=whole_t,
                update_balance=update_balance,
            )

    def _x_pred(self, velocity: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        """The clean patches that a velocity leads to, (B, T, P*P*channels) in the order of the output."""
        model = self.model
        if model.input_order != model.output_order:
            P, side = model.config.patch_size, self.config.data.image_size
            image = model.ops.unpatchify(tokens, P, (side, side), channel_order=model.input_order)
            tokens = model.ops.patchify(image, P, channel_order=model.output_order)
        return x_from_velocity(velocity.float(), tokens.float(), t)

    def _update(self, terms: dict[str, Tensor]) -> None:
        """Clips, steps the optimizers, moves the averages; adds the gradient norm to the terms."""
        config, step = self.config, self.step
        self.world.sum_gradients(self.gate_parameters)
        norm = clip_gradients(self.parameters, config.optimizer.max_grad_norm)
        terms["grad_norm"] = norm / self.world.size
        lr = learning_rate(config, step)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        if config.optimizer.skip_grad_norm is not None:
            is_spike = norm > config.optimizer.skip_grad_norm
            self.skipped += is_spike
            for optimizer in self.optimizers:
                # What a gradient scaler sets: the fused step reads it on the device and then changes nothing.
                optimizer.found_inf = is_spike.float()  # type: ignore[attr-defined]
        with implicit_replication():
            for optimizer in self.optimizers:
                optimizer.step()
        if (
            self.discriminator_optimizer is not None and "discriminator" in terms
        ):  # in all processes or in none
            self.world.sum_gradients(self.discriminator_parameters)
            norm = clip_gradients(self.discriminator_parameters, config.optimizer.max_grad_norm)
            terms["discriminator_grad_norm"] = norm / self.world.size
            self.discriminator_optimizer.step()
        self.averages.update(self.model)

    @property
    def feature_layer(self) -> int | None:
        """The block whose input REPA aligns; None while its weight is zero."""
        is_aligned = self.objective.alignment_weight(self.step) > 0
        return self.config.loss.alignment_layer if is_aligned else None

    # --- what a run shows ---

    def describe_sample(self, step: int, place: int) -> str:
        """A sample of the batch of a step, from 0: its place, its image and its t."""
        t = float(self.draw_time(step)[place])
        share = Share(self.config.train.batch_size, self.config.seed)
        name = self.dataset.name(int(self.dataset.order(step, share)[place]))
        return f"{place} (t {t:.4g})" if name is None else f"{place} ({name}, t {t:.4g})"

    def sample_grid(self) -> Tensor:
        """Samples of the first average, (N, C, H, W) uint8: a row for each of up to ten classes.

        Their noise is fixed. All processes draw a part and get the whole.
        """
        pipeline = Pipeline(
            self.model,
            self.config.sample,
            t_eps=self.config.time.t_eps,
            noise_scale=self.config.time.noise_scale,
            dtype=self.config.dtype,
        )
        num_classes = self.model.config.num_classes
        rows = min(GRID_ROWS, num_classes)
        classes = [row * num_classes // rows for row in range(rows)]
        labels = [label for label in classes for _ in range(GRID_COLUMNS)]
        share = -(-len(labels) // self.world.size)
        first = self.world.rank * share
        own = [labels[place % len(labels)] for place in range(first, first + share)]
        with self.averages.exchanged(self.model, self.averages.names[0]):
            self.model.eval()
            images = pipeline.sample(own, seed=self.config.seed, first_index=first)
            self.model.train()
        return self.world.gather_rows(images.to(self.device)).cpu()[: len(labels)]


def _joined(seen: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The values per sample of all parts; zeros where a part did not compute a term."""
    if len(seen) == 1:
        return seen[0][1]
    some = {name: value for _, values in seen for name, value in values.items()}
    return {
        name: torch.cat([values.get(name, like.new_zeros(count)) for count, values in seen])
        for name, like in some.items()
    }
