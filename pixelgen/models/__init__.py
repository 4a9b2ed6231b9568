"""Denoisers: their families, sizes and layers. Imports no torch by itself."""

from pixelgen.models import sizes  # registers the family jit

__all__ = ["sizes"]
