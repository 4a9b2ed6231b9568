"""The training loop. Read aloud, ``train_step`` is the paper's algorithm box (arXiv 2602.02493)."""

from __future__ import annotations

import math
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pixelgen_kernels import philox_normal, philox_uniform
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from pixelgen import checkpoint as checkpoints
from pixelgen.config import TrainConfig, config_from_yaml, config_to_yaml
from pixelgen.data.loader import ImageDataset, build_dataset, build_loader, stream_indices
from pixelgen.ema import Ema
from pixelgen.errors import UserError
from pixelgen.flow import logit_normal_time, shift_time
from pixelgen.guard import FiniteGuard
from pixelgen.losses.build import build_objective
from pixelgen.losses.gate import to_device
from pixelgen.models.jit import JiT
from pixelgen.optim import adamw
from pixelgen.pipeline import Pipeline, count_parameters, pick_device
from pixelgen.trainlog import METRICS_FILE, TrainLog, truncate_metrics

# Streams of the counter-based generator: one per random draw of a step (0 is the noise of noise_patchify).
TIME_STREAM, LABEL_DROP_STREAM, FLIP_STREAM = 1, 2, 3
GRID_ROWS, GRID_COLUMNS = 10, 8


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step ``step``, from 0: linear warm-up, then constant, or cosine down to zero."""
    optimizer = config.optimizer
    warm = min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
    if optimizer.schedule == "cosine":
        remaining = max(1, config.train.max_steps - optimizer.warmup_steps)
        progress = min(1.0, max(0, step - optimizer.warmup_steps) / remaining)
        return optimizer.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.lr * warm


def _check_same_parts(config: TrainConfig, checkpoint: Path) -> None:
    """What a run trains is settled when it starts; weights and schedules may change at a resume.

    Raises:
        UserError: an option would add or remove something that the checkpoint does or does not hold.
    """
    saved = config_from_yaml((checkpoint / checkpoints.CONFIG_FILE).read_text(), str(checkpoint))

    def parts(config: TrainConfig) -> dict[str, object]:
        loss = config.loss
        return {
            "model": config.model_config(),
            "loss.alignment_weight or its schedule": loss.uses_alignment,
            "loss.projector_width": loss.uses_alignment and loss.projector_width,
            "loss.gate": loss.gate == "learned",
            "loss.balance": loss.balance != "off",
            "loss.adversarial_weight": loss.adversarial_weight > 0,
            "loss.tokens": (loss.uses_alignment or loss.adversarial_weight > 0) and loss.tokens,
        }

    before, now = parts(saved), parts(config)
    changed = [name for name in now if now[name] != before[name]]
    if changed:
        raise UserError(
            f"{changed[0]} cannot change so at a resume: {checkpoint} was saved by a run that trained other "
            f"parts; start a new run"
        )


def _build_dataset(config: TrainConfig) -> ImageDataset:
    data = config.data
    return build_dataset(
        data.name,
        path=data.path,
        image_size=data.image_size,
        channels=data.channels,
        num_classes=data.num_classes,
    )


class Trainer:
    """Model, objective, optimizer, EMA and data of one run.

    Args:
        config: the resolved configuration.
        run_dir: an existing folder; everything the run writes lands there.
        dataset: the images.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, dataset: ImageDataset) -> None:
        self.config, self.run_dir = config, run_dir
        self.device = pick_device(config.device)
        torch.manual_seed(config.seed)  # initialisation
        self.step = 0
        self._saved_step: int | None = None
        self.stop_signal: int | None = None
        self.dataset = dataset
        self.model = JiT(config.model_config(), config.kernels).to(self.device)
        self.objective = build_objective(
            config.loss,
            self.model.config,
            run_dir=run_dir,
            images=self._images_for_features,
            t_eps=config.time.t_eps,
            seed=config.seed,
            kernels=config.kernels,
        ).to(self.device)
        is_half = config.dtype == "bfloat16" and self.device.type == "cuda"
        self.objective.speed_up_networks(half=is_half, compiled=config.loss.compile_networks)
        self.trained = nn.ModuleDict(
            {"model": self.model, "projector": self.objective.projector, "gate": self.objective.gate}
        )
        self.parameters = [p for p in self.trained.parameters() if p.requires_grad]
        # Decay would pull the gate's learned weights to 1.
        is_gate = {id(p) for p in self.objective.gate.parameters()}
        self.optimizer = adamw(
            [
                {"params": [p for p in self.parameters if id(p) not in is_gate]},
                {"params": [p for p in self.parameters if id(p) in is_gate], "weight_decay": 0.0},
            ],
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )
        # Of its own: the discriminator works against the denoiser, and other constants suit it.
        self.discriminator_optimizer: torch.optim.AdamW | None = None
        if config.loss.adversarial_weight > 0:
            self.discriminator_optimizer = adamw(
                [{"params": self.objective.discriminator.parameters()}],
                lr=config.loss.adversarial_lr,
                betas=(0.0, 0.99),
                weight_decay=0.0,
            )
        self.guard = FiniteGuard(self.device)
        self.ema = Ema(self.model, config.ema.decay, config.ema.warmup)
        if config.compile:
            self.model.compile_blocks()

    def _images_for_features(self) -> tuple[Tensor, Tensor]:
        """Up to 4096 images of the data set, evenly spaced, for features trained on the run's own images."""
        count = min(len(self.dataset), 4096)
        print(f"training embedded features on {count:,} images", flush=True)
        return self.dataset.batch([i * len(self.dataset) // count for i in range(count)])

    # --- starting and resuming ---

    @classmethod
    def start(cls, config: TrainConfig) -> Trainer:
        """A new run in a new folder; an existing folder is never reused.

        Raises:
            UserError: the folder exists, or the data cannot be used.
        """
        run_dir = Path(config.out_dir) / str(config.name)
        if run_dir.exists():
            raise UserError(
                f"{run_dir} exists already; continue it with --resume {run_dir} or choose another --name"
            )
        dataset = _build_dataset(config)  # a wrong path must not leave an empty run behind
        run_dir.mkdir(parents=True)
        try:
            return cls(config, run_dir, dataset)
        except BaseException:  # whatever it was, also Ctrl-C: a folder without a run would block its name
            shutil.rmtree(run_dir)
            raise

    @classmethod
    def resume(cls, path: str, config: TrainConfig) -> Trainer:
        """Continues a run from its newest checkpoint, or the checkpoint given, bit for bit.

        Args:
            path: ``runs/NAME`` or one of its checkpoints.
            config: the run's configuration, with or without changes such as a larger ``train.max_steps``.

        Raises:
            FileNotFoundError: nothing at ``path``.
            UserError: no checkpoint there, or not the newest one of its run.
        """
        checkpoint = checkpoints.find_checkpoint(path)
        run_dir = checkpoint.resolve().parent.parent
        found = checkpoints.list_checkpoints(run_dir)
        if checkpoint.resolve() not in found:
            raise UserError(f"{checkpoint} is not inside a run (runs/NAME/checkpoints); put it into one")
        if checkpoint.resolve() != found[-1]:
            raise UserError(
                f"{checkpoint} is not the newest checkpoint of its run, {found[-1].name} is: remove the "
                f"later ones first, or work on a copy of the run's folder"
            )
        _check_same_parts(config, checkpoint)
        trainer = cls(config, run_dir, _build_dataset(config))
        trainer._load(checkpoint)
        return trainer

    def _state(self) -> dict[str, Any]:
        state = {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": get_optimizer_state_dict(self.trained, self.optimizer),
            "step": self.step,
        }
        if self.discriminator_optimizer is not None:
            state["discriminator_optimizer"] = get_optimizer_state_dict(
                self.objective.discriminator, self.discriminator_optimizer
            )
        return state

    def save(self) -> Path:
        """Writes a checkpoint of the current step."""
        folder = checkpoints.save_checkpoint(
            self.run_dir,
            self.step,
            self._state(),
            self.ema.model.state_dict(),
            config_to_yaml(self.config),
            self.config.train.keep_checkpoints,
        )
        self._saved_step = self.step
        return folder

    def _load(self, checkpoint: Path) -> None:
        state = self._state()
        checkpoints.load_state(checkpoint, state)
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        self.ema.load_state_dict(state["ema"])
        set_optimizer_state_dict(self.trained, self.optimizer, state["optimizer"])
        if self.discriminator_optimizer is not None:
            set_optimizer_state_dict(
                self.objective.discriminator,
                self.discriminator_optimizer,
                state["discriminator_optimizer"],
            )
        self.step = self._saved_step = state["step"]
        truncate_metrics(self.run_dir / METRICS_FILE, self.step)

    # --- one step ---

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            images: (B, C, H, W) uint8 on the device.
            labels: (B,) int64 on the device.

        Returns:
            Loss terms, gradient norm and the share of gated samples: scalars on the device.
        """
        config, step = self.config, self.step
        index = torch.arange(len(labels), device=self.device)
        torch.manual_seed(
            (config.seed * 2**32 + step) % 2**63
        )  # dropout: not counter-based, so seeded per step

        def uniform(stream: int, index: Tensor = index) -> Tensor:
            return philox_uniform(config.seed, step, index, 1, stream=stream)[:, 0]

        if config.data.flip:
            flipped = uniform(FLIP_STREAM) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        # Drawn on the host, which so knows which samples pass the noise gate without asking the device.
        host_index = torch.arange(len(labels))
        if config.time.distribution == "logit_normal":
            draw = philox_normal(config.seed, step, host_index, 1, stream=TIME_STREAM)[:, 0]
            host_t = logit_normal_time(draw, config.time.mean, config.time.std)
        else:
            host_t = uniform(TIME_STREAM, host_index)
        host_t = shift_time(host_t, config.time.timeshift)
        t = to_device(host_t, self.device)
        tokens, clean = self.model.ops.noise_patchify(
            images,
            t,
            self.model.config.patch_size,
            seed=config.seed,
            step=step,
            sample_index=index,
            noise_scale=config.time.noise_scale,
            channel_order="first",
            return_clean=True,
            clean_channel_order="last",
            dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
        )
        is_dropped = uniform(LABEL_DROP_STREAM) < config.optimizer.label_drop
        labels = torch.where(is_dropped, self.model.config.num_classes, labels)

        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            x_pred, features = self.model.forward_tokens(tokens, t, labels, self.feature_layer)
            terms = self.objective(
                x_pred,
                clean,
                t,
                features,
                step=step,
                balance_parameter=self.model.final_layer.linear.weight,
                host_t=host_t,
            )
        self.optimizer.zero_grad(set_to_none=True)
        if self.discriminator_optimizer is not None:
            self.discriminator_optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        max_norm = config.optimizer.max_grad_norm or math.inf
        terms["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters, max_norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        self.optimizer.step()
        if self.discriminator_optimizer is not None and "discriminator" in terms:
            parameters = self.objective.discriminator.parameters()
            terms["discriminator_grad_norm"] = nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
            self.discriminator_optimizer.step()
        self.ema.update(self.model)
        self.step += 1
        self.guard.update(self.step, terms, self.objective.per_sample)
        return {name: value.detach() for name, value in terms.items()}

    @property
    def feature_layer(self) -> int | None:
        """The block whose input REPA aligns; None while its weight is zero."""
        is_aligned = self.objective.alignment_weight(self.step) > 0
        return self.config.loss.alignment_layer if is_aligned else None

    # --- the loop ---

    def train(self) -> int:
        """Trains to ``train.max_steps``, or until SIGINT or SIGTERM, which save first.

        Returns:
            0, or 128 + the signal's number when stopped by one.

        Raises:
            UserError: a loss that is not finite.
        """
        config = self.config
        print(config_to_yaml(config))
        print(f"{self.run_dir}: {count_parameters(self.model):,} parameters on {self.device}, ", end="")
        print(f"{len(self.dataset):,} images, step {self.step} of {config.train.max_steps}", flush=True)
        if self.step >= config.train.max_steps:
            print(f"nothing to do: train.max_steps is {config.train.max_steps}")
            return 0
        # Again after a resume: what the next one reads is the configuration with the changes of this one.
        (self.run_dir / checkpoints.CONFIG_FILE).write_text(config_to_yaml(config))
        batches = build_loader(
            self.dataset,
            config.train.batch_size,
            seed=config.seed,
            start_step=self.step,
            num_workers=config.data.workers,
            pin_memory=self.device.type == "cuda",
        )
        log = TrainLog(self.run_dir, config, self.step, self.guard, self._image_name)
        try:
            with self._signals():
                self._loop(batches, log)
        finally:
            batches.close()
            log.close()
        if self.stop_signal is not None:
            print(f"stopped by signal {self.stop_signal}; continue with --resume {self.run_dir}")
            return 128 + self.stop_signal
        minutes = log.seconds / 60
        print(f"trained to step {self.step} in {minutes:.1f} min; sample with: ", end="")
        print(f"python -m pixelgen.sample --model {self.run_dir}")
        return 0

    def _image_name(self, step: int, place: int) -> str:
        index = stream_indices(
            step,
            dataset_size=len(self.dataset),
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
        )[place]
        return self.dataset.name(int(index))

    def _loop(self, batches: Iterator[tuple[Tensor, Tensor]], log: TrainLog) -> None:
        train = self.config.train
        while self.step < train.max_steps and self.stop_signal is None:
            images, labels = next(batches)
            terms = self.train_step(
                images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            )
            log.add(terms)
            if self.step % train.log_every == 0:
                log.write(self.step, learning_rate(self.config, self.step - 1))
            if train.checkpoint_every and self.step % train.checkpoint_every == 0:
                self._save(log)
            if train.sample_every and self.step % train.sample_every == 0:
                self._draw(log)
        # Here and not in the loop: a signal may have arrived at any point of the last iteration.
        self._save(log)
        if self.stop_signal is None and train.sample_every and self.step % train.sample_every:
            self._draw(log)

    def _save(self, log: TrainLog) -> None:
        """A checkpoint of this step, unless there is one; refuses a loss that is not finite."""
        if self._saved_step == self.step:
            return
        log.write(self.step, learning_rate(self.config, self.step - 1))
        with log.paused():
            self.save()
            log.curves()

    def _draw(self, log: TrainLog) -> None:
        with log.paused():
            log.image(self.step, self.sample_grid(), GRID_COLUMNS)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM finishes the step, saves and leaves; the second acts at once."""
        previous: dict[int, Any] = {}

        def on_signal(number: int, _frame: object) -> None:
            self.stop_signal = number
            for which, handler in previous.items():
                signal.signal(which, handler)
            print(f"\nsignal {number}: saving after this step; once more to leave at once", file=sys.stderr)

        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, on_signal)
        try:
            yield
        finally:
            for which, handler in previous.items():
                signal.signal(which, handler)

    def sample_grid(self) -> Tensor:
        """EMA samples from fixed noise, (N, C, H, W) uint8: a row for each of up to ten classes."""
        pipeline = Pipeline(
            self.ema.model,
            self.config.sample,
            t_eps=self.config.time.t_eps,
            noise_scale=self.config.time.noise_scale,
            dtype=self.config.dtype,
        )
        num_classes = self.model.config.num_classes
        rows = min(GRID_ROWS, num_classes)
        classes = [row * num_classes // rows for row in range(rows)]
        return pipeline.sample(
            [label for label in classes for _ in range(GRID_COLUMNS)], seed=self.config.seed
        )
