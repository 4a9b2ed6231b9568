"""Sources of images and the loader that feeds them to the trainer as uint8 batches."""

from typing import TYPE_CHECKING

from pixelgen.data.order import Share as Share
from pixelgen.data.order import shuffled_indices as shuffled_indices
from pixelgen.data.source import ReadBatch as ReadBatch
from pixelgen.data.source import Source as Source
from pixelgen.data.source import SourceOptions as SourceOptions
from pixelgen.data.source import build_dataset as build_dataset
from pixelgen.data.source import register as register
from pixelgen.data.sources.digits import Digits as Digits
from pixelgen.data.sources.folder import ClassFolder as ClassFolder
from pixelgen.data.sources.hf import HubImages as HubImages
from pixelgen.data.sources.prepared import PreparedImages as PreparedImages
from pixelgen.data.sources.stream import HubStream as HubStream
from pixelgen.data.sources.synthetic import SyntheticImages as SyntheticImages

if TYPE_CHECKING:
    from pixelgen.data.crop import center_crop as center_crop
    from pixelgen.data.loader import Batch as Batch
    from pixelgen.data.loader import Loader as Loader
    from pixelgen.data.loader import build_loader as build_loader


def __getattr__(name: str) -> object:
    # The crops need Pillow, the loader needs torch; importing the package needs neither.
    if name not in ("center_crop", "Batch", "Loader", "build_loader"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pixelgen.data import crop, loader

    return getattr(crop if name == "center_crop" else loader, name)
