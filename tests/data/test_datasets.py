"""Reading one image: unusual modes, and damaged files, which are named in the error."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import legocompress as lego
from legocompress.errors import DataError
from tests.support.images import model, normalised, paint, tensors


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_kind_of_image_becomes_colour(tmp_path: Path, mode: str) -> None:
    source = Image.new("L", (8, 8), 255)
    suffix = "jpg" if mode == "CMYK" else "png"
    if mode == "I;16":
        source = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    else:
        source = source.convert("RGB").convert(mode)
    (tmp_path / "i").mkdir()
    source.save(tmp_path / "i" / f"x.{suffix}")
    x, _ = tensors(lego.open_images(str(tmp_path / "i"), model()))
    torch.testing.assert_close(x, normalised((255, 255, 255)).reshape(1, 3, 1, 1).expand_as(x))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_floating_point_is_refused_by_name(tmp_path: Path, workers: int) -> None:
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "x.tif")
    images = lego.open_images(str(tmp_path), model())
    with pytest.raises(DataError, match=r"^image '.*x.tif' has mode F .*; save it with 8 or 16"):
        tensors(images, 1, workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_transparent_images_are_logged_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    for number in range(4):
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / f"{number}.png")
    images = lego.open_images(str(tmp_path), model())
    handler = logging.StreamHandler()
    logging.getLogger("legocompress").addHandler(handler)
    try:
        for _ in range(2):
            # One batch: readers that start together may both log.
            x, _ = tensors(images, 4, workers)
    finally:
        logging.getLogger("legocompress").removeHandler(handler)
    torch.testing.assert_close(x[0], normalised((255,) * 3).reshape(3, 1, 1).expand(3, 8, 8))
    assert capfd.readouterr().err.count("have transparent pixels, which are blended") == 1


def test_a_named_folder_of_16_bits(tmp_path: Path) -> None:
    """torchvision's own loader would clip them to white."""
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((8, 8), 51 * 257, np.uint16)).save(tmp_path / "a" / "x.png")
    named = lego.open_images("torch/image_folder", model(), data_dir=str(tmp_path))
    x, labels = tensors(named)
    torch.testing.assert_close(x, normalised((51, 51, 51)).reshape(1, 3, 1, 1).expand_as(x))
    assert labels == [0]
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "a" / "x.tif")
    named = lego.open_images("torch/image_folder", model(), data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"image 1 \(.*x.tif\) of data set 'torch/.*' has mode F"):
        tensors(named)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(tmp_path: Path, workers: int) -> None:
    good = paint(tmp_path / "i" / "a.png", (1, 2, 3), size=64)
    raw = good.read_bytes()
    (tmp_path / "i" / "broken.png").write_bytes(raw[: len(raw) // 2])
    images = lego.open_images(str(tmp_path / "i"), model())
    with pytest.raises(DataError, match=r"broken.png' cannot be read.*remove or repair") as caught:
        tensors(images, 1, workers)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_damaged_images_end_in_a_data_error_or_an_image(tmp_path: Path, suffix: str) -> None:
    generator = random.Random(0)
    place = tmp_path / "i"
    place.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(place / f"x.{suffix}")
    raw = (place / f"x.{suffix}").read_bytes()
    images = lego.open_images(str(place), model())
    failures = 0
    for _ in range(80):
        damaged = bytearray(raw[: generator.choice([len(raw), generator.randrange(len(raw))])])
        for _ in range(3):
            if damaged:
                limit = min(len(damaged), generator.choice([60, len(damaged)]))
                damaged[generator.randrange(limit)] = generator.randrange(256)
        (place / f"x.{suffix}").write_bytes(bytes(damaged))
        try:
            x, _ = images.dataset[0]
            assert x.shape == (3, 8, 8)
        except DataError as error:
            assert f"x.{suffix}" in str(error)  # noqa: PT017
            failures += 1
    assert failures > 5


def test_a_picture_that_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path / "i" / "big.png", (0, 0, 0), size=64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(DataError, match=r"big.png"):
        tensors(lego.open_images(str(tmp_path / "i"), model()))
