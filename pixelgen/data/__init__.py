"""Sources of images and the loader that feeds them to the trainer as uint8 batches."""

from __future__ import annotations

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
    "center_crop": "crop",
    "Digits": "sources.digits",
    "ClassFolder": "sources.folder",
    "HubImages": "sources.hf",
    "Batch": "loader",
    "Loader": "loader",
    "build_loader": "loader",
    "stream_indices": "order",
    "ReadBatch": "source",
    "Source": "source",
    "SourceOptions": "source",
    "build_dataset": "source",
    "register": "source",
    "PreparedImages": "sources.prepared",
    "HubStream": "sources.stream",
    "SyntheticImages": "sources.synthetic",
}


def __getattr__(name: str) -> object:
    # The loader needs torch, the crops need Pillow; importing the package needs neither.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"pixelgen.data.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
