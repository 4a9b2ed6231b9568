"""Sources of images and the loader that feeds them to the trainer as uint8 batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixelgen.data.crop import center_crop
    from pixelgen.data.loader import Batch, Loader, build_loader
    from pixelgen.data.order import stream_indices
    from pixelgen.data.source import ReadBatch, Source, SourceOptions, build_dataset, register
    from pixelgen.data.sources.digits import Digits
    from pixelgen.data.sources.folder import ClassFolder
    from pixelgen.data.sources.hf import HubImages
    from pixelgen.data.sources.prepared import PreparedImages
    from pixelgen.data.sources.stream import HubStream
    from pixelgen.data.sources.synthetic import SyntheticImages

__all__ = [
    "Batch",
    "ClassFolder",
    "Digits",
    "HubImages",
    "HubStream",
    "Loader",
    "PreparedImages",
    "ReadBatch",
    "Source",
    "SourceOptions",
    "SyntheticImages",
    "build_dataset",
    "build_loader",
    "center_crop",
    "register",
    "stream_indices",
]

_HOME = {
    "crop": ("center_crop",),
    "loader": ("Batch", "Loader", "build_loader"),
    "order": ("stream_indices",),
    "source": ("ReadBatch", "Source", "SourceOptions", "build_dataset", "register"),
    "sources.digits": ("Digits",),
    "sources.folder": ("ClassFolder",),
    "sources.hf": ("HubImages",),
    "sources.prepared": ("PreparedImages",),
    "sources.stream": ("HubStream",),
    "sources.synthetic": ("SyntheticImages",),
}


def __getattr__(name: str) -> object:
    # The loader needs torch, the crops need Pillow; importing the package needs neither.
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"pixelgen.data.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
