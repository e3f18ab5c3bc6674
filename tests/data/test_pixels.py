"""Images of every mode as 8-bit RGB and grey, compared by pixel values."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from legocompress.data.pixels import convert_image
from legocompress.errors import DataError

LEVELS = np.array([[0, 128, 129, 257, 385, 386, 32768, 65406, 65407, 65535]], np.uint16)
SCALED = [0, 0, 1, 1, 1, 2, 128, 254, 255, 255]  # round(level / 257)


def write(image: Image.Image, file_format: str, **options: Any) -> Image.Image:
    """Write an image and open the file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return Image.open(file)


def write_png(pixels: Any, bits: int, colour_type: int, transparent: bytes = b"") -> Image.Image:
    """Write one row of samples as a PNG file that Pillow cannot write, and open it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", pixels.shape[1], 1, bits, colour_type, 0, 0, 0)
    row = zlib.compress(b"\0" + pixels.astype(">u2").tobytes())
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", row), chunk(b"IEND", b"")]
    if transparent:
        chunks.insert(1, chunk(b"tRNS", transparent))
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)))


def write_tiff(row: bytes, width: int, bits: int, photometric: int) -> Image.Image:
    """Write one row of samples as a TIFF file that Pillow cannot write, and open it."""
    entries = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8),
               (277, 1), (278, 1), (279, len(row))]  # fmt: skip
    directory = struct.pack("<H", len(entries))
    for tag, value in entries:
        directory += struct.pack("<HHIHH", tag, 3, 1, value, 0)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(row))
    return Image.open(io.BytesIO(header + row + directory + struct.pack("<I", 0)))


def values(image: Image.Image, mode: str = "L") -> list[Any]:
    converted = convert_image(image, mode)[0]
    assert converted.mode == mode
    return np.asarray(converted)[0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("file_format", "order"), [("PNG", "<u2"), ("PPM", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")]
)
def test_16_bits_are_scaled_and_rounded(file_format: str, order: str) -> None:
    image = write(Image.fromarray(LEVELS.astype(order)), file_format)
    assert image.mode in ("I;16", "I;16B", "I")
    assert values(image) == SCALED
    assert values(image, "RGB") == [[level] * 3 for level in SCALED]


def test_32_bit_integers_within_16_bits_are_scaled() -> None:
    assert values(write(Image.fromarray(LEVELS.astype(np.int32)), "TIFF")) == SCALED


def test_16_bits_equal_8_bits() -> None:
    grey = np.arange(256, dtype=np.uint8)[None]
    image = write(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
    assert values(image) == values(write(Image.fromarray(grey), "PNG")) == grey[0].tolist()


def test_a_tiff_of_12_bits_and_one_whose_zero_is_white() -> None:
    twelve = write_tiff(b"\x00\x08\x00\xff\xf0\x00", 3, 12, 1)  # 0, 2048 and 4095
    assert twelve.mode == "I;16"
    assert values(twelve) == [0, 128, 255]
    inverted = write_tiff(LEVELS.tobytes(), LEVELS.size, 16, 0)
    assert values(inverted) == [255 - value for value in SCALED]


def test_16_bit_colour_is_read_to_within_one() -> None:
    image = write_png(np.stack([LEVELS] * 3, -1), 16, 2)
    assert np.abs(np.array(values(image, "RGB"))[:, 0] - SCALED).max() <= 1  # Pillow rounds down


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (LEVELS.astype(np.float32) / 65535, r"has mode F \(floating point\).*8 or 16 bits"),
        (LEVELS.astype(np.int32) - 1, r"has mode I \(integers\) with values from -1 to 65534"),
        (LEVELS.astype(np.int32) + 1, r"values from 1 to 65536.*beyond 0 to 65535.*8 or 16 bits"),
    ],
)
def test_pixels_without_a_defined_range(pixels: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        convert_image(write(Image.fromarray(pixels), "TIFF"), "RGB")


def test_transparent_pixels_are_blended_with_white() -> None:
    pixels = np.array([[[200, 100, 0, alpha] for alpha in (0, 51, 128, 255)]], np.uint8)
    image = write(Image.fromarray(pixels), "PNG")
    expected = [[255, 255, 255], [244, 224, 204], [227, 177, 127], [200, 100, 0]]
    assert convert_image(image, "RGB")[1]
    assert np.abs(np.array(values(image, "RGB")) - expected).max() <= 1
    assert values(image, "RGB")[3] == [200, 100, 0]
    grey = np.array([[[40, 0], [40, 255]]], np.uint8)
    assert values(write(Image.fromarray(grey, "LA"), "PNG")) == [255, 40]


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 50, 4), np.uint8)
    pixels[..., 3] = 255
    converted, is_transparent = convert_image(write(Image.fromarray(pixels), "PNG"), "RGB")
    assert not is_transparent
    np.testing.assert_array_equal(np.asarray(converted), pixels[..., :3])


def test_one_transparent_value() -> None:
    grey = Image.fromarray(np.array([[0, 7, 255]], np.uint8))
    assert values(write(grey, "PNG", transparency=7)) == [0, 255, 255]
    black_and_white = Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1")
    assert values(write(black_and_white, "PNG", transparency=0)) == [255, 255, 255]
    assert values(write(black_and_white, "PNG")) == [0, 255, 0]
    colour = Image.new("RGB", (1, 1), (1, 2, 3))
    assert values(write(colour, "PNG", transparency=(1, 2, 3)), "RGB") == [[255] * 3]
    deep = write(Image.fromarray(LEVELS), "PNG", transparency=385)
    assert values(deep) == [*SCALED[:4], 255, *SCALED[5:]]


@pytest.mark.parametrize(("file_format", "options"), [("PNG", b"\xff\x00"), ("GIF", 1)])
def test_a_palette_with_a_transparent_colour(file_format: str, options: Any) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    opened = write(image, file_format, transparency=options)
    assert values(opened, "RGB") == [[10, 20, 30], [255, 255, 255]]


def test_the_first_frame_of_a_gif_is_read() -> None:
    frames = [Image.new("L", (1, 1), value) for value in (30, 60)]
    assert values(write(frames[0], "GIF", save_all=True, append_images=frames[1:])) == [30]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "P", "RGBX"])
def test_other_colours(mode: str) -> None:
    image = Image.new("RGB", (1, 1), (0, 204, 51)).convert(mode)
    assert np.abs(np.array(values(image, "RGB")[0]) - (0, 204, 51)).max() <= 3  # Pillow rounds


def test_lab() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    colour = Image.new("RGB", (1, 1), (90, 120, 200))
    image: Any = ImageCms.profileToProfile(colour, srgb, lab, outputMode="LAB")
    opened = write(image, "TIFF")
    assert opened.mode == "LAB"
    assert np.abs(np.array(values(opened, "RGB")[0]) - (90, 120, 200)).max() <= 3


def test_the_exif_orientation_is_not_applied() -> None:
    """As in torchvision's ImageFolder and timm's ImageDataset."""
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = write(Image.fromarray(np.array([[10, 20]], np.uint8)), "PNG", exif=exif)
    assert image.getexif()[0x0112] == 3
    assert values(image) == [10, 20]
