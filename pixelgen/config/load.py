"""A training run's configuration from presets, command line and YAML. Imports no torch."""

from __future__ import annotations

import argparse
import glob
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from pixelgen.config.command_line import check_values, construct, describe_error, nearest, parse, read_values
from pixelgen.config.train_config import TrainConfig
from pixelgen.errors import UserError
from pixelgen.options import OpenSection

PRESET_DIR = Path(__file__).parent / "presets"

DEFAULT_PRESET = "digits"

DEFAULT_PLAN = "8xH100"


class _Loader(yaml.SafeLoader):
    """Reads only true and false as booleans, as YAML 1.2 does, so that ``balance: off`` is the word."""


_BOOL = "tag:yaml.org,2002:bool"

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|false|True|False|TRUE|FALSE)$"), list("tTfF"))


def preset_names() -> list[str]:
    """Names that ``--config`` takes besides paths."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


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
        UserError: unknown option or key (the nearest one is named), unknown preset (all are listed),
            wrong type or value, YAML that cannot be read.
        FileNotFoundError: no such YAML file or run.
        SystemExit: after ``--help``, ``--print_config`` and ``--plan``.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--resume")
    first.add_argument("--print_config", "--print-config", action="store_true")
    if plan is not None:
        first.add_argument("--plan", nargs="?", const=DEFAULT_PLAN)
    try:
        known, rest = first.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    except argparse.ArgumentError as error:
        raise UserError(describe_error(error)) from None
    # A job that is queued again has one command line: with auto it says what the run is, whether new or not.
    run = None if known.resume == "auto" else known.resume
    if run and known.config:
        raise UserError("--resume takes the configuration of the run; leave out --config")
    fixed = [arg for arg in rest if arg.partition("=")[0] in ("--name", "--out_dir", "--out-dir")]
    if run and fixed:
        raise UserError(f"--resume continues in the run's own folder; leave out {fixed[0].partition('=')[0]}")
    if run and any(arg.partition("=")[0] == "--init" for arg in rest):
        raise UserError("--resume continues with the run's own weights; leave out --init")
    values: dict[str, object] = {}
    stem = None
    for path in [_run_config(run)] if run else [_find_config(name) for name in known.config]:
        values |= check_values(TrainConfig, _read_yaml(path.read_bytes(), str(path)), str(path))
        stem = path.stem
    extra = {
        "--config NAME|FILE": f"preset ({', '.join(preset_names())}) or YAML file; "
        f"default: {DEFAULT_PRESET}. May be repeated: later files and options on the command line win.",
        "--resume RUN|auto": "continue runs/NAME from its newest checkpoint, with its configuration; auto, "
        "for jobs that are queued again, continues the run called --name if it can, else starts it",
        "--print_config": "print the configuration as YAML after all other options and exit",
    }
    if plan is not None:
        extra["--plan [GPUS]"] = (
            "print what the run needs and takes on so many GPUs, such as 4 or 16xH200, and exit; "
            f"default: {DEFAULT_PLAN}"
        )
    config = _with_absolute_paths(parse(TrainConfig, rest, prog=prog, values=values, extra=extra))
    if known.print_config:
        print(config_to_yaml(config), end="")
        raise SystemExit(0)
    if plan is not None and known.plan is not None:
        print(plan(config, known.plan))
        raise SystemExit(0)
    if known.resume == "auto" and config.name is None:
        raise UserError("--resume auto needs --name: it continues the run of that name, or starts it")
    if config.name is None:
        # Without a preset or file the data say best what the run is: digits, or folder.
        config = replace(config, name=f"{stem or config.data.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    return config, known.resume


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
    return construct(TrainConfig, check_values(TrainConfig, _read_yaml(text.encode(), source), source))


def _read_yaml(content: bytes, source: str) -> dict[str, object]:
    try:
        mapping: Any = yaml.load(content, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}: not valid YAML{where}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not a YAML file: {describe_error(error)}") from None
    return read_values(TrainConfig, mapping, source)


def _find_config(name: str) -> Path:
    presets = preset_names()
    if name in presets:
        return PRESET_DIR / f"{name}.yaml"
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(
            f"--config: {name} is a folder; give a preset or a YAML file, such as {path / 'config.yaml'}"
        )
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise FileNotFoundError(f"--config: no such file: {name}")
    guess = nearest(name, presets)
    hint = f"did you mean {guess}? " if guess else ""
    raise UserError(
        f"--config: unknown preset {name}; {hint}Presets: {', '.join(presets)}. A YAML file will do too"
    )


def _run_config(run: str) -> Path:
    path = Path(run)
    if not path.exists():
        raise FileNotFoundError(f"--resume: no run at {run}")
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"--resume: {run} is not the folder of a run, such as runs/NAME: it has no config.yaml"
        )
    return path / "config.yaml"
