"""What a section of a configuration is: a dataclass of options that checks itself. Imports no torch."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal, Self, TypeVar

from docstring_parser import parse as parse_docstring

from pixelgen.errors import UserError

P = TypeVar("P", bound="Section")


class Section:
    """Checks that need no more than the section itself; messages name the option, as the user spells it."""

    SECTION: ClassVar[str] = ""

    def _require(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            value = getattr(self, name)
            raise UserError(f"{self.SECTION}{name} must {expected}, got {value!r}")

    def _require_choices(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is Literal:
                choices = typing.get_args(hint)
                self._require(name, getattr(self, name) in choices, f"be one of {', '.join(choices)}")


@dataclass(frozen=True)
class Option:
    """An option that a registered part adds to a section.

    Attributes:
        name: as the user spells it, without the section.
        hint: its type.
        default: its value where it is not given.
        text: its explanation.
        owners: names of the parts that have it.
    """

    name: str
    hint: Any
    default: Any
    text: str
    owners: tuple[str, ...]


def describe_options(cls: type) -> dict[str, str]:
    """The explanation of each field, from the ``Args:`` of a dataclass's docstring."""
    found = parse_docstring(cls.__doc__ or "").params
    return {item.arg_name: " ".join((item.description or "").split()) for item in found}


def added_options(parts: Mapping[str, type]) -> list[Option]:
    """The options of some dataclasses; one that several of them have must be the same in all."""
    found: dict[str, Option] = {}
    for owner, part in parts.items():
        hints, texts = typing.get_type_hints(part), describe_options(part)
        for item in fields(part):
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            text = texts.get(item.name, "")
            if item.name not in found:
                found[item.name] = Option(item.name, hints[item.name], default, text, (owner,))
                continue
            before = found[item.name]
            if (before.hint, before.default) != (hints[item.name], default):
                raise ValueError(f"option {item.name} of {owner} and of {before.owners[0]} must be alike")
            told = before.text if before.text == text else f"{before.text}; {text}"
            found[item.name] = Option(item.name, before.hint, default, told, (*before.owners, owner))
    return list(found.values())


class OpenSection(Section):
    """A section that has, besides its own options, those of everything that is registered by now.

    In its docstring ``{parts}`` stands for the names and first lines of what is registered.

    ``DataConfig(name="hf", streaming=True)`` gives an instance of a class with the options of all sources,
    though it was declared with none of them.
    """

    #: The option that chooses one part, such as ``name``; None where all parts act together.
    CHOOSES: ClassVar[str | None] = None

    if typing.TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def parts(cls) -> Mapping[str, type]:
        """Dataclasses of options by the names of the parts that have them."""
        raise NotImplementedError

    @classmethod
    def added(cls) -> tuple[Option, ...]:
        """What the parts add to the section."""
        return _added(tuple(cls.parts().items()))

    @classmethod
    def section(cls) -> type[Self]:
        """This class with the options of all parts that are registered by now."""
        return _grown(cls, cls.added(), tuple(cls.parts()))  # type: ignore[arg-type]

    def part(self, cls: type[P]) -> P:
        """The options of a part, as an instance of its own class."""
        return cls(**{item.name: getattr(self, item.name) for item in fields(cls)})  # type: ignore[arg-type]

    def is_own(self, option: Option) -> bool:
        """Whether an added option is one of the part that this section chooses."""
        return self.CHOOSES is None or getattr(self, self.CHOOSES) in option.owners

    def own_values(self) -> dict[str, Any]:
        """Values by name, without the options of parts that are not chosen."""
        others = {option.name for option in self.added() if not self.is_own(option)}
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in others}  # type: ignore[arg-type]

    def _require_own_options(self) -> None:
        """Refuses a part that is not registered, and an option of a part that is not the chosen one."""
        if self.CHOOSES is None:
            return
        chosen = getattr(self, self.CHOOSES)
        self._require(self.CHOOSES, chosen in self.parts(), f"be one of {', '.join(self.parts())}")
        for option in self.added():
            if not self.is_own(option) and getattr(self, option.name) != option.default:
                raise UserError(
                    f"{self.SECTION}{option.name} is an option of {self.SECTION}{self.CHOOSES} "
                    f"{' and '.join(option.owners)}, not of {chosen}: leave it out"
                )

    def __new__(cls, **values: Any) -> Self:
        """An instance with the options of all parts."""
        return super().__new__(cls if hasattr(cls, "_is_grown") else cls.section())

    def __reduce__(self) -> Any:  # each process makes its own class
        values = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        return partial(type(self).__mro__[1], **values), ()


@lru_cache(maxsize=8)
def _added(parts: tuple[tuple[str, type], ...]) -> tuple[Option, ...]:
    return tuple(added_options(dict(parts)))


@lru_cache(maxsize=8)
def _grown(cls: type[OpenSection], options: tuple[Option, ...], names: Iterable[str]) -> Any:
    """A section with the options that parts add to it, explained in its docstring."""
    added: list[Any] = [(option.name, option.hint, field(default=option.default)) for option in options]
    if cls.CHOOSES is not None:
        default = next(item.default for item in fields(cls) if item.name == cls.CHOOSES)  # type: ignore[arg-type]
        added.insert(0, (cls.CHOOSES, Literal[tuple(names)], field(default=default)))
    made = make_dataclass(
        cls.__name__, added, bases=(cls,), frozen=True, kw_only=True, namespace={"_is_grown": True}
    )
    made.__module__ = cls.__module__
    of_parts = "for {}: {}" if cls.CHOOSES is not None else "{1}"
    lines = [f"        {o.name}: {of_parts.format(' and '.join(o.owners), o.text)}" for o in options]
    first = {name: (part.__doc__ or "").partition("\n")[0].rstrip(".") for name, part in cls.parts().items()}
    about = "; ".join(f"{name} is {line[:1].lower()}{line[1:]}" for name, line in first.items())
    made.__doc__ = "\n".join([(cls.__doc__ or "").replace("{parts}", about).rstrip(), *lines])
    return made
