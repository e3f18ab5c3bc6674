"""Images that threads read are those of a plain loader, in its order; faults are named."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

import legocompress as lego
from legocompress.data import reading
from legocompress.data.images import Images
from legocompress.data.reading import read_in_threads
from legocompress.errors import DataError


def network(channels: int = 3) -> nn.Module:
    model: Any = nn.Conv2d(channels, 2, 1)
    model.pretrained_cfg = {
        "input_size": (channels, 20, 20),
        "mean": (0.3, 0.4, 0.5)[:channels],
        "std": (0.2, 0.3, 0.7)[:channels],
        "crop_pct": 0.8,
        "interpolation": "bicubic",
    }
    return model


def save_photos(place: Path, count: int) -> None:
    place.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 255, (30 + number, 45, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02}.jpg")


def assert_equal_batches(images: Images, batch_size: int) -> None:
    plain = list(DataLoader(images.dataset, batch_size))
    assert read_in_threads(images.dataset, []) is not None
    threaded = list(images.batches(batch_size))
    assert len(threaded) == len(plain)
    for (x, labels), (y, expected) in zip(threaded, plain, strict=True):
        assert torch.equal(x, y)  # bit for bit
        assert x.is_contiguous()
        assert torch.equal(labels, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_files_and_samples_equal_a_plain_loader(tmp_path: Path, channels: int) -> None:
    save_photos(tmp_path / "photos", 11)
    images = lego.open_images(str(tmp_path / "photos"), network(channels))
    assert_equal_batches(images, 4)
    assert_equal_batches(images.sample(7), 3)


def test_arrays_equal_a_plain_loader(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 24, 24, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(9))
    assert_equal_batches(lego.open_images(str(tmp_path / "x.npz"), network()), 2)


def test_the_next_batch_alone_is_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_photos(tmp_path / "photos", 12)
    images = lego.open_images(str(tmp_path / "photos"), network())
    opened: list[int] = []
    read = type(images.dataset).open  # type: ignore[attr-defined]

    def record(self: Any, position: int) -> Any:
        opened.append(position)
        return read(self, position)

    monkeypatch.setattr(type(images.dataset), "open", record)
    batches = iter(images.batches(2))
    next(batches)
    assert max(opened) <= 3
    next(batches)
    assert max(opened) <= 5


def test_threads_end_when_the_reader_stops_early(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", 12)
    batches: Any = iter(lego.open_images(str(tmp_path / "photos"), network()).batches(2))
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("legocompress-reader")]


def test_a_damaged_file_is_named_and_ends_the_threads(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", 6)
    (tmp_path / "photos" / "03.jpg").write_bytes(b"no image")
    images = lego.open_images(str(tmp_path / "photos"), network())
    with pytest.raises(DataError, match=r"03.jpg' cannot be read.*remove or repair"):
        list(images.batches(2))
    assert not [t for t in threading.enumerate() if t.name.startswith("legocompress-reader")]


def test_a_transform_of_the_users_own_runs_in_the_main_thread(tmp_path: Path) -> None:
    save_photos(tmp_path / "photos", 3)
    threads = set()

    def transform(image: Image.Image) -> torch.Tensor:
        threads.add(threading.current_thread())
        return transforms.functional.to_tensor(image.resize((4, 4)))

    images = lego.open_images(str(tmp_path / "photos"), network(), transform=transform)
    x = torch.cat([x for x, _ in images.batches(2)])
    assert x.shape == (3, 3, 4, 4)
    assert threads == {threading.main_thread()}
    flip = transforms.Compose([transforms.RandomHorizontalFlip(), *_standard_steps()])
    images = lego.open_images(str(tmp_path / "photos"), network(), transform=flip)
    assert read_in_threads(images.dataset, []) is None


def _standard_steps() -> list[Any]:
    return [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]


def test_as_many_threads_as_pytorch_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for n_threads, expected in ((1, 1), (3, 3), (8, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n_threads=n_threads: n_threads)
        assert reading.count_threads() == expected
