"""What ``python -m pixelgen.train --plan`` prints: what a run needs and takes, without running it.

Formulas and what they leave out: docs/planning.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from typing import get_args

from pixelgen.config.train_config import TrainConfig
from pixelgen.models.layers import Checkpointing
from pixelgen.planning.devices import GIB, GPUS_PER_NODE, Machine, parse_machine, peak_flops
from pixelgen.planning.flops import expected_gate_share, schedule_edges, train_step_flops
from pixelgen.planning.memory import Layout, Parameters, count_parameters, resolve_layout, step_memory
from pixelgen.training.options import ParallelConfig

FEW_PARAMETERS = 10**6  # of a frozen network that is not worth a line
FEW_TOKENS = 2048  # with fewer in a pass, a GPU has too little to do
CHECKPOINTING = get_args(Checkpointing)


def remedy(config: TrainConfig, machine: Machine, parameters: Parameters) -> str | None:
    """The cheapest change that makes a run fit, as options; None where none does."""
    train, layout = config.train, resolve_layout(config, machine, parameters)
    kinds = CHECKPOINTING[CHECKPOINTING.index(train.activation_checkpointing) :]
    modes = [config.parallel.mode] if layout.shards == machine.gpus else [config.parallel.mode, "fsdp"]
    parts = [n for n in range(train.micro_batches, layout.images + 1) if layout.images % n == 0]
    found = []
    for mode, kind, micro_batches in product(modes, kinds, parts):
        candidate = replace(
            config,
            parallel=config.parallel if mode == modes[0] else ParallelConfig(mode="fsdp"),
            train=replace(train, micro_batches=micro_batches, activation_checkpointing=kind),
        )
        layout = resolve_layout(candidate, machine, parameters)
        if sum(step_memory(candidate, parameters, layout).values()) <= machine.memory:
            # Passes that fill the GPU first, then little to compute again, then little to send.
            missing = max(FEW_TOKENS - layout.images_per_pass * config.model_config().num_tokens, 0)
            cost = (missing, kinds.index(kind), modes.index(mode), micro_batches)
            options = [
                ("--parallel.mode", mode, modes[0]),
                ("--train.activation_checkpointing", kind, kinds[0]),
                ("--train.micro_batches", micro_batches, train.micro_batches),
            ]
            found.append((cost, " ".join(f"{name} {value}" for name, value, now in options if value != now)))
    return min(found)[1] if found else None


def communication(config: TrainConfig, parameters: Parameters, layout: Layout) -> tuple[float, str]:
    """Bytes that one GPU sends, and receives, per step, and their formula."""
    P, n, r, m = parameters.trained, layout.shards, layout.copies, config.train.micro_batches
    size = 2 if config.dtype == "bfloat16" else 4
    total, terms = 0.0, []
    if n > 1:
        # What lies outside the blocks stays gathered; blocks are gathered anew for the backward pass.
        again = sum(parameters.blocks) * config.parallel.reshard_after_forward
        total += m * (size * (P + again) + 4 * P) * (n - 1) / n
        gathered = f"{size} B x (P + {again / 1e6:.4g} M)" if again else f"{size} B x P"
        terms.append(f"{m} x (all-gathers {gathered} + reduce-scatter 4 B x P) x {n - 1}/{n}")
    if r > 1:
        total += 2 * 4 * P / n * (r - 1) / r
        terms.append(f"all-reduce 2 x 4 B x {'P' if n == 1 else f'P/{n}'} x {r - 1}/{r}")
    return total, " + ".join(terms)


def checkpoints_kept(config: TrainConfig) -> int:
    """How many checkpoints lie on disk at most, at the end of the run, with the one being written."""
    train = config.train
    written = math.ceil(train.max_steps / train.checkpoint_every) if train.checkpoint_every else 1
    if not train.keep_checkpoints:
        return written
    kept = train.keep_checkpoints + 1
    if train.keep_every and train.checkpoint_every:
        kept += train.max_steps // math.lcm(train.keep_every, train.checkpoint_every)
    return min(written, kept)


def plan_report(config: TrainConfig, gpus: str) -> str:
    """The text of ``--plan`` for GPUs as ``parse_machine`` reads them; the run's data are not read."""
    return "\n".join(_lines(config, parse_machine(gpus)))


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<38}{value:>10}  {note}".rstrip()


