"""The families of denoisers that are known by name, and their published sizes. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from pixelgen.errors import UserError

if TYPE_CHECKING:
    from pixelgen.models.denoiser import Denoiser

# Fields of every architecture that a run takes from its data.
DATA_FIELDS = ("image_size", "channels", "num_classes")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What every family's architecture has; each adds its own.

    Args:
        width: channels of the features that can be tapped.
        depth: number of blocks.
        patch_size: side P of a square patch in pixels.
        image_size: image side in pixels, or ``(height, width)``; both multiples of ``patch_size``.
        channels: image channels.
        num_classes: classes of the data.
    """

    width: int
    depth: int
    patch_size: int = 16
    image_size: int | tuple[int, int] = 256
    channels: int = 3
    num_classes: int = 1000

    def __post_init__(self) -> None:
        for name in ("width", "depth", "patch_size", "channels", "num_classes"):
            self._require(name, getattr(self, name) >= 1, "be at least 1")
        fits = all(side >= 1 and side % self.patch_size == 0 for side in self.image_height_width)
        self._require("image_size", fits, f"be a multiple of patch_size {self.patch_size}")

    def _require(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise UserError(f"{type(self).__name__}: {name} must {expected}, got {getattr(self, name)}")

    def without_dropout(self) -> Architecture:
        """The same weights without dropout and whatever else a resumed run may change."""
        return self

    @property
    def last_tap(self) -> int:
        """The largest L of ``Denoiser.forward_tokens``' ``tap``."""
        return self.depth - 1

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        height, width = self.image_height_width
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Image tokens T."""
        rows, columns = self.grid
        return rows * columns

    @property
    def patch_dim(self) -> int:
        """Values of one patch, P * P * channels."""
        return self.patch_size**2 * self.channels


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A kind of denoiser, known once it is registered.

    Attributes:
        name: what ``model.family`` calls it.
        config: frozen dataclass of the architecture. Its docstring explains the fields, each of which is an
            option of the ``model`` section, except those of ``DATA_FIELDS``.
        sizes: published architectures by name.
        module: where the denoiser is, ``"package.module:Class"``; imported when one is built.
    """

    name: str
    config: type[Architecture]
    sizes: Mapping[str, Architecture]
    module: str

    @property
    def options(self) -> list[str]:
        """Fields of the architecture that are options of a run."""
        return [field.name for field in fields(self.config) if field.name not in DATA_FIELDS]

    def denoiser(self) -> type[Denoiser]:
        """The class of the denoiser, imported when it is first asked for."""
        module, _, name = self.module.partition(":")
        return getattr(importlib.import_module(module), name)

    def architecture(self, size: str, **overrides: Any) -> Architecture:
        """The architecture of a published size with some fields replaced.

        Raises:
            UserError: unknown size; the message lists the known ones, or names the family that has it.
        """
        if size not in self.sizes:
            others = [name for name, other in FAMILIES.items() if size in other.sizes]
            hint = f", which is a size of model.family {others[0]}" if others else ""
            raise UserError(f"model.size must be one of {', '.join(self.sizes)}, got {size!r}{hint}")
        return replace(self.sizes[size], **overrides)


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Makes a family known to ``model.family``, before the command line is read; its name must be new."""
    if FAMILIES.setdefault(family.name, family) is not family:
        raise ValueError(f"family {family.name} is registered already")


def architecture_of_size(size: str) -> Architecture:
    """The architecture of a published size of any family.

    Raises:
        UserError: unknown size; the message lists the known ones.
    """
    for family in FAMILIES.values():
        if size in family.sizes:
            return family.sizes[size]
    known = ", ".join(name for family in FAMILIES.values() for name in family.sizes)
    raise UserError(f"size must be one of {known}, got {size!r}")


def family_of(architecture: Architecture) -> Family:
    """The family that an architecture belongs to; a ValueError where it was not registered."""
    for family in FAMILIES.values():
        if type(architecture) is family.config:
            return family
    raise ValueError(f"{type(architecture).__name__} is the architecture of no registered family")


def build_denoiser(architecture: Architecture, kernels: Literal["auto", "eager"] = "auto") -> Denoiser:
    """A fresh denoiser; ``kernels`` are ``"auto"``, the fused ops, or ``"eager"``, plain PyTorch."""
    return family_of(architecture).denoiser()(architecture, kernels)
