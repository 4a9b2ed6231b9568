"""The ``model`` section of a configuration: the options of every family of denoisers. Imports no torch."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field, fields, make_dataclass
from functools import lru_cache, partial
from typing import Any

from docstring_parser import parse as parse_docstring

from pixelgen.config_sections import DataConfig, Section
from pixelgen.errors import UserError
from pixelgen.models.families import DATA_FIELDS, FAMILIES, Architecture, Family


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Section):
    """Architecture of the denoiser: a named size of its family, and what differs from it.

    The options of every registered family are added by ``model_options``; null keeps the size's own value.
    Image size, channels and classes come from the data section.

    Args:
        family: kind of denoiser; jit is the transformer of PixelGen and JiT.
        size: a published size such as PixelGen-XL/16, JiT-B/16 or JiT-L/32, or tiny/2, tiny/4.
    """

    SECTION = "model."

    family: str = "jit"
    size: str = "tiny/2"

    def __post_init__(self) -> None:
        self._require("family", self.family in FAMILIES, f"be one of {', '.join(FAMILIES)}")
        own = FAMILIES[self.family].options
        for name in (item.name for item in fields(self)):
            if name in ("family", "size") or name in own or getattr(self, name) is None:
                continue
            owner = next(other.name for other in FAMILIES.values() if name in other.options)
            raise UserError(
                f"model.{name} is an option of model.family {owner}, not of {self.family}: leave it out"
            )
        FAMILIES[self.family].architecture(self.size)

    def __new__(cls, **values: Any) -> ModelOptions:
        """An instance with the options of all families."""
        return super().__new__(cls.section() if cls is ModelOptions else cls)

    def __reduce__(self) -> Any:  # each process makes its own class
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return partial(ModelOptions, **values), ()

    @classmethod
    def section(cls) -> type[ModelOptions]:
        """This class with the options of all families that are registered by now."""
        return model_options(tuple(FAMILIES.values()))

    def architecture(self, data: DataConfig) -> Architecture:
        """The family's architecture: the named size, what differs from it, the shapes of the data.

        Raises:
            UserError: the parts do not fit, such as a patch size that does not divide the image size.
        """
        family = FAMILIES[self.family]
        given = {name: getattr(self, name, None) for name in family.options}
        overrides = {name: value for name, value in given.items() if value is not None}
        of_data = {name: getattr(data, name) for name in DATA_FIELDS}
        return family.architecture(self.size, **of_data, **overrides)


@lru_cache(maxsize=1)
def model_options(families: tuple[Family, ...]) -> type[ModelOptions]:
    """``ModelOptions`` with the options of these families, explained by their own docstrings."""
    hints: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for family in families:
        of_family = typing.get_type_hints(family.config)
        explained = {
            item.arg_name: item.description for item in parse_docstring(family.config.__doc__).params
        }
        for name in family.options:
            hints.setdefault(name, of_family[name] | None)
            texts.setdefault(name, " ".join((explained.get(name) or "").split()))
    added: list[Any] = [(name, hint, field(default=None)) for name, hint in hints.items()]
    made = make_dataclass("ModelOptions", added, bases=(ModelOptions,), frozen=True, kw_only=True)
    made.__module__ = __name__
    lines = [f"        {name}: {text}" for name, text in texts.items()]
    made.__doc__ = "\n".join([(ModelOptions.__doc__ or "").rstrip(), *lines])
    return made
