"""Sections of a training run's configuration. Their defaults are the preset ``digits``. Imports no torch."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import ClassVar, Literal

from pixelgen.errors import UserError


class Section:
    """Checks that need no more than the section itself; messages name the option, as the user spells it."""

    SECTION: ClassVar[str] = ""

    def _require(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            value = getattr(self, name)
            raise UserError(f"{self.SECTION}{name} must {expected}, got {value!r}")

    def _require_choices(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is Literal:
                choices = typing.get_args(hint)
                self._require(name, getattr(self, name) in choices, f"be one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What to train on.

    Args:
        name: digits is the embedded set of 1,797 real 8x8 images; folder reads one sub-folder per class;
            prepared reads what pixelgen.data.prepare wrote; hf is a data set of the Hugging Face library;
            synthetic is noise that costs no reading, to measure the rest.
        path: for folder the folder of class folders, for prepared the folder that prepare wrote, for hf a hub
            id, or a folder or pattern of parquet files, webdataset tars or images.
        subset: for hf, name of the data set's configuration, where it has several.
        split: for hf, the split.
        image_column: for hf, the column of the images; null finds it.
        label_column: for hf, the column of the class numbers; null finds it.
        streaming: for hf, read the data set as a stream instead of downloading it first.
        shuffle_block: for streaming, images that are shuffled among each other.
        image_size: side of the square images in pixels.
        channels: 1 for grey, 3 for RGB.
        num_classes: number of classes; the model has one more, the null label.
        crop: center cuts the middle square exactly as ADM does; fast is within 2 grey levels of it; random
            cuts a square at random, of 80 % of the short side or more.
        flip: mirror every other image at random. Digits and letters must not be mirrored.
        workers: processes that read images; 0 reads in the training process.
        max_broken: images that cannot be read are replaced by others and reported; above this share of the
            images drawn, the run stops.
    """

    SECTION = "data."

    name: Literal["digits", "folder", "prepared", "hf", "synthetic"] = "digits"
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool = False
    shuffle_block: int = 10_000
    image_size: int = 8
    channels: int = 1
    num_classes: int = 10
    crop: Literal["center", "fast", "random"] = "center"
    flip: bool = False
    workers: int = 0
    max_broken: float = 0.01

    def __post_init__(self) -> None:
        self._require_choices()
        self._require("image_size", self.image_size >= 1, "be at least 1")
        self._require("channels", self.channels in (1, 3), "be 1 (grey) or 3 (RGB)")
        self._require("num_classes", self.num_classes >= 1, "be at least 1")
        self._require("workers", self.workers >= 0, "be 0 or more")
        self._require("shuffle_block", self.shuffle_block >= 1, "be at least 1")
        self._require("max_broken", 0 <= self.max_broken <= 1, "lie in [0, 1]")
        is_stream = not self.streaming or self.name == "hf"
        self._require("streaming", is_stream, f"be false for data.name {self.name}: only hf can be streamed")
        has_files = self.crop == "center" or self.name in ("folder", "hf")
        self._require("crop", has_files, f"be center for data.name {self.name}: its images have their size")


