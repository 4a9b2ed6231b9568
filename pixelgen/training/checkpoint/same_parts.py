"""Options that must not have changed when a run resumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixelgen.config.load import config_from_yaml
from pixelgen.config.train_config import TrainConfig
from pixelgen.errors import UserError
from pixelgen.losses.term import TERMS
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.ema import decay_schedules


def check_same_parts(config: TrainConfig, checkpoint: Path, *, is_stream: bool) -> None:
    """What a run trains is settled when it starts; weights of terms and schedules may change at a resume.

    Args:
        config: of the resumed run.
        checkpoint: that it resumes from.
        is_stream: whether its data source has a state.

    Raises:
        UserError: an option would add or remove something that the checkpoint does or does not hold.
    """
    saved = config_from_yaml((checkpoint / checkpoints.CONFIG_FILE).read_text(), str(checkpoint))

    def parts(config: TrainConfig, is_stream: bool) -> Iterator[tuple[str, object]]:
        loss = config.loss
        yield "model", config.model_config().without_rates()
        yield "optimizer.name", config.optimizer.name
        for options in loss.of_terms().values():
            yield from options.trained().items()
        yield "loss.gate", loss.gate == "learned"
        yield "loss.balance", loss.balance != "off"
        # networks that are trained on tokens have the width of these
        yield "loss.tokens", any(TERMS[name].trains for name in loss.used_terms()) and loss.tokens
        yield "data.name or data.streaming", is_stream
        yield "ema.decay or ema.power", list(decay_schedules(config.ema))

    was_stream = bool(checkpoints.stored_values(checkpoint, "data"))
    before, now = dict(parts(saved, was_stream)), dict(parts(config, is_stream))
    changed = [name for name in now if now[name] != before[name]]
    if changed:
        raise UserError(
            f"{changed[0]} cannot change so at a resume: {checkpoint} was saved by a run that trained other "
            f"parts; start a new run"
        )
