"""A training run's configuration from presets, command line and YAML. Imports no torch."""

from __future__ import annotations

import glob
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from pixelgen.config.command_line import parse_values
from pixelgen.config.train_config import TrainConfig
from pixelgen.config.values import build, nearest, read_yaml
from pixelgen.errors import UserError
from pixelgen.options import OpenSection

PRESET_DIR = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names that ``--config`` takes besides paths."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


_NAMES = tyro.conf.arg(
    metavar="PRESET|FILE",
    # Separated by spaces: a line of help is folded there, and no name is cut in two.
    help=f"preset, one of {', '.join(preset_names())}, or YAML file; default: digits. May be repeated: later "
    "files and options on the command line win.",
)

_GPUS = tyro.constructors.PrimitiveConstructorSpec[str | None](
    nargs=(0, 1),
    metavar="[GPUS]",
    instance_from_str=lambda given: [*given, "8xH100"][0],
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
    """Reads the command line of a training run, whose options are the fields of ``TrainCommand``.

    Args:
        argv: arguments after the program's name; None takes ``sys.argv[1:]``.
        prog: the program's name in the help.
        plan: makes the text of ``--plan`` from the configuration and the GPUs; None refuses the option.

    Returns:
        The configuration, with ``name`` filled in, and what was given to ``--resume``, or None.

    Raises:
        UserError: unknown preset or key of a file, value out of its range, YAML that cannot be read.
        FileNotFoundError: no such YAML file or run.
        SystemExit: as ``parse_values``; with 0 after ``--print_config`` and ``--plan``.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # The files' values are defaults, which the help shows, so the files are looked for first.
    others = [argument for argument in argv if argument not in ("-h", "--help")]
    first = parse_values(TrainCommand, others, prog=prog, values={"out_dir": ""})
    # A job that is queued again has one command line: with auto it says what the run is, whether new or not.
    run = None if first["resume"] == "auto" else first["resume"]
    fixed = {"config": "configuration", "name": "folder", "out_dir": "folder", "init": "weights"}
    for option, own in fixed.items():
        if run and first[option]:
            raise UserError(f"--resume continues with the run's own {own}; leave out --{option}")
    values: dict[str, Any] = {}
    paths = [_run_config(run)] if run else [_find_config(name) for name in first["config"]]
    for path in paths:
        read_yaml(TrainConfig, path.read_bytes(), values, str(path))
    values = parse_values(TrainCommand, argv, prog=prog, values=values)
    _make_paths_absolute(values)
    config = build(TrainConfig, {item.name: values[item.name] for item in fields(TrainConfig)})
    if plan is None and values["plan"]:
        raise UserError("unknown option --plan: this program does not plan")
    if values["print_config"]:
        print(config_to_yaml(config), end="")
        raise SystemExit(0)
    if plan is not None and values["plan"]:
        print(plan(config, values["plan"]))
        raise SystemExit(0)
    if values["resume"] == "auto" and config.name is None:
        raise UserError("--resume auto needs --name: it continues the run of that name, or starts it")
    if config.name is None:
        # Without a preset or file the data say best what the run is: digits, or folder.
        stem = paths[-1].stem if paths else config.data.name
        config = replace(config, name=f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    return config, values["resume"]


def _make_paths_absolute(values: dict[str, Any]) -> None:
    """A run may go on in another directory; what is not there, such as a hub id, stays as it is."""
    data, loss = values["data"], values["loss"]
    for section, name in (values, "init"), (data, "path"), (loss, "stages_weights"), (loss, "tokens_weights"):
        path = section[name]
        is_path = path not in (None, "pretrained", "random")
        if is_path and (glob.has_magic(path) or os.path.exists(path)):
            section[name] = os.path.abspath(path)


def config_to_yaml(config: TrainConfig) -> str:
    """Every field as YAML, of the model those of its family; ``config_from_yaml`` gives an equal one back."""
    values = asdict(config)
    sections = {name: value for name, value in vars(config).items() if isinstance(value, OpenSection)}
    values |= {name: section.own_values() for name, section in sections.items()}
    return yaml.safe_dump(values, sort_keys=False)


def config_from_yaml(text: str, source: str = "config.yaml") -> TrainConfig:
    """The configuration of a YAML text; fields it does not name keep their defaults.

    Raises:
        UserError: as ``load_config``; ``source``, the file's name, begins the message.
    """
    values: dict[str, Any] = {}
    read_yaml(TrainConfig, text.encode(), values, source)
    return build(TrainConfig, values)


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
