"""Denoisers: ``JiT`` (class-conditional) and the table of published sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pixelgen.models.sizes import SIZES, ModelConfig, model_config

if TYPE_CHECKING:
    from pixelgen.models.jit import JiT

__all__ = ["SIZES", "JiT", "ModelConfig", "model_config"]


def __getattr__(name: str) -> object:
    # JiT needs torch; the table of sizes, which every command line reads, does not.
    if name == "JiT":
        from pixelgen.models.jit import JiT

        return JiT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
