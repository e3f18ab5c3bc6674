"""Pictures: heat maps that can be read back, and what the rows of Lego filters are."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image

import legocompress as lego
from legocompress.report.html.pictures import (
    MAX_FILTERS,
    NEGATIVE,
    POSITIVE,
    ZOOM,
    Picture,
    draw_filters,
    draw_heat_map,
    draw_thumbnail,
    draw_weight,
)
from tests.support.pages import make_pair


def decode(picture: Picture) -> np.ndarray:
    """The pixels (H, W, 4) of a picture."""
    data = base64.b64decode(picture.uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(int)


def test_a_heat_map_shows_sign_and_size() -> None:
    pixels = decode(draw_heat_map(torch.tensor([[1.0, -1.0, 0.5], [0.0, torch.nan, 9.0]])))
    assert pixels[0, 0].tolist() == [*POSITIVE, 255]
    assert pixels[0, 1].tolist() == [*NEGATIVE, 255]
    assert pixels[0, 2, :3].tolist() == [*POSITIVE]
    assert 120 < pixels[0, 2, 3] < 160
    assert 0 < pixels[1, 0, 3] < 30
    assert pixels[1, 1, 3] == 0
    assert pixels[1, 2].tolist() == [*POSITIVE, 255]


def test_rows_are_the_most_used_filters() -> None:
    _, model, _ = make_pair()
    layer = dict(lego.lego_modules(model))["layer1"]
    shape = layer.lego_shape
    with torch.no_grad():
        layer.index.fill_(5)
        layer.index[0, :3] = 2
        layer.lego_filters[5] = torch.linspace(-1, 1, 36).reshape(4, 3, 3)
    drawn = draw_filters(layer)
    assert drawn.counts == (shape.n_slots - 3, 3)
    assert (drawn.n_used, drawn.n_lego) == (2, 8)
    assert drawn.curve == (1.0, 3 / (shape.n_slots - 3), *[0.0] * 6)
    assert (drawn.picture.width, drawn.picture.height) == (4 * 4 * ZOOM, 2 * 4 * ZOOM)
    assert drawn.row_height == 4 * ZOOM
    pixels = decode(drawn.picture)
    assert pixels.shape[:2] == (8, 16)
    assert pixels[0, 0].tolist() == [*NEGATIVE, 255]  # the first value of filter 5
    assert pixels[2, 14].tolist() == [*POSITIVE, 255]  # the last one
    assert (pixels[3, :, 3] == 0).all()  # the gap between two filters


def test_strips_of_few_channels_are_wide() -> None:
    _, model, _ = make_pair()
    drawn = draw_filters(dict(lego.lego_modules(model))["layer2"])
    assert decode(drawn.picture).shape[:2] == (4 * len(drawn.counts), 8)
    assert drawn.picture.width == 8 * 12
    assert len(drawn.counts) <= MAX_FILTERS


def test_a_large_weight_is_cut() -> None:
    assert decode(draw_weight(torch.ones(500, 300), 1.0)).shape[:2] == (60, 60)
    assert decode(draw_weight(torch.ones(500, 300, 3, 3), 1.0)).shape[:2] == (60, 60)
    assert decode(draw_weight(torch.ones(2, 1, 11, 11), 1.0)).shape[:2] == (24, 12)
    assert decode(draw_weight(torch.zeros(1, 1, 99, 99), 0.0)).shape[:2] == (100, 100)


def test_a_thumbnail_undoes_the_normalisation() -> None:
    image = torch.full((3, 400, 300), 1.0)
    thumbnail = draw_thumbnail(image, (0.5, 0.25, 0.0), (0.25, 0.25, 0.0))
    assert (thumbnail.width, thumbnail.height) == (132, 176)
    colour = decode(thumbnail).reshape(-1, 4).mean(0)
    assert np.allclose(colour, [191, 128, 0, 255], atol=3)
    grey = decode(draw_thumbnail(torch.zeros(1, 8, 8), (0.5,), (1.0,)))
    assert np.allclose(grey[..., :3], 128, atol=2)
