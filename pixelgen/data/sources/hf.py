"""Data sets of the Hugging Face ``datasets`` library: from the hub, or from files of the kinds it reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pixelgen.data.encoded import EncodedImages
from pixelgen.data.hub import Columns, HubOptions, cell_name, encoded_image, open_images
from pixelgen.data.source import register
from pixelgen.data.sources.stream import HubStream

if TYPE_CHECKING:
    from datasets import Dataset

    from pixelgen.data.options import DataConfig


class HubImages(EncodedImages):
    """A data set of the ``datasets`` library, read from its memory-mapped Arrow files.

    Its images are decoded by `read_image`, so the same file gives the same pixels as in a `ClassFolder`.
    Where the label column does not name its classes, they are "0", "1" and so on.
    """

    def __init__(self, data: DataConfig, options: HubOptions) -> None:
        """Opens, and where needed downloads, the data set; no image is decoded yet."""
        self.path = str(options.path)
        rows, columns = open_images(options, data.num_classes)
        labels = _read_labels(rows, columns, self.path)
        super().__init__(data.image_size, data.channels, columns.class_names, labels, options.crop)
        self._image_column = columns.image
        self._rows = rows.select_columns([columns.image])

    def encoded(self, index: int) -> bytes | Path:
        """The encoded image ``index``, or the file that holds it; an empty row is an ImageError."""
        return encoded_image(self._rows[int(index)][self._image_column])

    def name(self, index: int) -> str:
        """The file, or the row and what its image is called there."""
        return cell_name(self._rows[int(index)][self._image_column], f"row {index} of {self.path}")


def _read_labels(rows: Dataset, columns: Columns, path: str) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    column, *field = columns.label
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    values = pc.cast(pc.struct_field(values, field) if field else values, pa.int64())
    labels = values.fill_null(-1).to_numpy()
    outside = (labels < 0) | (labels >= len(columns.class_names))
    if outside.any():
        row = int(outside.argmax())
        columns.check_label(values[row].as_py(), f"row {row} of {path}")
    return np.array(labels, dtype=np.int64)


register(
    "hf", HubOptions, path="a hub id, or a folder or pattern of parquet files, webdataset tars or images"
)(lambda data, options: (HubStream if options.streaming else HubImages)(data, options))
