"""Pictures for the page: Lego filters and weights as small heat maps, photos as thumbnails."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from legocompress.lego.module import LegoModule

ZOOM = 4  # CSS pixels per value: small enough for a phone, large enough to see a 3 x 3 pattern
WIDE_ZOOM = 12  # at most, per value of a 1 x 1 filter of few channels
MAX_FILTERS = 16  # rows of a picture of Lego filters
MAX_VALUES = 60  # columns of a picture, gaps included; 60 * ZOOM = 240 CSS pixels
MAX_CURVE_POINTS = 64
THUMBNAIL = 176  # pixels of the longer side
LEVELS = 7  # on each side of zero: 15 colours and the gap fit a PNG of 4 bits per pixel
POSITIVE, NEGATIVE, ZERO = (15, 138, 118), (200, 96, 32), (128, 128, 128)


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, and the size in CSS pixels at which it is shown."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class FilterPicture:
    """The most used Lego filters of one layer, one per row, and how often each filter is used.

    Attributes:
        picture: the heat map; row i belongs to `counts[i]`.
        row_height: of one filter in the picture, in CSS pixels.
        counts: slots that use the filter of each row, in falling order.
        n_lego: number of Lego filters of the layer.
        n_used: how many of them at least one slot uses.
        n_channels: channels of one Lego filter.
        n_channels_shown: how many of them the picture shows.
        curve: use of all filters in falling order, thinned to few points, relative to the most
            used one.
    """

    picture: Picture
    row_height: int
    counts: tuple[int, ...]
    n_lego: int
    n_used: int
    n_channels: int
    n_channels_shown: int
    curve: tuple[float, ...]


def draw_filters(layer: LegoModule) -> FilterPicture:
    """Draw the most used Lego filters of a layer; each is scaled by its own largest value."""
    shape = layer.lego_shape
    counts = torch.bincount(layer.index.flatten().cpu(), minlength=shape.n_lego)
    order = torch.argsort(counts, descending=True, stable=True)
    n_used = int((counts > 0).sum())
    shown = order[: min(MAX_FILTERS, n_used)]
    bank = (
        layer.lego_filters.detach().float().cpu().reshape(shape.n_lego, shape.width, *shape.kernel)
    )
    filters = bank[shown]
    largest = filters.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    tiles = _widen_tiles(filters / largest)
    n_channels = max(1, MAX_VALUES // _pitch(tiles.shape[3]))
    tiles = tiles[:, :n_channels]
    ranked = counts[order].double()
    step = max(1, -(-len(ranked) // MAX_CURVE_POINTS))
    picture = draw_heat_map(_tile(tiles))
    if tiles.shape[3] == 1:  # a strip
        width = min(WIDE_ZOOM, ZOOM * MAX_VALUES // tiles.shape[1]) * tiles.shape[1]
        picture = replace(picture, width=width)
    return FilterPicture(
        picture=picture,
        row_height=ZOOM * (tiles.shape[2] + 1),
        counts=tuple(int(count) for count in counts[shown]),
        n_lego=shape.n_lego,
        n_used=n_used,
        n_channels=shape.width,
        n_channels_shown=tiles.shape[1],
        curve=tuple(float(value) for value in (ranked / ranked[0])[::step]),
    )


def draw_weight(weight: Tensor, scale: float) -> Picture:
    """Draw a part of a dense weight (n, c, kh, kw): rows are output channels, columns inputs.

    Args:
        weight: the dense filters; a Linear's (n, c) counts as 1 x 1.
        scale: the value of the darkest colour.
    """
    tiles = cut_corner(weight) / max(scale, 1e-30)
    if tiles.shape[2:] == (1, 1):
        return draw_heat_map(tiles[:, :, 0, 0])
    return draw_heat_map(_tile(tiles))


def cut_corner(weight: Tensor) -> Tensor:
    """Cut out the first output and input channels of a weight that fit a picture."""
    filters = weight.detach().float().cpu()
    filters = filters.reshape(*filters.shape[:2], 1, 1) if filters.dim() == 2 else filters
    rows, columns = (MAX_VALUES // _pitch(size) for size in filters.shape[2:])
    return filters[: max(1, rows), : max(1, columns)]


def _pitch(size: int) -> int:
    """Values from one tile to the next: a gap follows each tile of more than one value."""
    return size + 1 if size > 1 else 1


def _widen_tiles(filters: Tensor) -> Tensor:
    """Repeat the rows of flat filters (m, q, kh, kw), such as 1 x 1, to 3 values of height."""
    repeats = -(-3 // filters.shape[2])
    return filters.repeat_interleave(repeats, 2)


def _tile(tiles: Tensor) -> Tensor:
    """Lay tiles (rows, columns, kh, kw) out as one map, NaN in the gaps between them."""
    rows, columns, height, width = tiles.shape
    plane = torch.full((rows, columns, height + 1, _pitch(width)), torch.nan)
    plane[:, :, :height, :width] = tiles
    return plane.permute(0, 2, 1, 3).reshape(rows * (height + 1), columns * _pitch(width))


def draw_heat_map(values: Tensor) -> Picture:
    """Draw values (H, W) in [-1, 1] as a PNG: opacity is the size of a value, NaN is transparent.

    Since it has no background of its own, it suits a light and a dark page.
    """
    # NumPy, because torch starts threads for arrays as small as these.
    array = values.numpy()
    levels = np.rint(np.clip(np.nan_to_num(array), -1, 1) * LEVELS) + LEVELS
    levels[np.isnan(array)] = 2 * LEVELS + 1
    image = Image.fromarray(levels.astype(np.uint8), "P")
    negative = [NEGATIVE] * LEVELS
    image.putpalette(
        [part for colour in (*negative, ZERO, *[POSITIVE] * LEVELS, ZERO) for part in colour]
    )
    opacity = [round(255 * level / LEVELS) for level in range(1, LEVELS + 1)]
    buffer = io.BytesIO()
    transparency = bytes([*reversed(opacity), 20, *opacity, 0])
    image.save(buffer, "PNG", optimize=True, bits=4, transparency=transparency)
    height, width = values.shape
    return Picture(encode_data_uri("image/png", buffer.getvalue()), ZOOM * width, ZOOM * height)


def draw_thumbnail(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Picture:
    """Draw a preprocessed image (c, H, W) as a small JPEG, as the network sees it."""
    channels = image.detach().float().cpu()
    shift = torch.tensor(mean).reshape(-1, 1, 1)
    pixels = (channels * torch.tensor(std).reshape(-1, 1, 1) + shift).clamp(0, 1).mul(255).round()
    array = pixels.to(torch.uint8).permute(1, 2, 0).numpy()
    photo = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array[:, :, :3])
    if max(photo.size) > THUMBNAIL:
        photo.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    photo.convert("RGB").save(buffer, "JPEG", quality=80)
    return Picture(encode_data_uri("image/jpeg", buffer.getvalue()), *photo.size)


def encode_data_uri(kind: str, data: bytes) -> str:
    """Write bytes as a data URI of a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
