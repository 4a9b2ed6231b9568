"""What the command lines share: options from a dataclass, errors in one line, exit codes.

A command line is a frozen dataclass whose docstring explains every field. Fields that are dataclasses in turn
are sections: ``--train.batch_size 8`` here is ``train: {batch_size: 8}`` in YAML. Options of a class without
sections are spelt with dashes. Imports no torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, NoReturn, TypeVar, get_args

import tyro
from tyro import constructors

from pixelgen.config.values import build, convert, describe_type, option_names, option_types
from pixelgen.errors import USER_ERRORS, AlreadyReported, UserError
from pixelgen.options import describe_options

T = TypeVar("T")


def run(main: Callable[[list[str] | None], int | None], prog: str, argv: list[str] | None = None) -> NoReturn:
    """Calls ``main(argv)`` and leaves the process.

    Exit codes: what ``main`` returns (None is 0); 2 after ``prog: error: message``, one line on stderr, for a
    user's error; 130 when interrupted. Other exceptions keep their traceback.
    """
    # libgomp spins while it waits: on busy cores a 12 ms step takes 2 s. It reads this as torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        code = main(argv)
    except USER_ERRORS as error:
        if not isinstance(error, AlreadyReported):
            print(f"{prog}: error: {describe_error(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def describe_error(error: BaseException) -> str:
    """One line for a user: the message, or what the system said and about which file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__


def parse(cls: type[T], argv: Sequence[str] | None = None, *, prog: str) -> T:
    """A dataclass from its defaults and the command line; arguments and errors as ``parse_values``."""
    return build(cls, parse_values(cls, argv, prog=prog))


def parse_values(
    cls: type, argv: Sequence[str] | None = None, *, prog: str, values: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The value of every option of a command line, those of a section in a mapping of their own.

    Args:
        cls: a dataclass; ``--help`` shows its docstring, and the ``Args:`` of its sections'.
        argv: arguments after the program's name; None takes ``sys.argv[1:]``.
        prog: the program's name in the usage line.
        values: defaults instead of the class's own, as ``read_yaml`` makes them.

    Raises:
        UserError: an option of another section, which is named.
        SystemExit: with 2 after a message about an unknown option (the nearest ones are named), a wrong type
            or choice, or a missing value; with 0 after ``--help``.
    """
    argv = sys.argv[1:] if argv is None else argv
    names = list(option_names(cls))
    for argument in argv:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and "." in name and name not in names:
            last = name.rpartition(".")[2]
            if found := [f"--{other}" for other in names if other.rpartition(".")[2] == last]:
                raise UserError(f"unknown option --{name}; did you mean {' or '.join(found)}?")
    registry = constructors.ConstructorRegistry()
    registry.primitive_rule(_option)
    registry.struct_rule(_section)
    try:
        return tyro.cli(
            cls,
            prog=f"python {prog}" if prog.endswith(".py") else f"python -m {prog}",
            description=inspect.cleandoc(cls.__doc__ or "").partition("\n\nArgs:")[0],
            args=argv,
            default=values or {},
            use_underscores=any(is_dataclass(hint) for hint in option_types(cls).values()),
            # one process on each machine reports: all have the same command line
            console_outputs=os.environ.get("LOCAL_RANK", "0") == "0",
            config=(tyro.conf.FlagConversionOff,),
            registry=registry,
        )
    except BrokenPipeError:  # who reads --help, such as head, has seen enough
        raise SystemExit(0) from None


def _option(info: constructors.PrimitiveTypeInfo) -> constructors.PrimitiveConstructorSpec[Any] | None:
    """One argument, read as in YAML; without one, what is true or false is true."""
    hint: Any = info.type
    if is_dataclass(hint) or tyro.conf.UseAppendAction in info.markers:
        return None

    def read(given: list[str]) -> Any:
        text = given[0] if given else "true"
        is_null = text in ("null", "~") and type(None) in get_args(hint)
        return None if is_null else convert(text, hint)

    return constructors.PrimitiveConstructorSpec(
        nargs=(0, 1) if hint is bool else 1,
        metavar=f"[{describe_type(hint)}]" if hint is bool else describe_type(hint),
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [value if isinstance(value, str) else json.dumps(value)],
    )


def _section(info: constructors.StructTypeInfo) -> constructors.StructConstructorSpec | None:
    """The options of a dataclass; their values go into a dictionary, as their defaults come from one."""
    if not is_dataclass(info.type):
        return None
    cls: Any = info.type
    texts = {name: text for base in reversed(cls.__mro__) for name, text in describe_options(base).items()}
    types, options = option_types(cls), []
    for item in fields(cls):
        hint: Any = types[item.name]
        default = tyro.MISSING if item.default is MISSING else item.default
        if is_dataclass(hint):
            texts[item.name] = (hint.__doc__ or "").partition("\n")[0]
            # tyro takes a default of another type from a field with a constructor only
            hint, default = Annotated[hint, tyro.conf.arg(constructor=types[item.name])], {}
        default = info.default.get(item.name, default)
        options.append(constructors.StructFieldSpec(item.name, hint, default, texts.get(item.name)))
    return constructors.StructConstructorSpec(dict, tuple(options))
