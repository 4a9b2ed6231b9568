"""The ``model`` section of a configuration: the options of every family of denoisers. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, get_type_hints

from pixelgen.models.families import DATA_FIELDS, FAMILIES, Architecture, Family
from pixelgen.options import OpenSection

if TYPE_CHECKING:
    from pixelgen.data.options import DataConfig


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OpenSection):
    """Architecture of the denoiser: a named size of its family, and what differs from it.

    The options of a family are the fields of its architecture; null keeps the size's own value. Image size,
    channels and classes come from the data section.

    Args:
        family: kind of denoiser; jit is the transformer of PixelGen and JiT, pixeldit has patch and pixel
            blocks.
        size: a published size such as PixelGen-XL/16, JiT-B/16 or JiT-L/32, or tiny/2, tiny/4; of pixeldit
            PixelDiT-B/16, PixelDiT-L/16, PixelDiT-XL/16, or PixelDiT-tiny/4, PixelDiT-tiny/8.
    """

    SECTION = "model."
    CHOOSES = "family"

    family: str = "jit"
    size: str = "tiny/2"

    def __post_init__(self) -> None:
        self._require_own_options()
        FAMILIES[self.family].architecture(self.size)

    @classmethod
    def parts(cls) -> Mapping[str, type]:
        """The architectures of the families that are registered by now, with nothing but options."""
        return {name: _with_nulls(family) for name, family in sorted(FAMILIES.items())}

    def architecture(self, data: DataConfig) -> Architecture:
        """The family's architecture: the named size, what differs from it, the shapes of the data."""
        family = FAMILIES[self.family]
        given = {name: getattr(self, name) for name in family.options}
        overrides = {name: value for name, value in given.items() if value is not None}
        shapes = {name: getattr(data, name) for name in DATA_FIELDS}
        return family.architecture(self.size, **shapes, **overrides)


@lru_cache
def _with_nulls(family: Family) -> type:
    """The options of a family as a dataclass, each of which may be null, and is by default."""
    types = get_type_hints(family.config)
    options = [(name, types[name] | None, None) for name in family.options]
    return make_dataclass(family.name, options, namespace={"__doc__": family.config.__doc__})
