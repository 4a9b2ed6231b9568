"""What the command lines share: options from a dataclass, errors that name the nearest spelling, exit codes.

A command line is a frozen dataclass whose docstring explains every field. Fields that are dataclasses in turn
are sections: ``--train.batch_size 8`` here is ``train: {batch_size: 8}`` in YAML. Options of a class without
sections are spelt with dashes. Imports no torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, NoReturn, TypeGuard, TypeVar, Union, get_args, get_origin

import docstring_parser
import jsonargparse

from pixelgen.errors import USER_ERRORS, ToldError, UserError

T = TypeVar("T")


def run(main: Callable[[list[str] | None], int | None], prog: str, argv: list[str] | None = None) -> NoReturn:
    """Calls ``main(argv)`` and leaves the process.

    Exit codes: what ``main`` returns (None is 0); 2 after ``prog: error: message``, one line on stderr, for a
    user's error; 130 when interrupted. Other exceptions keep their traceback.

    Args:
        main: the command line, which reads ``sys.argv`` when its argument is None.
        prog: name that begins the message, such as ``"pixelgen.train"``.
        argv: arguments after the program's name.
    """
    # libgomp spins while it waits: on busy cores a 12 ms step takes 2 s. It reads this as torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        code = main(argv)
    except USER_ERRORS as error:
        if not isinstance(error, ToldError):
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


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    values: Mapping[str, object] | None = None,
    extra: Mapping[str, str] | None = None,
) -> T:
    """Builds ``cls`` from its defaults, then ``values``, then the command line.

    Args:
        cls: a dataclass; ``--help`` shows the ``Args:`` of its docstring and of its sections'.
        argv: arguments after the program's name; None takes ``sys.argv[1:]``.
        prog: the program's name in the usage line.
        values: dotted key -> value, from ``check_values``; ``--help`` shows them as the defaults.
        extra: option and metavar, such as ``"--config FILE"`` -> help, for options that the caller has
            already taken out of ``argv``.

    Raises:
        UserError: unknown option (the nearest one is named), wrong type or choice, missing value.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = {_option(key, cls): key for key in field_types(cls)}
    more = [option.partition(" ")[0] for option in extra or {}]
    parser = _build_parser(cls, prog, extra or {})
    if values:
        parser.set_defaults(dict(values))
    argv = _join_negative_numbers([_canonical(argument, options, more) for argument in argv])
    try:
        namespace = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        given = {options[name]: value for name, value in _given(argv).items() if name in options}
        raise UserError(_explain(str(error), cls, given, lambda key: _option(key, cls))) from None
    return construct(cls, {key: namespace[key] for key in options.values()})


def construct(cls: type[T], values: Mapping[str, object]) -> T:
    """Builds a dataclass and its sections from dotted key -> value; what is not named keeps its default."""
    given: dict[str, object] = {}
    for name, hint in _field_hints(cls).items():
        if _is_section(hint):
            inside = {
                key[len(name) + 1 :]: value for key, value in values.items() if key.startswith(f"{name}.")
            }
            given[name] = construct(hint, inside)
        elif name in values:
            given[name] = values[name]
    return cls(**given)


def field_types(cls: type) -> dict[str, Any]:
    """Dotted key -> type of every option of a dataclass, sections opened, in the order of the class."""
    found: dict[str, Any] = {}
    for name, hint in _field_hints(cls).items():
        if _is_section(hint):
            found.update({f"{name}.{key}": kind for key, kind in field_types(hint).items()})
        else:
            found[name] = hint
    return found


def _is_section(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and is_dataclass(hint)


def _field_hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    found = {field.name: hints[field.name] for field in fields(cls)}
    # a section whose options are known late says itself which it has by now
    return {name: hint.section() if hasattr(hint, "section") else hint for name, hint in found.items()}


def read_values(cls: type, mapping: object, source: str) -> dict[str, object]:
    """Flattens nested values, as read from YAML, to dotted keys.

    Args:
        cls: the dataclass the values are for.
        mapping: nested mappings; None for an empty file.
        source: begins the error message; a file's name.

    Raises:
        UserError: a key that ``cls`` does not have (the nearest one is named), or what is no mapping.
    """
    known = field_types(cls)
    found: dict[str, object] = {}

    sections = {key.rpartition(".")[0] for key in known} - {""}

    def walk(node: object, prefix: str) -> None:
        if not isinstance(node, Mapping):
            where = f"{prefix[:-1]} is a section and " if prefix else ""
            raise UserError(f"{source}: {where}must hold 'key: value' lines, got {node!r}")
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key in known:
                found[key] = value
            elif any(other.startswith(f"{key}.") for other in known):
                walk({} if value is None else value, f"{key}.")
            else:
                meant = sections if isinstance(value, Mapping) else known
                raise UserError(
                    f"{source}: unknown key {key}{_suggestion(key, {other: other for other in meant})}"
                )

    walk({} if mapping is None else mapping, "")
    return found


def check_values(cls: type, values: Mapping[str, object], source: str) -> dict[str, object]:
    """Converts values to the types of their fields, as the command line would.

    Args:
        cls: the dataclass the values are for.
        values: dotted key -> value.
        source: begins the error message; a file's name.

    Raises:
        UserError: a value of the wrong type; the message says what was expected.
    """
    known = field_types(cls)
    for key, value in values.items():
        if value is None and not _is_optional(known[key]):
            raise UserError(f"{source}: {key} must be {describe_type(known[key])}, got null")
    nested = jsonargparse.Namespace()
    for key, value in values.items():
        nested[key] = value
    try:
        parsed = _build_parser(cls, "", {}).parse_object(nested)
    except argparse.ArgumentError as error:
        raise UserError(f"{source}: {_explain(str(error), cls, values, str)}") from None
    # Text stays as it is: the parser would read the path "null" as no path.
    return {key: value if _is_text(known[key], value) else parsed[key] for key, value in values.items()}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known dotted name a user most likely meant, or None.

    A close spelling of the whole name wins, then the same last part in another section, then what is similar.
    """
    names = list(known)
    name = name.replace("-", "_")
    last = name.rsplit(".", 1)[-1]
    by_last: dict[str, str] = {}
    for other in names:
        by_last.setdefault(other.rsplit(".", 1)[-1], other)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    if not close and last in by_last:
        close = [by_last[last]]
    if not close:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:
        close = [by_last[part] for part in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    return close[0] if close else None


def describe_type(hint: Any) -> str:
    """A type in words: ``float | None`` is "a number or null"."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe_type(part) for part in get_args(hint))
    if get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
        item = get_args(hint)[0]
        if get_origin(item) is not tuple:
            return f"a list, [A, B, ...], each {describe_type(item)}"
        first, second = get_args(item)
        return f"a list of pairs, [[A, B], ...], A {describe_type(first)} and B {describe_type(second)}"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} values, [{', '.join('ABCDEFGH'[: len(get_args(hint))])}]"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, str(hint))


