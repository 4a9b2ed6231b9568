"""From the bytes of an image file of any kind to a square of uint8 pixels."""

from __future__ import annotations

import io
import os
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pixelgen.data.crop import center_crop, halve, near_center_crop, random_crop
from pixelgen.data.source import Crop, ImageError

# Pixels of an image whose short side is scaled to the target. A crop may make all of them: without a bound a
# file of 200 bytes, of 1 x 60,000 pixels, takes 16 GB. At 256 px this is a long side of 1,024 short ones.
MAX_SCALED_PIXELS = 2**26

# What Pillow raises on a file that is no image, cut short or damaged (PNG chunks: SyntaxError, struct.error;
# AVIF: RuntimeError).
_UNREADABLE = (
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(
    source: bytes | str | os.PathLike[str],
    image_size: int,
    channels: int,
    crop: Crop = "center",
    draws: np.ndarray | None = None,
) -> np.ndarray:
    """Decodes an image and cuts a square from it.

    Pictures are taken as stored: EXIF orientation is ignored, as in the reference pipelines. Transparent
    pixels are laid on white; 16-bit grey becomes 8-bit; other modes become RGB or grey.

    Args:
        source: the file's bytes, or its path.
        image_size: side of the square, in pixels.
        channels: 3 for RGB, 1 for grey.
        crop: center cuts the middle square exactly as ADM does; fast is within 2 grey levels of it, at twice
            the speed for JPEG up to twice that size; random is ADM's random crop.
        draws: for random, (3,) uniform numbers in [0, 1) that it is a function of; None for the middle.

    Returns:
        uint8 (channels, image_size, image_size).

    Raises:
        ImageError: the file cannot be read as an image.
    """
    mode = "RGB" if channels == 3 else "L"
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        if not data:
            raise ImageError("the file is empty")
        image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
        if max(image.size) * image_size**2 > MAX_SCALED_PIXELS * min(image.size):
            raise ImageError(f"its sides are too unequal, {image.width} x {image.height}")
        # Decoders are bit-equal and cost a fifth of this: the exact crop gains nothing from another one.
        quick = _decode_quickly(image, data, image_size, mode) if crop == "fast" else None
        if quick is None:
            image.load()
            image = _to_mode(image, mode)
    except _UNREADABLE as error:
        raise ImageError(_reason(error)) from error
    if crop == "fast":
        return _crop_near(image if quick is None else quick, image_size)
    if crop == "random" and draws is not None:
        pixels = random_crop(image, image_size, draws)
    else:
        pixels = center_crop(image, image_size)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@cache
def _formats() -> tuple[str, ...]:
    """The kinds of files that are read; Pillow knows 35 more, some of which run other programs."""
    Image.init()
    # JPEG stands for MPO, too. Pillow has AVIF since 11.3.
    kinds = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF", "TIFF", "JPEG2000", "AVIF")
    return tuple(kind for kind in kinds if kind in Image.OPEN)


def _decode_quickly(image: Image.Image, data: bytes, image_size: int, mode: str) -> np.ndarray | None:
    """Pixels (H, W, C) of a plain JPEG that is opened and not yet decoded; None where Pillow has to do it."""
    # Halving and tall images are Pillow's in the crop, so it decodes them, too.
    is_plain = min(image.size) < 2 * image_size and image.height <= 2 * image.width
    if not is_plain or image.format != "JPEG" or image.mode not in ("L", mode):
        return None
    import simplejpeg

    try:
        # 1.2 ms for 500x375 where Pillow takes 1.8; a buffer of its own would be zeroed first, 0.1 ms.
        buffer = np.empty((image.height, image.width, len(mode)), dtype=np.uint8)
        return simplejpeg.decode_jpeg(data, "RGB" if mode == "RGB" else "GRAY", buffer=buffer)
    except ValueError:
        return None  # damaged: Pillow decides, as for the other crops


def _crop_near(image: Image.Image | np.ndarray, image_size: int) -> np.ndarray:
    """The crop "fast", (C, image_size, image_size), of a decoded image or of pixels that need no halving."""
    import torch

    if isinstance(image, Image.Image):
        image = halve(image, image_size)
        if image.height > 2 * image.width:
            # Pillow may filter the columns first here, which the quicker filter would be 30 levels off.
            return np.ascontiguousarray(center_crop(image, image_size).transpose(2, 0, 1))
        image = np.array(image).reshape(image.height, image.width, -1)
    return near_center_crop(torch.from_numpy(image).permute(2, 0, 1), image_size)


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


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known kind"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # str(error) would hold the path, too
    return " ".join(str(error).split()) or type(error).__name__
