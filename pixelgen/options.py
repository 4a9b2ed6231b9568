"""What a section of a configuration is: a dataclass of options that checks itself. Imports no torch."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass, replace
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
            raise UserError(f"{self.SECTION}{name} must {expected}, got {getattr(self, name)!r}")

    def _require_choices(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is Literal:
                choices = typing.get_args(hint)
                self._require(name, getattr(self, name) in choices, f"be one of {', '.join(choices)}")


@dataclass(frozen=True)
class Option:
    """An option that registered parts add to a section; ``owners`` are the names of these parts."""

    name: str
    type: Any
    default: Any
    help: str
    owners: tuple[str, ...]


def describe_options(cls: type) -> dict[str, str]:
    """The explanation of each field, from the ``Args:`` of a dataclass's docstring."""
    found = parse_docstring(cls.__doc__ or "").params
    return {item.arg_name: " ".join((item.description or "").split()) for item in found}


def added_options(parts: Mapping[str, type]) -> tuple[Option, ...]:
    """The options of some dataclasses; one that several of them have must be the same in all."""
    found: dict[str, Option] = {}
    for owner, part in parts.items():
        types, texts = typing.get_type_hints(part), describe_options(part)
        for item in fields(part):
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            option = Option(item.name, types[item.name], default, texts.get(item.name, ""), (owner,))
            before = found.get(item.name)
            if before is not None:
                if (before.type, before.default) != (option.type, default):
                    raise ValueError(f"option {item.name} of {owner} and of {before.owners[0]} must be alike")
                both = before.help if before.help == option.help else f"{before.help}; {option.help}"
                option = replace(before, help=both, owners=(*before.owners, owner))
            found[item.name] = option
    return tuple(found.values())


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
    def section(cls) -> type[Self]:
        """This class with the options of all parts that are registered by now, which are its ``added``."""
        return _with_parts(cls, tuple(cls.parts().items()))  # type: ignore[arg-type]

    def part(self, cls: type[P]) -> P:
        """The options of a part, as an instance of its own class."""
        return cls(**{item.name: getattr(self, item.name) for item in fields(cls)})  # type: ignore[arg-type]

    def own_values(self) -> dict[str, Any]:
        """Values by name, without the options of parts that are not chosen."""
        others = {option.name for option in self._options_of_others()}
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in others}  # type: ignore[arg-type]

    def _options_of_others(self) -> list[Option]:
        chosen = self.CHOOSES and getattr(self, self.CHOOSES)
        return [option for option in self.added if chosen and chosen not in option.owners]

    def _require_own_options(self) -> None:
        """Refuses a part that is not registered, and an option of a part that is not the chosen one."""
        assert self.CHOOSES is not None
        chosen = getattr(self, self.CHOOSES)
        self._require(self.CHOOSES, chosen in self.parts(), f"be one of {', '.join(self.parts())}")
        for option in self._options_of_others():
            if getattr(self, option.name) != option.default:
                raise UserError(
                    f"{self.SECTION}{option.name} is an option of {self.SECTION}{self.CHOOSES} "
                    f"{' and '.join(option.owners)}, not of {chosen}: leave it out"
                )

    def __new__(cls, **values: Any) -> Self:
        """An instance with the options of all parts."""
        return super().__new__(cls if hasattr(cls, "added") else cls.section())

    def __reduce__(self) -> Any:  # each process makes its own class
        values = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        return partial(type(self).__mro__[1], **values), ()


@lru_cache(maxsize=8)
def _with_parts(cls: type[OpenSection], parts: tuple[tuple[str, type], ...]) -> Any:
    """A section with the options that parts add to it, explained in its docstring."""
    options = added_options(dict(parts))
    added: list[Any] = [(option.name, option.type, field(default=option.default)) for option in options]
    if cls.CHOOSES is not None:
        default = next(item.default for item in fields(cls) if item.name == cls.CHOOSES)  # type: ignore[arg-type]
        added.insert(0, (cls.CHOOSES, Literal[tuple(name for name, _ in parts)], field(default=default)))
    made = make_dataclass(
        cls.__name__, added, bases=(cls,), frozen=True, kw_only=True, namespace={"added": options}
    )
    made.__module__ = cls.__module__
    form = "        {0}: {1}" if cls.CHOOSES is None else "        {0}: for {2}: {1}"
    lines = [form.format(option.name, option.help, " and ".join(option.owners)) for option in options]
    first = {name: (part.__doc__ or "").partition("\n")[0].rstrip(".") for name, part in parts}
    about = "; ".join(f"{name} is {line[:1].lower()}{line[1:]}" for name, line in first.items())
    made.__doc__ = "\n".join([(cls.__doc__ or "").replace("{parts}", about).rstrip(), *lines])
    return made
