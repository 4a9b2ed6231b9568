"""The ``data`` section of a configuration. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pixelgen.options import Section


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What to train on.

    Args:
        name: digits is the embedded set of 1,797 real 8x8 images; folder reads one sub-folder per class;
            prepared reads what pixelgen.data.prepare wrote; hf is a data set of the Hugging Face library;
            synthetic is noise that costs no reading, to measure the rest.
        path: for folder the folder of class folders, for prepared the folder that prepare wrote, for hf a hub
            id, or a folder or pattern of parquet files, webdataset tars or images.
        subset: for hf, name of the data set's configuration, where it has several.
        split: for hf, the split.
        image_column: for hf, the column of the images; null finds it.
        label_column: for hf, the column of the class numbers; null finds it.
        streaming: for hf, read the data set as a stream instead of downloading it first.
        shuffle_block: for streaming, images that are shuffled among each other.
        image_size: side of the square images in pixels.
        channels: 1 for grey, 3 for RGB.
        num_classes: number of classes; the model has one more, the null label.
        crop: center cuts the middle square exactly as ADM does; fast is within 2 grey levels of it; random
            cuts a square at random, of 80 % of the short side or more.
        flip: mirror every other image at random. Digits and letters must not be mirrored.
        workers: processes that read images; 0 reads in the training process.
        max_broken: images that cannot be read are replaced by others and reported; above this share of the
            images drawn, the run stops.
    """

    SECTION = "data."

    name: Literal["digits", "folder", "prepared", "hf", "synthetic"] = "digits"
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool = False
    shuffle_block: int = 10_000
    image_size: int = 8
    channels: int = 1
    num_classes: int = 10
    crop: Literal["center", "fast", "random"] = "center"
    flip: bool = False
    workers: int = 0
    max_broken: float = 0.01

    def __post_init__(self) -> None:
        self._require_choices()
        self._require("image_size", self.image_size >= 1, "be at least 1")
        self._require("channels", self.channels in (1, 3), "be 1 (grey) or 3 (RGB)")
        self._require("num_classes", self.num_classes >= 1, "be at least 1")
        self._require("workers", self.workers >= 0, "be 0 or more")
        self._require("shuffle_block", self.shuffle_block >= 1, "be at least 1")
        self._require("max_broken", 0 <= self.max_broken <= 1, "lie in [0, 1]")
        is_stream = not self.streaming or self.name == "hf"
        self._require("streaming", is_stream, f"be false for data.name {self.name}: only hf can be streamed")
        has_files = self.crop == "center" or self.name in ("folder", "hf")
        self._require("crop", has_files, f"be center for data.name {self.name}: its images have their size")
