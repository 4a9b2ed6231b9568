"""Beginning a run from the weights of another one: ``--init``. Unlike a resume, everything else is new."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from pixelgen.config.load import config_from_yaml
from pixelgen.errors import UserError
from pixelgen.models.denoiser import Denoiser
from pixelgen.models.families import family_of
from pixelgen.models.released import read_released_checkpoint, require_kind
from pixelgen.training.checkpoint import read as checkpoints
from pixelgen.training.processes.shard import local, whole
from pixelgen.training.step import Trainer

State = dict[str, Tensor]


@torch.no_grad()
def begin_from(trainer: Trainer, path: str) -> None:
    """Takes the weights of another run, or of the public code, into a trainer's model and its averages.

    An average begins with the other run's average of the same name, else with that run's first.

    Raises:
        FileNotFoundError: nothing at ``path``.
        UserError: not a model, a damaged one, or one that does not fit.
    """
    world, model, averages = trainer.world, trainer.model, trainer.averages.values
    found = world.in_turn("reading the weights to begin from", lambda: read_weights(path, model))
    source, saved, saved_averages, class_names = found
    own = {name: value.detach() for name, value in model.state_dict().items()}
    if model.class_table is not None:
        own[model.class_table] = whole(own[model.class_table]).cpu()
    # Labels here -> the same ones there: by name, or where none are known, by number if there are as many.
    num_classes = model.config.num_classes
    if class_names:
        labels = {name: label for label, name in enumerate(class_names)}
        own_names = enumerate(trainer.dataset.class_names)
        classes = {label: labels[name] for label, name in own_names if name in labels}
    else:
        as_many = model.class_table in saved and len(saved[model.class_table]) == num_classes + 1
        classes = {label: label for label in range(num_classes)} if as_many else {}
    first = next(iter(saved_averages.values()))

    def fit() -> tuple[dict[str, State], State, list[str]]:
        raw, changes = fitted(model, own, saved, classes, source)
        states = {name: saved_averages.get(name, first) for name in averages}
        return {n: fitted(model, own, state, classes, source)[0] for n, state in states.items()}, raw, changes

    fitted_averages, raw, changes = world.together(fit)
    for name, state in fitted_averages.items():
        _load(model, state)
        for key, parameter in model.named_parameters():
            local(averages[name][key]).copy_(local(parameter.detach()))
    _load(model, raw)
    if world.is_main:
        kept = f"begins from {source}: {len(own) - len(changes)} of {len(own)} tensors as they are"
        print("; ".join([kept, *changes]), flush=True)


def _load(model: Denoiser, state: State) -> None:
    """Fills a model, sharded or not, from whole tensors."""
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


def read_weights(path: str, model: Denoiser) -> tuple[str, State, dict[str, State], tuple[str, ...]]:
    """Weights of a run, of a checkpoint, or of a ``.ckpt`` of the public code, whole and on the CPU.

    Returns:
        What they were read from; the trained weights; the averaged ones by the name of the average, the
        default one first; and the names of the classes that they were trained on, empty where not known.
    """
    if Path(path).suffix == ".ckpt":
        published = read_released_checkpoint(path)
        require_kind(model.config, published["raw"], f"--init: {path}")
        # that of the published weights is the default of the family
        _require_prediction(model, type(model.config), path)
        parts = {kind: model.convert(state) for kind, state in published.items()}
        return path, parts["raw"], {"ema": parts["ema"] or parts["raw"]}, ()
    checkpoint = checkpoints.find_checkpoint(path)
    meta = checkpoints.read_meta(checkpoint)
    config = config_from_yaml((checkpoint / checkpoints.CONFIG_FILE).read_text(), str(checkpoint))
    own = family_of(model.config).name
    if config.model.family != own:
        raise UserError(
            f"--init: {checkpoint} is of model.family {config.model.family}, and the run is of {own}"
        )
    _require_prediction(model, config.model_config(), str(checkpoint))
    averages = {name: checkpoints.load_ema_weights(checkpoint, name) for name in meta["averages"]}
    raw = checkpoints.load_part(checkpoint, "model.")
    require_kind(model.config, raw, f"--init: {checkpoint}")
    return str(checkpoint), raw, averages, tuple(meta.get("data", {}).get("class_names", ()))


def _require_prediction(model: Denoiser, of: object, source: str) -> None:
    """Refuses weights that predict something else, where the family has a choice: no shape tells."""
    theirs = getattr(of, "prediction", model.prediction)
    if theirs != model.prediction:
        raise UserError(f"--init: {source} predicts {theirs}, and model.prediction is {model.prediction}")


def fitted(
    model: Denoiser, own: State, state: State, classes: Mapping[int, int], source: str
) -> tuple[State, list[str]]:
    """The state of a model of the same family in the shapes of ``model``, and a line on each changed tensor.

    ``own``, the state of ``model``, gives the shapes, and values for new rows of the table of classes;
    ``classes`` are labels here -> the same ones there; ``source`` names the other model in the error.

    Raises:
        UserError: lists every tensor that cannot be used.
    """
    found, changes = {}, []
    tables = model.tables()
    is_same_order = all(classes.get(label) == label for label in range(model.config.num_classes))
    problems = [f"unexpected {name}" for name in state.keys() - own.keys()]
    for name, fresh in own.items():
        given = state.get(name)
        if given is None:
            problems.append(f"missing {name}")
        elif name in tables:
            found[name] = tables[name]
            if given.shape != fresh.shape:
                changes.append(f"{name}: that of the new size")
        elif given.shape == fresh.shape and (name != model.class_table or is_same_order):
            found[name] = given
        elif (resized := model.resized(name, given, fresh, classes)) is not None:
            found[name], change = resized
            changes.append(f"{name}: {change}")
        else:
            problems.append(f"{name} has shape {tuple(given.shape)}, expected {tuple(fresh.shape)}")
    if problems:
        raise UserError(f"--init: {source} does not fit {model.config}: {'; '.join(sorted(problems))}")
    return found, changes
