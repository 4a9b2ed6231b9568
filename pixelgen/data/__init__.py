"""Image datasets and the loader that feeds them to the trainer as uint8 batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixelgen.data.crop import center_crop
    from pixelgen.data.digits import Digits
    from pixelgen.data.folder import ClassFolder
    from pixelgen.data.hf import HubImages
    from pixelgen.data.loader import Batch, ImageDataset, Loader, build_dataset, build_loader, stream_indices
    from pixelgen.data.prepared import PreparedImages
    from pixelgen.data.streaming import HubStream
    from pixelgen.data.synthetic import SyntheticImages

__all__ = [
    "Batch",
    "ClassFolder",
    "Digits",
    "HubImages",
    "HubStream",
    "ImageDataset",
    "Loader",
    "PreparedImages",
    "SyntheticImages",
    "build_dataset",
    "build_loader",
    "center_crop",
    "stream_indices",
]

_HOME = {
    "center_crop": "crop",
    "Digits": "digits",
    "ClassFolder": "folder",
    "HubImages": "hf",
    "Batch": "loader",
    "ImageDataset": "loader",
    "Loader": "loader",
    "build_dataset": "loader",
    "build_loader": "loader",
    "stream_indices": "loader",
    "PreparedImages": "prepared",
    "HubStream": "streaming",
    "SyntheticImages": "synthetic",
}


def __getattr__(name: str) -> object:
    # The datasets need torch and Pillow; importing the package needs neither.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"pixelgen.data.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