def _lines(config: TrainConfig, machine: Machine) -> Iterator[str]:
    parameters, train, loss = count_parameters(config), config.train, config.loss
    layout = resolve_layout(config, machine, parameters)
    height, width = config.model_config().image_height_width
    yield f"{config.model.size} at {height}x{width} on {machine.gpus}x{machine.device}, {config.dtype}"
    yield "parameters"
    counts = {
        "denoiser": parameters.denoiser,
        "projector": parameters.projector,
        f"{loss.stages}, frozen": parameters.stages,
        f"{loss.tokens}, frozen": parameters.tokens,
    }
    for name, number in counts.items():
        if number >= (FEW_PARAMETERS if name.endswith("frozen") else 1):
            yield _row(name, f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}")
    yield "layout"
    is_auto = config.parallel.mode == "auto" and machine.gpus > 1
    mode = "one process" if layout.mode == "none" else layout.mode
    yield _row("parallel", mode, "chosen by auto" if is_auto else "")
    yield _row("shards x copies", f"{layout.shards} x {layout.copies}")
    yield _row("batch", f"{train.batch_size:,}", f"{layout.images} a GPU, {layout.images_per_pass} a pass")
    yield from _memory(config, machine, parameters, layout)

    averages = len(config.ema.decays) + len(config.ema.power)
    average = 4 * parameters.denoiser
    state = 4 * parameters.trained + parameters.optimizer_bytes + averages * average
    on_disk = state + averages * average  # for resuming, and again for sampling
    on_node = min(machine.gpus, GPUS_PER_NODE) / layout.shards * state + average
    kept = checkpoints_kept(config)
    yield "checkpoints, GB"
    yield _row("one", f"{on_disk / 1e9:.1f}")
    yield _row("on disk at most", f"{kept * on_disk / 1e9:,.1f}", f"{kept} of them")
    yield _row("host memory of a node, for copies", f"{on_node / 1e9:.1f}")
    yield from _work(config, machine, parameters, layout)


def _memory(config: TrainConfig, machine: Machine, parameters: Parameters, layout: Layout) -> Iterator[str]:
    items = step_memory(config, parameters, layout)
    total, kind = sum(items.values()), config.train.activation_checkpointing
    yield f"memory of a GPU, GiB, with activation checkpointing {kind}"
    for name, size in items.items():
        if size / GIB >= 0.005:
            yield _row(name, f"{size / GIB:.2f}")
    yield _row("total", f"{total / GIB:.1f}", f"of {machine.memory / GIB:.0f}: {total / machine.memory:.0%}")
    for other in CHECKPOINTING:
        if other != kind:
            changed = replace(config, train=replace(config.train, activation_checkpointing=other))
            value = sum(step_memory(changed, parameters, layout).values())
            yield _row(f"total with {other}", f"{value / GIB:.1f}")
    if total > machine.memory:
        change = remedy(config, machine, parameters) or "more GPUs, larger ones, or a smaller model"
        yield f"  does not fit: try {change}"


def _work(config: TrainConfig, machine: Machine, parameters: Parameters, layout: Layout) -> Iterator[str]:
    train, gpus = config.train, machine.gpus
    flops = train_step_flops(config)
    yield "useful work of a step, TFLOP"
    yield _row("denoiser", f"{flops.denoiser / 1e12:,.4g}")
    if flops.projector:
        yield _row("projector", f"{flops.projector / 1e12:,.4g}")
    if flops.frozen:
        share = f"perceptual terms see {expected_gate_share(config):.1%} of the images"
        yield _row("frozen networks", f"{flops.frozen / 1e12:,.4g}", share)
    yield _row(
        "total", f"{flops.total / 1e12:,.4g}", f"{flops.total / train.batch_size / 1e9:,.4g} GFLOP an image"
    )
    if gpus > 1:
        volume, formula = communication(config, parameters, layout)
        yield f"communication of a GPU and step, GB, with P = {parameters.trained / 1e6:,.1f} M parameters"
        yield _row("sent, and as much received", f"{volume / 1e9:.2f}", formula)
    peak = peak_flops(machine.device, "bf16" if config.dtype == "bfloat16" else "fp32")
    assert peak is not None
    yield f"time to step {train.max_steps:,}, at a peak of {peak / 1e12:g} TFLOP/s a GPU"
    # terms come and go on schedule, and their work with them
    edges = [*(step for step in schedule_edges(config.loss) if step < train.max_steps), train.max_steps]
    work = sum(train_step_flops(config, first).total * (until - first) for first, until in pairwise(edges))
    for mfu in (0.2, 0.4, 0.6):
        seconds = work / (peak * gpus * mfu)
        rate = train.max_steps * train.batch_size / seconds
        hours = f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds:,.2g} s"
        yield _row(f"MFU {mfu:.0%}", hours, f"{rate:,.0f} img/s, {rate / gpus:,.0f} a GPU")
