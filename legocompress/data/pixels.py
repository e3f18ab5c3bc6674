"""Convert PIL images of every mode to 8-bit RGB or grey; refuse those without a defined range."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from legocompress.errors import DataError

try:
    from PIL import ImageCms
except ImportError:  # some builds of Pillow lack it
    ImageCms = None  # type: ignore[assignment]

TOP_16_BIT = 65535
WHITE = (255, 255, 255, 255)
MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
MODES_WITH_ALPHA = ("LA", "PA", "RGBA", "RGBa")
TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC, TIFF_WHITE_IS_ZERO = 258, 262, 0  # tags, and a value


def convert_image(image: Image.Image, mode: str) -> tuple[Image.Image, bool]:
    """Convert an image to `mode`, RGB or L, with 8 bits per channel.

    Unsigned integers of 16 bits are scaled, round(value / 257); Pillow's own conversion clips them.
    Transparent pixels are blended with white. The EXIF orientation is not applied, as in
    torchvision and timm, and of several frames or pages the first is read.

    Returns:
        The image, and whether it has transparent pixels.

    Raises:
        DataError: the pixels have no defined range. The message continues the image's name.
    """
    if image.mode == "F":
        raise DataError(
            "has mode F (floating point), whose range of values is not defined; save it with 8 or "
            "16 bits per channel"
        )
    if image.mode == "I" or image.mode in MODES_16_BIT:
        image = _scale_to_8_bit(image)
    elif image.mode == "LAB":
        image = _convert_lab(image)
    if not _can_be_transparent(image):
        return image.convert(mode), False
    colours = image.convert("RGBA")
    if colours.getchannel("A").getextrema()[0] == 255:
        return image.convert(mode), False
    white = Image.new("RGBA", colours.size, WHITE)
    return Image.alpha_composite(white, colours).convert(mode), True


def _scale_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale integers of 16 bits (12 in some TIFF files) to mode L, or LA with a transparent value.

    Mode I holds 32-bit integers, as which some Pillow versions read 16-bit PNG and PGM files.
    """
    values = np.asarray(image).astype(np.int64)
    top, is_white_zero = _tiff_range(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > top:
        raise DataError(
            f"has mode {image.mode} (integers) with values from {low} to {high}, whose range is "
            f"not defined beyond 0 to {top}; save it with 8 or 16 bits per channel"
        )
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else np.where(values == transparent, 0, 255)
    if is_white_zero:
        values = top - values
    grey = Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8))
    if alpha is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(alpha.astype(np.uint8))))


def _tiff_range(image: Image.Image) -> tuple[int, bool]:
    """Return the largest value, and whether 0 is white, which Pillow does not apply to 16 bits."""
    if not isinstance(image, TiffImageFile):
        return TOP_16_BIT, False
    tags: Any = image.tag_v2
    top = 4095 if tags.get(TIFF_BITS_PER_SAMPLE) == (12,) else TOP_16_BIT
    return top, tags.get(TIFF_PHOTOMETRIC) == TIFF_WHITE_IS_ZERO


def _convert_lab(image: Image.Image) -> Image.Image:
    if ImageCms is None:
        raise ValueError("this build of Pillow cannot convert LAB; save the image as RGB")
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted: Any = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    return converted  # type: ignore[no-any-return]


def _can_be_transparent(image: Image.Image) -> bool:
    palette_mode = image.palette.mode if image.mode == "P" and image.palette else ""
    return (
        image.mode in MODES_WITH_ALPHA or "transparency" in image.info or palette_mode.endswith("A")
    )
