"""A folder with one sub-folder of images per class."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixelgen.data.crop import center_crop
from pixelgen.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")

# What Pillow raises on a file that is no image, cut short or damaged (PNG chunks: SyntaxError, struct.error).
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ClassFolder:
    """Images of ``root/<class>/**/<file>``, centre-cropped as ADM does; labels follow the sorted class names.

    Hidden files and folders (a leading dot) are skipped. Pictures are taken as stored: EXIF orientation is
    ignored, as in the reference pipelines. Transparent pixels are laid on white; 16-bit grey becomes 8-bit.

    Attributes:
        labels: (len,) int64, one per image.
        num_classes, class_names: number and sorted names of the class folders.
    """

    def __init__(self, root: str | os.PathLike[str], image_size: int, channels: int = 3):
        """Lists the images; none is opened yet.

        Args:
            root: folder that holds the class folders.
            image_size: side of the square crop, in pixels.
            channels: 3 for RGB, 1 for grey.

        Raises:
            FileNotFoundError: root does not exist.
            UserError: root is a file, has no class folder, or a class folder has no image; or a bad size or
                channel count.
        """
        if image_size < 1:
            raise UserError(f"ClassFolder: image_size must be at least 1, got {image_size}")
        if channels not in (1, 3):
            raise UserError(f"ClassFolder: channels must be 1 or 3, got {channels}")
        self.root = Path(root)
        self.image_size = image_size
        self.channels = channels
        self.class_names = _find_classes(self.root)
        self.num_classes = len(self.class_names)
        paths, labels = _find_images(self.root, self.class_names)
        # One array of bytes, not a million str: by counting references to those, a worker copies them.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels: Tensor = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """Returns the file that holds image ``index``."""
        return Path(os.fsdecode(self._paths[index].item()))

    def name(self, index: int) -> str:
        """Returns the path of image ``index``."""
        return str(self.path(index))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns image ``index`` as uint8 (C, H, W) and its label.

        Raises:
            UserError: the file cannot be read as an image; the message names it.
        """
        return torch.from_numpy(self._read(index)), int(self.labels[index])

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns the images (B, C, H, W) uint8 and labels (B,) int64 of ``indices`` (B,).

        Raises:
            UserError: a file cannot be read as an image; the message names it.
        """
        images = np.empty((len(indices), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        for row, index in enumerate(indices):
            images[row] = self._read(index)
        return torch.from_numpy(images), self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def _read(self, index: int) -> np.ndarray:
        path = self.path(index)
        try:
            with Image.open(path) as image:
                image.load()
                pixels = center_crop(_to_mode(image, "RGB" if self.channels == 3 else "L"), self.image_size)
        except _UNREADABLE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"data: cannot read image {path}: {reason}; repair or remove the file") from error
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _find_classes(root: Path) -> tuple[str, ...]:
    """Sorted names of the class folders of ``root``."""
    if not root.exists():
        raise FileNotFoundError(
            f"data: folder {root} does not exist; data.path must hold one sub-folder of images per class"
        )
    if not root.is_dir():
        raise UserError(
            f"data: {root} is a file; data.path must be a folder with one sub-folder of images per class"
        )
    names = sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise UserError(
            f"data: no class folders in {root}; data.path must hold one sub-folder of images per class"
        )
    return tuple(names)


def _find_images(root: Path, class_names: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """Paths and labels of all images, sorted by class and path."""
    from torchvision.datasets.folder import make_dataset

    def is_image(path: str) -> bool:
        parts = Path(path).relative_to(root).parts
        return path.lower().endswith(EXTENSIONS) and not any(part.startswith(".") for part in parts)

    class_to_index = {name: index for index, name in enumerate(class_names)}
    found = make_dataset(str(root), class_to_index, is_valid_file=is_image, allow_empty=True)
    kinds = " ".join(extension.removeprefix(".") for extension in EXTENSIONS)
    if not found:
        raise UserError(
            f"data: no images in the {len(class_names)} class folders of {root}; looked for {kinds}"
        )
    labels = [label for _, label in found]
    empty = sorted(set(range(len(class_names))) - set(labels))
    if empty:
        shown = ", ".join(class_names[label] for label in empty[:3]) + (", ..." if len(empty) > 3 else "")
        raise UserError(
            f"data: {len(empty)} of {len(class_names)} class folders of {root} hold no images ({shown}); "
            f"looked for {kinds}"
        )
    return [path for path, _ in found], labels


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Converts a decoded image of any mode to "RGB" or "L"."""
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion would clip everything above 255 to white.
        levels = np.asarray(image).astype(np.float64) * (255 / 65535)
        image = Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == mode else image.convert(mode)
