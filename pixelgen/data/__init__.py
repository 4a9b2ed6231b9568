"""Image datasets and the loader that feeds them to the trainer as uint8 batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixelgen.data.crop import center_crop
    from pixelgen.data.digits import Digits
    from pixelgen.data.folder import ClassFolder
    from pixelgen.data.loader import ImageDataset, build_dataset, build_loader, stream_indices

__all__ = [
    "ClassFolder",
    "Digits",
    "ImageDataset",
    "build_dataset",
    "build_loader",
    "center_crop",
    "stream_indices",
]

_HOME = {
    "center_crop": "crop",
    "Digits": "digits",
    "ClassFolder": "folder",
    "ImageDataset": "loader",
    "build_dataset": "loader",
    "build_loader": "loader",
    "stream_indices": "loader",
}


def __getattr__(name: str) -> object:
    # The datasets need torch and Pillow; importing the package needs neither.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"pixelgen.data.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