def _is_text(hint: Any, value: object) -> bool:
    return isinstance(value, str) and (hint is str or str in get_args(hint))


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Shows a tuple that is a default as it is typed: as a list."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        if isinstance(action.default, tuple):
            text = text.replace("%(default)s", json.dumps(action.default))
        return text


def _build_parser(cls: type, prog: str, extra: Mapping[str, str]) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"python -m {prog} [OPTION VALUE ...]",  # argparse would print every option here, unreadably
        description=docstring_parser.parse(cls.__doc__ or "").short_description,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    for option, text in extra.items():
        name, _, metavar = option.partition(" ")
        settings: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "store_true"}
        parser.add_argument(name, help=text, default=argparse.SUPPRESS, **settings)
    _add_options(parser, parser, cls, "", cls)
    return parser


def _add_options(parser: jsonargparse.ArgumentParser, group: Any, cls: type, prefix: str, root: type) -> None:
    hints = _field_hints(cls)
    texts = {item.arg_name: item.description for item in docstring_parser.parse(cls.__doc__ or "").params}
    for field in _options_first(cls, hints):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        text = " ".join((texts.get(field.name) or "").split()).replace("%", "%%")
        if _is_section(hint):
            section = parser.add_argument_group(f"{key}: {text}")
            _add_options(parser, section, hint, f"{key}.", root)
            continue
        settings: dict[str, Any] = {"type": hint, "help": text}
        if field.default is MISSING and field.default_factory is MISSING:
            settings["required"] = True
        else:
            settings["default"] = (
                field.default_factory() if field.default_factory is not MISSING else field.default
            )
        group.add_argument(_option(key, root), **settings)


def _options_first(cls: Any, hints: Mapping[str, Any]) -> list[Field[Any]]:
    # Plain options belong to the help's first group, whatever their place between the sections.
    return sorted(fields(cls), key=lambda field: _is_section(hints[field.name]))


def _option(key: str, cls: type) -> str:
    """``--train.batch_size`` for ``train.batch_size``; ``--batch-size`` in a class without sections."""
    has_sections = any(_is_section(hint) for hint in _field_hints(cls).values())
    return f"--{key if has_sections else key.replace('_', '-')}"


def _canonical(argument: str, options: Mapping[str, str], more: Sequence[str]) -> str:
    """An option as the parser spells it, whether typed with dashes or underscores; values pass unchanged."""
    option, equals, value = argument.partition("=")
    if not option.startswith("--") or option == "--help" or option in more:
        return argument
    key = option[2:].replace("-", "_")
    for name, other in options.items():
        if key == other:
            return f"{name}{equals}{value}"
    inside = [name for name, other in options.items() if other.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{option} is a section; its options are {', '.join(inside)}")
    names = {key: name for name, key in options.items()} | {name[2:]: name for name in more}
    raise UserError(f"unknown option {option}{_suggestion(key, names)}")


def _suggestion(key: str, names: Mapping[str, str]) -> str:
    guess = nearest(key, names)
    return f"; did you mean {names[guess]}?" if guess else "; --help lists all options"


def _join_negative_numbers(argv: Sequence[str]) -> list[str]:
    # argparse takes -0.8 for a value but -8e-1 for an option.
    joined: list[str] = []
    for argument in argv:
        if re.match(r"-\.?\d", argument) and joined and re.fullmatch(r"--[\w.-]+", joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _given(argv: Sequence[str]) -> dict[str, str]:
    """Option -> the text given for it, the last one of several."""
    given: dict[str, str] = {}
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        if option.startswith("--"):
            given[option] = value if equals else following
    return given


def _explain(text: str, cls: type, given: Mapping[str, object], spell: Callable[[str], str]) -> str:
    """jsonargparse's message, of several lines and in terms of Python, as one line in terms of the user."""
    known = field_types(cls)
    missing = [
        spell(field.name)
        for field in fields(cls)
        if field.default is MISSING and field.default_factory is MISSING and field.name not in given
    ]
    if missing and "required" in text:
        return f"missing {', '.join(missing)}"
    found = re.search(r'key "([\w.]+)"', text) or re.search(r"argument --([\w.-]+)", text)
    key = found[1].replace("-", "_") if found else ""
    if key not in known or key not in given:
        return " ".join(text.split())
    if "expected one argument" in text:
        return f"{spell(key)} needs a value: {describe_type(known[key])}"
    return f"{spell(key)} must be {describe_type(known[key])}, got {given[key]!r}"
