"""What must not have changed where a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pixelgen.config.load import config_from_yaml
from pixelgen.config.train_config import TrainConfig
from pixelgen.errors import UserError
from pixelgen.losses.term import TERMS
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.ema import average_settings


def check_same_parts(config: TrainConfig, checkpoint: Path, *, is_stream: bool) -> None:
    """What a run trains is settled when it starts; weights and schedules may change at a resume.

    Args:
        config: of the run that goes on.
        checkpoint: where it goes on.
        is_stream: whether its data have a state; a checkpoint holds that of the data until then.

    Raises:
        UserError: an option would add or remove something that the checkpoint does or does not hold.
    """
    saved = config_from_yaml((checkpoint / checkpoints.CONFIG_FILE).read_text(), str(checkpoint))

    def parts(config: TrainConfig, is_stream: bool) -> Iterator[tuple[str, object]]:
        loss = config.loss
        yield "model", config.model_config().without_dropout()
        yield "optimizer.name", config.optimizer.name
        for options in loss.of_terms().values():
            yield from options.trained().items()
        yield "loss.gate", loss.gate == "learned"
        yield "loss.balance", loss.balance != "off"
        # of the tokens' width are the networks that are trained on them
        yield "loss.tokens", any(TERMS[name].trains for name in loss.used_terms()) and loss.tokens
        yield "data.name or data.streaming", is_stream
        yield "ema.decay or ema.power", list(average_settings(config.ema))

    was_stream = bool(checkpoints.stored_values(checkpoint, "data"))
    before, now = dict(parts(saved, was_stream)), dict(parts(config, is_stream))
    changed = [name for name in now if now[name] != before[name]]
    if changed:
        raise UserError(
            f"{changed[0]} cannot change so at a resume: {checkpoint} was saved by a run that trained other "
            f"parts; start a new run"
        )
