"""A training run's configuration from presets, command line and YAML. Imports no torch."""

from __future__ import annotations

import argparse
import glob
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from pixelgen.config.command_line import describe_error, parse_values
from pixelgen.config.train_config import TrainConfig
from pixelgen.config.values import Loader, build, nearest, option_types, read_values
from pixelgen.errors import UserError
from pixelgen.options import OpenSection

PRESET_DIR = Path(__file__).parent / "presets"

DEFAULT_PLAN = "8xH100"

# What --resume takes from the run, by the option that would say otherwise.
_OF_THE_RUN = {"config": "configuration", "name": "folder", "out_dir": "folder", "init": "weights"}


def preset_names() -> list[str]:
    """Names that ``--config`` takes besides paths."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


_NAMES = tyro.conf.arg(metavar="|".join([*preset_names(), "FILE"]))

_GPUS = tyro.constructors.PrimitiveConstructorSpec[str | None](
    nargs=(0, 1),
    metavar="[GPUS]",
    instance_from_str=lambda given: [*given, DEFAULT_PLAN][0],
    is_instance=lambda value: True,
    str_from_instance=lambda value: ["null"],
)


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainConfig):
    """Trains a class-conditional pixel-space diffusion transformer.

    Args:
        config: preset or YAML file; default: digits. May be repeated: later files and options on the command
            line win.
        resume: continue runs/NAME from its newest checkpoint, with its configuration; auto, for jobs that are
            queued again, continues the run called --name if it can, else starts it.
        print_config: print the configuration as YAML after all other options and exit.
        plan: print what the run needs and takes on so many GPUs, such as 4 or 16xH200, and exit; 8xH100 if
            not said.
    """

    config: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _NAMES] = ()
    resume: str | None = None
    print_config: bool = False
    plan: Annotated[str | None, _GPUS] = None


def load_config(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "pixelgen.train",
    plan: Callable[[TrainConfig, str], str] | None = None,
) -> tuple[TrainConfig, str | None]:
    """Reads the command line of a training run: every field, ``--config``, ``--resume``, ``--print_config``.

    ``--config`` takes a preset's name or a YAML file, and may be given several times: later ones win, and
    options on the command line win over all of them. ``--resume RUN`` starts from the run's configuration.

    Args:
        argv: arguments after the program's name; None takes ``sys.argv[1:]``.
        prog: the program's name in the help.
        plan: makes the text of ``--plan`` from the configuration and the GPUs; without it there is no such
            option.

    Returns:
        The configuration, with ``name`` filled in, and what was given to ``--resume``, or None.

    Raises:
        UserError: unknown preset (all are listed) or key of a file (the nearest one is named), value out of
            its range, YAML that cannot be read.
        FileNotFoundError: no such YAML file or run.
        SystemExit: with 2 after a message about the command line, see ``parse_values``; with 0 after
            ``--help``, ``--print_config`` and ``--plan``.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # The files are the defaults of the other options, so they are looked for first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", nargs="?", default=[])
    for option in ("--resume", "--name", "--init"):
        first.add_argument(option, nargs="?")
    first.add_argument("--out_dir", "--out-dir", nargs="?")
    known, _ = first.parse_known_args(argv)
    # A job that is queued again has one command line: with auto it says what the run is, whether new or not.
    run = None if known.resume == "auto" else known.resume
    for option, own in _OF_THE_RUN.items():
        if run and getattr(known, option):
            raise UserError(f"--resume continues with the run's own {own}; leave out --{option}")
    values: dict[str, Any] = {}
    paths = [_run_config(run)] if run else [_find_config(name) for name in known.config if name]
    for path in paths:
        _read_yaml(path.read_bytes(), values, str(path))
    given = parse_values(TrainCommand, argv, prog=prog, values=values)
    if plan is None and given["plan"]:
        raise UserError("unknown option --plan: this program does not plan")
    config = _with_absolute_paths(
        build(TrainConfig, {name: given[name] for name in option_types(TrainConfig)})
    )
    if given["print_config"]:
        print(config_to_yaml(config), end="")
        raise SystemExit(0)
    if plan is not None and given["plan"]:
        print(plan(config, given["plan"]))
        raise SystemExit(0)
    if known.resume == "auto" and config.name is None:
        raise UserError("--resume auto needs --name: it continues the run of that name, or starts it")
    if config.name is None:
        # Without a preset or file the data say best what the run is: digits, or folder.
        stem = paths[-1].stem if paths else config.data.name
        config = replace(config, name=f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    return config, given["resume"]


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """A run may go on in another directory; what is not there, such as a hub id, stays as it is."""

    def absolute(path: str | None) -> Any:
        if path in (None, "pretrained", "random") or not (glob.has_magic(path) or os.path.exists(path)):
            return path
        return os.path.abspath(path)

    loss, data = config.loss, config.data
    loss = replace(
        loss, stages_weights=absolute(loss.stages_weights), tokens_weights=absolute(loss.tokens_weights)
    )
    of_source = {"path": absolute(data.path)}
    data = replace(data, **of_source)
    return replace(config, init=absolute(config.init), loss=loss, data=data)


def config_to_yaml(config: TrainConfig) -> str:
    """Every field as YAML, of the model those of its family; ``config_from_yaml`` gives an equal one back."""
    values = asdict(config)
    for name, section in vars(config).items():
        if isinstance(section, OpenSection):
            values[name] = section.own_values()
    return yaml.safe_dump(values, sort_keys=False)


def config_from_yaml(text: str, source: str = "config.yaml") -> TrainConfig:
    """The configuration of a YAML text; fields it does not name keep their defaults.

    Args:
        text: as written by ``config_to_yaml``, or by hand.
        source: begins error messages; the file's name.

    Raises:
        UserError: as ``load_config``.
    """
    values: dict[str, Any] = {}
    _read_yaml(text.encode(), values, source)
    return build(TrainConfig, values)


def _read_yaml(content: bytes, into: dict[str, Any], source: str) -> None:
    try:
        mapping = yaml.load(content, Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}: not valid YAML{where}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not a YAML file: {describe_error(error)}") from None
    read_values(TrainConfig, mapping, into, source)


def _find_config(name: str) -> Path:
    presets, path = preset_names(), Path(name)
    if name in presets:
        return PRESET_DIR / f"{name}.yaml"
    if path.is_file():
        return path
    if path.is_dir():
        example = path / "config.yaml"
        raise UserError(f"--config: {name} is a folder; give a preset or a YAML file, such as {example}")
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise FileNotFoundError(f"--config: no such file: {name}")
    guess = nearest(name, presets)
    meant = f"did you mean {guess}? " if guess else ""
    known = f"Presets: {', '.join(presets)}. A YAML file will do too"
    raise UserError(f"--config: unknown preset {name}; {meant}{known}")


def _run_config(run: str) -> Path:
    path = Path(run) / "config.yaml"
    if not path.parent.exists():
        raise FileNotFoundError(f"--resume: no run at {run}")
    if not path.is_file():
        raise UserError(
            f"--resume: {run} is not the folder of a run, such as runs/NAME: it has no config.yaml"
        )
    return path