@dataclass(frozen=True, kw_only=True)
class TimeConfig(Section):
    """How training draws t and noise; t = 0 is noise, t = 1 is data, x_t = t x + (1 - t) noise.

    Args:
        distribution: logit_normal draws t = sigmoid(mean + std * normal); uniform draws it from [0, 1].
        mean: mean of the normal in logit_normal; below 0 favours noisy images.
        std: its standard deviation.
        timeshift: t becomes t / (t + (1 - t) * timeshift); above 1 favours noisy images.
        t_eps: floor of 1 - t where the velocity is formed, in training and in sampling.
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
        self._require("timeshift", self.timeshift > 0, "be above 0")
        self._require("t_eps", 0 < self.t_eps < 1, "lie between 0 and 1")
        self._require("noise_scale", self.noise_scale > 0, "be above 0")


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Terms added to the flow-matching loss (arXiv 2602.02493). A weight of 0 leaves a term out.

    Args:
        alignment_weight: weight of the alignment of the denoiser's features with the token network's (REPA).
        alignment_schedule: changes of that weight, as pairs of a step and the weight from it on; for example
            [[100000, 0.1], [200000, 0]]. Alignment helps early and can hurt late.
        alignment_layer: number of blocks after which the denoiser's features are taken.
        projector_width: inner width of the projector between the two.
        lpips_weight: weight of LPIPS between prediction and image.
        p_dino_weight: weight of P-DINO, one minus the cosine of the patch tokens of prediction and image.
        gate: how the two perceptual terms depend on t: hard acts fully where t >= gate_t; cosine and sigmoid
            rise smoothly there, snr follows the share of signal in x_t, learned has a weight per bin of t.
        gate_t: the threshold of the gate; 0 for everywhere.
        gate_width: width in t of the rise of cosine, which begins at gate_t, and sigmoid, centred there.
        p_dino_gate: paper gates P-DINO per sample; released gates whole batches, as the published code.
        perceptual_ratio: factor of the sum of the two perceptual terms.
        balance: off, or a factor of that sum from a ratio of gradient norms at the last layer: global over
            all ranks, or released as the published code, on each rank alone.
        balance_start_step: first step at which balance acts.
        balance_every: steps between its updates.
        stages: network whose stages LPIPS compares; embedded is trained on the run's own images in seconds.
        stages_weights: pretrained, random, or the path of a file with the weights of vgg16.
        tokens: network whose patch tokens P-DINO and the alignment use; embedded as for stages.
        tokens_weights: pretrained, random, or the path of a file with the weights of the DINOv2.
        p_dino_layer: the DINOv2's layer, counted from 1, whose tokens are read; null for the last.
        compile_networks: compile the frozen networks with torch.compile.
        adversarial_weight: experimental: weight of a discriminator's judgement of the predicted tokens.
        adversarial_start_step: first step of the adversarial term.
        adversarial_lr: learning rate of the discriminator.
        adversarial_r1_weight: weight of the discriminator's gradient penalty R1.
    """

    SECTION = "loss."

    alignment_weight: float = 0.5
    alignment_schedule: tuple[tuple[int, float], ...] = ()
    alignment_layer: int = 2
    projector_width: int = 64
    lpips_weight: float = 0.1
    p_dino_weight: float = 0.01
    gate: Literal["hard", "cosine", "sigmoid", "snr", "learned"] = "hard"
    gate_t: float = 0.3
    gate_width: float = 0.2
    p_dino_gate: Literal["paper", "released"] = "paper"
    perceptual_ratio: float = 1.0
    balance: Literal["off", "global", "released"] = "off"
    balance_start_step: int = 400_000
    balance_every: int = 50
    stages: Literal["embedded", "vgg16"] = "embedded"
    stages_weights: str = "pretrained"
    tokens: Literal["embedded", "dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14"] = (
        "embedded"
    )
    tokens_weights: str = "pretrained"
    p_dino_layer: int | None = None
    compile_networks: bool = False
    adversarial_weight: float = 0.0
    adversarial_start_step: int = 0
    adversarial_lr: float = 1e-3
    adversarial_r1_weight: float = 1.0

    @property
    def uses_alignment(self) -> bool:
        """Whether the alignment has a weight at any step."""
        return self.alignment_weight > 0 or any(weight > 0 for _, weight in self.alignment_schedule)

    def __post_init__(self) -> None:
        self._require_choices()
        for name in (
            "alignment_weight",
            "lpips_weight",
            "p_dino_weight",
            "perceptual_ratio",
            "adversarial_weight",
            "adversarial_start_step",
            "adversarial_r1_weight",
        ):
            self._require(name, getattr(self, name) >= 0, "be 0 or more")
        steps = [step for step, _ in self.alignment_schedule]
        is_schedule = steps == sorted(set(steps)) and all(
            step >= 0 and weight >= 0 for step, weight in self.alignment_schedule
        )
        self._require("alignment_schedule", is_schedule, "have rising steps and weights of 0 or more")
        is_plain = self.p_dino_gate == "paper" or self.gate == "hard"
        self._require(
            "p_dino_gate", is_plain, f"be paper with loss.gate {self.gate}: released knows only hard"
        )
        self._require("gate_width", self.gate_width > 0, "be above 0")
        self._require("adversarial_lr", self.adversarial_lr > 0, "be above 0")
        self._require("gate_t", 0 <= self.gate_t <= 1, "lie in [0, 1]")
        self._require("projector_width", self.projector_width >= 1, "be at least 1")
        self._require("balance_start_step", self.balance_start_step >= 0, "be 0 or more")
        self._require("balance_every", self.balance_every >= 1, "be at least 1")
        self._require("p_dino_layer", self.p_dino_layer is None or self.p_dino_layer >= 1, "be at least 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """Optimizer, its learning rate over the steps, and label dropout.

    Args:
        name: adamw; or muon for the matrices of the blocks, with AdamW for all else, and steps as large as
            AdamW's, so that lr means the same.
        lr: highest learning rate.
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


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Section):
    """How images are drawn: the grids of the run, and the defaults of pixelgen.sample.

    Args:
        sampler: euler, heun (two evaluations a step), heun-reuse (one), or adams (second order, one).
        steps: solver steps.
        guidance: scale of classifier-free guidance; 1 for none.
        guidance_low: guidance acts from this t on.
        guidance_high: guidance acts up to this t.
        guidance_rule: paper decides on the t of the evaluation; released on the t at which the step began.
        timeshift: t becomes t / (t + (1 - t) * timeshift); above 1 spends more steps near the noise.
    """

    SECTION = "sample."

    sampler: Literal["euler", "heun", "heun-reuse", "adams"] = "heun"
    steps: int = 25
    guidance: float = 2.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guidance_rule: Literal["paper", "released"] = "paper"
    timeshift: float = 1.0

    def __post_init__(self) -> None:
        self._require_choices()
        self._require("steps", self.steps >= 1, "be at least 1")
        self._require("guidance", self.guidance >= 0, "be 0 or more")
        self._require("guidance_low", 0 <= self.guidance_low <= 1, "lie in [0, 1]")
        self._require("guidance_high", self.guidance_high <= 1, "lie in [0, 1]")
        above = self.guidance_low < self.guidance_high
        self._require("guidance_high", above, f"be above sample.guidance_low {self.guidance_low}")
        self._require("timeshift", self.timeshift > 0, "be above 0")
