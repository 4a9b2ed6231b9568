"""Denoisers: their families, sizes and layers."""
