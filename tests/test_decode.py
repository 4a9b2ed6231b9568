"""From bytes to pixels: every kind of file, every crop, and what is wrong with damaged files."""

import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageFile, features

from pixelgen.data.crop import center_crop, random_crop
from pixelgen.data.decode import ImageError, read_image


def natural(width, height, seed=0):
    """Smooth noise at several scales, as photographs have it."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for scale in range(1, 8):
        grid = rng.normal(size=(min(2**scale, height), min(2**scale, width), 3)).astype(np.float32)
        bands = [Image.fromarray(grid[..., band]).resize((width, height), 3) for band in range(3)]
        pixels += 0.6**scale * np.stack([np.asarray(band) for band in bands], -1)
    pixels = 127 + 55 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pillow(data, size, mode="RGB"):
    return center_crop(Image.open(io.BytesIO(data)).convert(mode), size).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("sides", "size"),
    [
        ((500, 375), 256),
        ((375, 500), 256),
        ((256, 256), 256),
        ((801, 603), 256),
        ((1030, 1201), 256),
        ((200, 700), 150),  # Pillow filters the columns of so tall an image first
        ((60, 90), 256),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_of_jpeg(sides, size, channels, tmp_path):
    data = encode(natural(*sides), quality=90)
    exact = pillow(data, size, "RGB" if channels == 3 else "L")
    got = read_image(data, size, channels)
    np.testing.assert_array_equal(got, exact, strict=True)
    assert got.flags.c_contiguous
    fast = read_image(data, size, channels, "fast")
    assert fast.dtype == np.uint8
    assert fast.shape == (channels, size, size)
    assert np.abs(fast.astype(int) - exact).max() <= 2
    (tmp_path / "a.jpg").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", size, channels, "fast"), fast)


def test_fast_is_another_filter_for_jpeg_of_colour_and_grey():
    # Otherwise the tests above would pass by the exact crop standing in for it.
    for image in (natural(500, 375), natural(500, 375).convert("L")):
        data = encode(image)
        channels = len(image.getbands())
        assert (read_image(data, 256, channels, "fast") != read_image(data, 256, channels)).any()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_fast_decodes_the_pixels_that_pillow_does(subsampling, progressive):
    # At its own size an image is not filtered, so only the decoders are compared.
    data = encode(natural(64, 64), quality=80, subsampling=subsampling, progressive=progressive)
    np.testing.assert_array_equal(read_image(data, 64, 3, "fast"), read_image(data, 64, 3))


def test_random_crop_is_that_of_the_draws():
    data = encode(natural(90, 70))
    draws = np.array([0.4, 0.9, 0.1], dtype=np.float32)
    expected = random_crop(Image.open(io.BytesIO(data)), 32, draws).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_image(data, 32, 3, "random", draws), expected)


def _odd_images():
    grey16 = Image.fromarray(np.full((9, 9), 32896, dtype=np.uint16))  # 128 * 257
    return {
        "palette": (Image.new("RGB", (9, 9), (0, 0, 255)).convert("P"), "PNG", (0, 0, 255)),
        "clear": (Image.new("RGBA", (9, 9), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        "half": (Image.new("LA", (9, 9), (0, 128)), "PNG", (127, 127, 127)),
        "grey": (Image.new("L", (9, 9), 77), "PNG", (77, 77, 77)),
        "grey jpeg": (Image.new("L", (9, 9), 77), "JPEG", (77, 77, 77)),
        "grey16": (grey16, "PNG", (128, 128, 128)),
        "bit": (Image.new("1", (9, 9), 1), "PNG", (255, 255, 255)),
        "cmyk": (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        "webp": (Image.new("RGB", (9, 9), (99, 99, 99)), "WEBP", (99, 99, 99)),
        "gif": (Image.new("RGB", (9, 9), (0, 0, 255)), "GIF", (0, 0, 255)),
        "tiff": (Image.new("RGB", (9, 9), (99, 99, 99)), "TIFF", (99, 99, 99)),
        "bmp": (Image.new("RGB", (9, 9), (99, 99, 99)), "BMP", (99, 99, 99)),
        "ppm": (Image.new("RGB", (9, 9), (99, 99, 99)), "PPM", (99, 99, 99)),
    }


@pytest.mark.parametrize(("image", "kind", "rgb"), _odd_images().values(), ids=_odd_images())
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["center", "fast", "random"])
def test_every_mode(image, kind, rgb, channels, crop):
    got = read_image(encode(image, kind), 8, channels, crop, np.array([0.5, 0.5, 0.5]))
    expected = rgb if channels == 3 else (Image.new("RGB", (1, 1), rgb).convert("L").getpixel((0, 0)),)
    assert np.abs(got.astype(int) - np.reshape(expected, (-1, 1, 1))).max() <= 2


def test_orientation_is_ignored():
    image = natural(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned, plain = encode(image, exif=exif), encode(image)
    assert turned != plain
    for crop in ("center", "fast"):
        np.testing.assert_array_equal(read_image(turned, 16, 3, crop), read_image(plain, 16, 3, crop))


@pytest.mark.parametrize("crop", ["center", "fast"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"", "the file is empty"),
        (lambda data: b"hello", "not an image of a known kind"),
        (lambda data: data[:10], "Truncated File Read"),
        (lambda data: data[: len(data) // 2], "image file is truncated"),
        (lambda data: data[:-40], "image file is truncated"),
    ],
)
def test_damaged_jpeg(crop, change, reason, tmp_path):
    data = change(encode(natural(90, 70)))
    with pytest.raises(ImageError, match=reason) as raised:
        read_image(data, 64, 3, crop)
    assert "\n" not in str(raised.value)
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as raised:
        read_image(path, 64, 3, crop)
    assert "broken" not in str(raised.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF"])
def test_any_damage_is_an_image_error_or_an_image(kind):
    rng = np.random.default_rng(0)
    whole = encode(natural(30, 20), kind)
    num_read = num_refused = 0
    for turn in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data) if turn % 2 else 60, rng.integers(1, 5)):
            data[place] = rng.integers(0, 256)
        if turn % 5 == 0:
            del data[rng.integers(1, len(data)) :]
        results = []
        for crop in ("center", "fast"):
            try:
                results.append(read_image(bytes(data), 16, 3, crop))
            except ImageError as error:
                results.append(str(error))
        exact, fast = results
        if isinstance(exact, str):
            assert fast == exact
            num_refused += 1
        else:
            assert np.abs(exact.astype(int) - fast).max() <= 2
            num_read += 1
    assert num_refused
    assert num_read or kind == "PNG"  # whose chunks have checksums


def test_two_pictures_of_a_phone_are_the_first_one():
    first, second = natural(90, 70), natural(90, 70, seed=1)
    data = encode(first, "MPO", save_all=True, append_images=[second], quality=90)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    for crop in ("center", "fast"):
        np.testing.assert_array_equal(
            read_image(data, 90, 3, crop), read_image(encode(first, quality=90), 90, 3, crop)
        )


def test_kinds_that_run_other_programs_are_not_tried():
    data = encode(natural(30, 20), "EPS")
    assert Image.open(io.BytesIO(data)).format == "EPS"
    with pytest.raises(ImageError, match=r"^not an image of a known kind$"):
        read_image(data, 8, 3)


@pytest.mark.parametrize("crop", ["center", "fast"])
def test_what_a_decoder_says_of_a_damaged_file(crop, monkeypatch):
    def load(image):
        raise RuntimeError("Failed to decode image:\nNot implemented")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageError, match=r"^Failed to decode image: Not implemented$"):
        read_image(encode(natural(30, 20), "PNG"), 8, 3, crop)


@pytest.mark.skipif("avif" not in features.get_supported(), reason="this Pillow has no AVIF")
@pytest.mark.parametrize("crop", ["center", "fast"])
def test_damaged_avif(crop):
    whole = encode(natural(60, 50), "AVIF")
    assert read_image(whole, 16, 3, crop).shape == (3, 16, 16)
    reasons = set()
    for place in range(4, len(whole), 3):
        data = bytearray(whole)
        data[place] ^= 0x55
        try:
            read_image(bytes(data), 16, 3, crop)
        except ImageError as error:
            reasons.add(str(error))
    assert any(reason.startswith("Failed to decode") for reason in reasons)  # that is a RuntimeError


@pytest.mark.parametrize("crop", ["center", "fast", "random"])
@pytest.mark.parametrize("sides", [(1, 10_000), (1, 60_000), (60_000, 1), (10, 10_250)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_sides_too_unequal(kind, sides, crop, monkeypatch):
    data = encode(Image.new("RGB", sides), kind)

    def load(image):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", load)
    reason = f"^its sides are too unequal, {sides[0]} x {sides[1]}$"
    with pytest.raises(ImageError, match=reason):
        read_image(data, 256, 3, crop, np.array([0.5, 0.5, 0.5]))


@pytest.mark.parametrize("crop", ["center", "fast", "random"])
@pytest.mark.parametrize("sides", [(1, 4096), (4096, 1)])
def test_sides_just_equal_enough(sides, crop):
    # What is allowed depends on the target: at 256 px it is a side of 1,024 times the other one.
    data = encode(Image.new("RGB", sides, "white"), "PNG")
    got = read_image(data, 64, 3, crop, np.array([0.5, 0.5, 0.5]))
    assert got.shape == (3, 64, 64)
    assert got.min() == 255


def test_missing_and_unreadable_paths(tmp_path):
    with pytest.raises(ImageError, match=r"^No such file or directory$"):
        read_image(tmp_path / "none.jpg", 8, 3)
    with pytest.raises(ImageError, match=r"^Is a directory$"):
        read_image(tmp_path, 8, 3)


def test_huge_image_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for crop in ("center", "fast"):
        with pytest.raises(ImageError, match="exceeds limit"):
            read_image(encode(natural(30, 20)), 8, 3, crop)


def test_the_fast_crop_leaves_the_threads_of_torch_alone():
    threads = torch.get_num_threads()
    read_image(encode(natural(90, 70)), 16, 3, "fast")
    assert torch.get_num_threads() == threads
