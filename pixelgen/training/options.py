"""The sections of a configuration that say how training goes. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pixelgen.options import Section


@dataclass(frozen=True, kw_only=True)
class TimeConfig(Section):
    """How training draws t and noise; t = 0 is noise, t = 1 is data, x_t = t x + (1 - t) noise.

    Args:
        distribution: logit_normal draws t = sigmoid(mean + std * normal); uniform draws it from [0, 1].
        mean: mean of the normal in logit_normal; below 0 favours noisy images.
        std: its standard deviation.
        timeshift: t becomes t / (t + (1 - t) * timeshift); above 1 favours noisy images.
        t_eps: floor of 1 - t where the velocity is formed, in training and in sampling; a model that predicts
            the velocity itself has none.
        noise_scale: standard deviation of the noise, in training and in sampling.
    """

    SECTION = "time."

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = -0.8
    std: float = 0.8
    timeshift: float = 1.0
    t_eps: float = 0.05
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        self._require_choices()
        self._require("std", self.std > 0, "be above 0")
        self._require("timeshift", 0 < self.timeshift < math.inf, "be a finite number above 0")
        self._require("t_eps", 0 < self.t_eps < 1, "lie between 0 and 1")
        self._require("noise_scale", self.noise_scale > 0, "be above 0")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """Optimizer, its learning rate over the steps, and label dropout.

    Args:
        name: adamw; or muon for the matrices of the blocks, with AdamW for all else, and steps as large as
            AdamW's, so that lr means the same.
        lr: highest learning rate.
        lr_changes: changes of the learning rate, as pairs of a step and the rate from it on; for example
            [[800000, 1e-5]]. Warm-up concerns lr alone; not with schedule cosine.
        betas: decay of AdamW's two averages.
        weight_decay: decoupled weight decay; 0 for none.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        schedule: after warm-up, constant, or cosine down to 0 at train.max_steps.
        max_grad_norm: the gradient is scaled down to this norm; null for no clipping.
        skip_grad_norm: a step whose gradient has a larger finite norm is skipped and counted; null for none.
        label_drop: probability of training with the null label, which guidance needs.
    """

    SECTION = "optimizer."

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-3
    lr_changes: tuple[tuple[int, float], ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    max_grad_norm: float | None = 1.0
    skip_grad_norm: float | None = None
    label_drop: float = 0.1

    def __post_init__(self) -> None:
        self._require_choices()
        self._require("lr", self.lr > 0, "be above 0")
        steps = [step for step, _ in self.lr_changes]
        is_valid = steps == sorted(set(steps)) and all(
            step >= 0 and rate > 0 for step, rate in self.lr_changes
        )
        self._require("lr_changes", is_valid, "have rising steps and rates above 0")
        is_valid = not self.lr_changes or self.schedule == "constant"
        self._require("lr_changes", is_valid, f"be empty with optimizer.schedule {self.schedule}")
        self._require("betas", all(0 <= beta < 1 for beta in self.betas), "lie in [0, 1)")
        self._require("weight_decay", self.weight_decay >= 0, "be 0 or more")
        self._require("warmup_steps", self.warmup_steps >= 0, "be 0 or more")
        clip = self.max_grad_norm
        self._require("max_grad_norm", clip is None or clip > 0, "be above 0, or null for no clipping")
        limit = self.skip_grad_norm
        self._require("skip_grad_norm", limit is None or limit > 0, "be above 0, or null for no limit")
        can_skip = limit is None or self.name == "adamw"
        self._require("skip_grad_norm", can_skip, f"be null with optimizer.name {self.name}")
        self._require("label_drop", 0 <= self.label_drop <= 1, "lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class EmaConfig(Section):
    """Averaged weights, which sampling uses.

    Args:
        decay: decay of the average, or a list of decays of as many averages, such as [0.9999, 0.9996]. The
            first one draws the run's sample grids and is what sampling takes by default.
        power: relative widths of more averages whose profile is a power of the step, such as [0.05, 0.1]:
            they need no tuning to the length of the run.
        warmup: use min(decay, (1 + step) / (10 + step)), so that short runs forget their first steps.
    """

    SECTION = "ema."

    decay: float | tuple[float, ...] = 0.999
    power: tuple[float, ...] = ()
    warmup: bool = True

    @property
    def decays(self) -> tuple[float, ...]:
        """The decays as a tuple."""
        return self.decay if isinstance(self.decay, tuple) else (self.decay,)

    def __post_init__(self) -> None:
        is_valid = bool(self.decays) and all(0 <= decay < 1 for decay in self.decays)
        self._require("decay", is_valid, "lie in [0, 1), or be a list of such decays")
        self._require("decay", len(set(self.decays)) == len(self.decays), "be different decays")
        is_valid = all(0 < width < 0.28 for width in self.power)
        self._require("power", is_valid, "be widths in (0, 0.28)")
        self._require("power", len(set(self.power)) == len(self.power), "be different widths")


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Section):
    """Length of the run and what it writes on the way.

    Args:
        batch_size: images per step, of all processes together.
        micro_batches: parts of a process's share of the batch that go through the model one after the other;
            more of them need less memory and change nothing else.
        activation_checkpointing: what the backward pass computes again instead of keeping it: none, selective
            (all but matrix products and attention), or full (whole blocks).
        max_steps: optimizer steps of the whole run.
        log_every: steps between log lines.
        sample_every: steps between sample grids; 0 for none.
        checkpoint_every: steps between checkpoints; 0 for one at the end only.
        keep_checkpoints: how many of the newest checkpoints stay on disk; 0 keeps all.
        keep_every: checkpoints of steps that this divides stay on disk too; 0 for none.
        wandb: log to Weights & Biases as well.
    """

    SECTION = "train."

    batch_size: int = 48
    micro_batches: int = 1
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    max_steps: int = 3200
    log_every: int = 50
    sample_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_every: int = 0
    wandb: bool = False

    def __post_init__(self) -> None:
        self._require_choices()
        for name in ("batch_size", "micro_batches", "max_steps", "log_every"):
            self._require(name, getattr(self, name) >= 1, "be at least 1")
        for name in ("sample_every", "checkpoint_every", "keep_checkpoints", "keep_every"):
            self._require(name, getattr(self, name) >= 0, "be 0 or more")
        divides = self.batch_size % self.micro_batches == 0
        self._require("batch_size", divides, f"be a multiple of train.micro_batches {self.micro_batches}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How several processes share the work; without effect in a single one.

    Args:
        mode: ddp keeps all weights in every process, fsdp shards them over all, hsdp over the processes of a
            node; auto is ddp for models below 200 million parameters, else fsdp, or hsdp on several nodes.
        shard_size: for hsdp, processes that share one copy of the weights; null for those of a node.
        reshard_after_forward: give gathered weights up after a block's forward pass and gather them again for
            the backward pass; false needs more memory and less communication.
        prefetch: blocks whose weights are gathered ahead.
        timeout_s: seconds after which a run without progress ends and names the processes that hang.
    """

    SECTION = "parallel."

    mode: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    shard_size: int | None = None
    reshard_after_forward: bool = True
    prefetch: int = 1
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        self._require_choices()
        is_valid = self.shard_size is None or (self.mode == "hsdp" and self.shard_size >= 1)
        self._require("shard_size", is_valid, "be at least 1, and null unless parallel.mode is hsdp")
        self._require("prefetch", self.prefetch >= 1, "be at least 1")
        self._require("timeout_s", self.timeout_s > 0, "be above 0")
