"""Beginning a run from the weights of another one: ``--init``. Unlike a resume, everything else is new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from pixelgen.config.load import config_from_yaml
from pixelgen.errors import UserError
from pixelgen.models.denoiser import Denoiser
from pixelgen.models.families import family_of
from pixelgen.models.released import read_released_checkpoint
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.ema import Averages
from pixelgen.training.processes.shard import local, whole

State = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """Weights to begin from, whole and on the CPU.

    Attributes:
        name: what they were read from.
        raw: the trained weights, by their names in the model.
        averages: averaged ones by the name of the average, the default one first.
        class_names: of the data that they were trained on; empty where they are not known.
    """

    name: str
    raw: State
    averages: dict[str, State]
    class_names: tuple[str, ...] = ()


def read_source(path: str, model: Denoiser) -> Source:
    """The weights of a run, of one of its checkpoints, or of a ``.ckpt`` of the public code.

    Raises:
        FileNotFoundError: nothing at ``path``.
        UserError: something else is there, it is damaged, or its model is of another family.
    """
    if Path(path).suffix == ".ckpt":
        parts = {kind: model.convert(state) for kind, state in read_released_checkpoint(path).items()}
        return Source(path, parts["raw"], {"ema": parts["ema"] or parts["raw"]})
    checkpoint = checkpoints.find_checkpoint(path)
    meta = checkpoints.read_meta(checkpoint)
    config = config_from_yaml((checkpoint / checkpoints.CONFIG_FILE).read_text(), str(checkpoint))
    own = family_of(model.config).name
    if config.model.family != own:
        raise UserError(
            f"--init: {checkpoint} is of model.family {config.model.family}, and the run is of {own}"
        )
    names = meta["averages"]
    averages = {name: checkpoints.load_ema_weights(checkpoint, name) for name in names}
    raw = checkpoints.load_part(checkpoint, "model.")
    return Source(str(checkpoint), raw, averages, tuple(meta.get("data", {}).get("class_names", ())))


def fitted(
    model: Denoiser, own: Mapping[str, Tensor], state: State, classes: Mapping[int, int], source: str
) -> tuple[State, list[str]]:
    """The state in the shapes of a model, and a line on each tensor that is not as it was.

    Args:
        model: the fresh model.
        own: its state, for the shapes and for new rows of the table of classes.
        state: of a model of its family.
        classes: of the model -> the same ones of the state.
        source: begins the error message.

    Raises:
        UserError: lists every tensor that fits in no way.
    """
    found, changes = {}, []
    tables = model.tables()
    problems = [f"unexpected {name}" for name in state.keys() - own.keys()]
    for name, fresh in own.items():
        given = state.get(name)
        if given is None:
            problems.append(f"missing {name}")
        elif name in tables:
            found[name] = tables[name]
            if given.shape != fresh.shape:
                changes.append(f"{name}: that of the new size")
        elif given.shape == fresh.shape and (name != model.class_table or _is_identity(classes, fresh)):
            found[name] = given
        elif (changed := model.resized(name, given, fresh, classes)) is not None:
            found[name], told = changed
            changes.append(f"{name}: {told}")
        else:
            problems.append(f"{name} has shape {tuple(given.shape)}, expected {tuple(fresh.shape)}")
    if problems:
        raise UserError(f"--init: {source} does not fit {model.config}: {'; '.join(sorted(problems))}")
    return found, changes


def _is_identity(classes: Mapping[int, int], table: Tensor) -> bool:
    return all(classes.get(row) == row for row in range(len(table) - 1))


def same_classes(own: tuple[str, ...], theirs: tuple[str, ...], count: int, rows: int) -> dict[int, int]:
    """Which classes of the data are which of the source's: by name, or where it has none, by number.

    Args:
        own: names of the classes of the data.
        theirs: those of the source.
        count: classes of the model.
        rows: classes of the source's model.
    """
    if not theirs:
        return {number: number for number in range(count)} if rows == count else {}
    places = {name: number for number, name in enumerate(theirs)}
    return {number: places[name] for number, name in enumerate(own) if name in places}


def fresh_state(model: Denoiser) -> State:
    """A model's state, for its shapes, with the whole table of classes on the CPU; every process calls it."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    if model.class_table is not None:
        state[model.class_table] = whole(state[model.class_table]).cpu()
    return state


@dataclass(frozen=True)
class Beginning:
    """What a model and its averages begin with, and what was kept, resized or is new."""

    raw: State
    averages: dict[str, State]
    told: str


def fit(
    source: Source, model: Denoiser, own: State, averages: list[str], class_names: tuple[str, ...]
) -> Beginning:
    """A source's weights in the shapes of a model.

    An average begins with the source's of the same name, else with the source's first.

    Args:
        source: from ``read_source``.
        model: the fresh model.
        own: from ``fresh_state``.
        averages: names of the run's averages.
        class_names: of its data.

    Raises:
        UserError: they fit in no way.
    """
    rows = len(source.raw[model.class_table]) - 1 if model.class_table in source.raw else 0
    classes = same_classes(class_names, source.class_names, model.config.num_classes, rows)
    raw, changes = fitted(model, own, source.raw, classes, source.name)
    first = next(iter(source.averages.values()))
    of_averages = {
        name: fitted(model, own, source.averages.get(name, first), classes, source.name)[0]
        for name in averages
    }
    kept = f"begins from {source.name}: {len(own) - len(changes)} of {len(own)} tensors as they are"
    return Beginning(raw, of_averages, "; ".join([kept, *changes]))


@torch.no_grad()
def begin(model: Denoiser, averages: Averages, beginning: Beginning) -> None:
    """Fills a model and its averages, sharded or not; every process calls it."""

    def load(state: State) -> None:
        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))

    for name, values in averages.values.items():
        load(beginning.averages[name])
        for key, parameter in model.named_parameters():
            local(values[key]).copy_(local(parameter.detach()))
    load(beginning.raw)
