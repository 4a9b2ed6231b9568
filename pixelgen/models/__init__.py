"""Denoisers: their families, sizes and layers. Imports no torch by itself."""

from pixelgen.models import pixeldit_sizes, sizes  # register the families pixeldit and jit

__all__ = ["pixeldit_sizes", "sizes"]
