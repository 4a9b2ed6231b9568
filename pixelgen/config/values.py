"""Plain values, as YAML and command lines give them, in the types of the options of a dataclass.

Fields that are dataclasses in turn are sections: ``train: {batch_size: 8}``. Imports no torch.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from pixelgen.errors import UserError

T = TypeVar("T")

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
WORDS = {int: "integer", float: "number", bool: "true|false", str: "text", type(None): "null"}


class Loader(yaml.SafeLoader):
    """Reads booleans as text, so that ``balance: off`` is the word; ``convert`` knows what is to be one."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def option_types(cls: type) -> dict[str, Any]:
    """Name -> type of the fields of a dataclass, annotations included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {item.name: hints[item.name] for item in fields(cls)}
    # a section whose options are known late says itself which it has by now
    return {name: hint.section() if hasattr(hint, "section") else hint for name, hint in found.items()}


def option_names(cls: type) -> Iterator[str]:
    """Dotted names of all sections and options of a dataclass."""
    for name, hint in option_types(cls).items():
        yield name
        if is_dataclass(hint):
            yield from (f"{name}.{inner}" for inner in option_names(hint))  # type: ignore[arg-type]


def describe_type(hint: Any) -> str:
    """A type as the user would write it down: ``float | None`` is "number|null"."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return "|".join(args)
    if get_origin(hint) is tuple:
        return f"[{', '.join('...' if part is Ellipsis else describe_type(part) for part in args)}]"
    return "|".join(map(describe_type, args)) or WORDS.get(hint, str(hint))


def convert(value: Any, hint: Any) -> Any:
    """A plain value in the type of an option; text is read as YAML unless the option takes text.

    Raises:
        ValueError: it is none of the type; the message says what is.
    """
    try:
        return _convert(value, hint)
    except (ValueError, OverflowError, yaml.YAMLError):
        got = "null" if value is None else repr(value)
        raise ValueError(f"must be {describe_type(hint)}, got {got}") from None


def _convert(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for part in args:
            with suppress(ValueError):
                return _convert(value, part)
    elif isinstance(value, str) and hint is not str and origin is not Literal:
        if hint is bool and value.lower() in BOOLEANS:
            return BOOLEANS[value.lower()]
        if hint is float:
            with suppress(ValueError):  # YAML 1.1 takes 1e-4 for text
                return float(value)
        read = yaml.load(value, Loader)  # a SafeLoader
        if not isinstance(read, str):
            return _convert(read, hint)
    elif origin is tuple and isinstance(value, list | tuple):
        parts = args[:1] * len(value) if args[-1] is Ellipsis else args
        return tuple(_convert(item, part) for item, part in zip(value, parts, strict=True))
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint or (origin is Literal and value in args):
        return value
    raise ValueError


def read_yaml(cls: type, content: bytes, into: dict[str, Any], source: str) -> None:
    """Puts the values of a YAML file over those that are there.

    Args:
        cls: the dataclass the values are for.
        content: of the file.
        into: converted values by name, those of a section in a mapping of their own.
        source: begins the error message; the file's name.

    Raises:
        UserError: not YAML, an unknown key (the nearest one is named), a value of the wrong type, no mapping.
    """
    try:
        mapping = yaml.load(content, Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}: not valid YAML{where}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not a YAML file: {' '.join(str(error).split())}") from None

    def walk(section: Any, node: Any, into: dict[str, Any], prefix: str) -> None:
        if not isinstance(node, Mapping):
            where = f"{prefix[:-1]} is a section and " if prefix else ""
            raise UserError(f"{source}: {where}must hold 'key: value' lines, got {node!r}")
        hints = option_types(section)
        for key, value in node.items():
            name, dot, rest = str(key).partition(".")
            hint = hints.get(name)
            if is_dataclass(hint):
                inside = {rest: value} if dot else {} if value is None else value
                walk(hint, inside, into.setdefault(name, {}), f"{prefix}{name}.")
            elif hint is None or dot:
                guess = nearest(f"{prefix}{key}", option_names(cls))
                meant = f"did you mean {guess}?" if guess else "--help lists all options"
                raise UserError(f"{source}: unknown key {prefix}{key}; {meant}")
            else:
                try:
                    into[name] = convert(value, hint)
                except ValueError as error:
                    raise UserError(f"{source}: {prefix}{name} {error}") from None

    walk(cls, {} if mapping is None else mapping, into, "")


def build(cls: type[T], values: dict[str, Any]) -> T:
    """A dataclass and its sections from values of their types; what is not named keeps its default."""
    hints = option_types(cls)
    sections: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    return cls(**values | {name: build(hint, values.get(name, {})) for name, hint in sections.items()})


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known dotted name closest to the whole of what a user wrote, or else to its last part; or None."""

    def likeness(other: str) -> float:
        return max(_ratio(name, other), _ratio(name.rpartition(".")[2], other.rpartition(".")[2]) - 0.2)

    best = max(known, key=likeness)
    return best if likeness(best) >= 0.6 else None


def _ratio(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name.replace("-", "_"), other.replace("-", "_")).ratio()
