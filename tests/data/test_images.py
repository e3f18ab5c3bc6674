"""Images in: in a stable order, under the model's preprocessing, every fault a DataError."""

from __future__ import annotations

import pickle  # a hostile file, and the format of CIFAR-10
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import legocompress as lego
from legocompress.data.datasets import UNLABELLED
from legocompress.errors import DataError, LegoError
from tests.support.images import EIGHT, MEAN, STD, grey, model, normalised, npz, paint, tensors


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    root = tmp_path / "classes"
    paint(root / "b" / "10.png", (10, 0, 0))
    paint(root / "b" / "9.png", (9, 0, 0))
    paint(root / "a" / "x.png", (1, 2, 3))
    paint(root / "c" / "deep" / "y.PNG", (4, 0, 0))
    (root / "b" / "notes.txt").write_text("no image")
    return root


# Folders


def test_values_are_scaled_and_normalised(tmp_path: Path) -> None:
    paint(tmp_path / "i" / "x.png", (255, 128, 0), size=20)
    images = lego.open_images(str(tmp_path / "i"), model())
    x, labels = tensors(images)
    assert x.shape == (1, 3, 8, 8)
    torch.testing.assert_close(x, normalised((255, 128, 0)).reshape(1, 3, 1, 1).expand_as(x))
    assert (images.size, images.labelled, labels) == (1, False, [UNLABELLED])


def test_the_centre_is_cropped(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[4:12, 4:12] = 255
    np.savez(tmp_path / "x.npz", images=pixels[None])
    x, _ = tensors(lego.open_images(str(tmp_path / "x.npz"), model(crop_pct=0.5)))
    torch.testing.assert_close(x, normalised((255, 255, 255)).reshape(1, 3, 1, 1).expand_as(x))


def test_folder_names_are_the_classes_in_a_stable_order(classes: Path) -> None:
    images = lego.open_images(str(classes), model())
    x, labels = tensors(images)
    assert (images.size, images.labelled, images.name) == (4, True, str(classes))
    assert labels == [0, 1, 1, 2]
    reds = ((x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255).round().tolist()
    assert reds == [1, 9, 10, 4]  # by class, then by number
    again, _ = tensors(lego.open_images(str(classes), model()), batch_size=3)
    assert torch.equal(again, x)


def test_workers_keep_the_order(classes: Path) -> None:
    one, labels = tensors(lego.open_images(str(classes), model()))
    two, again = tensors(lego.open_images(str(classes), model()), 1, workers=2)
    assert torch.equal(one, two)
    assert labels == again


def test_labels_can_be_dropped(classes: Path) -> None:
    images = lego.open_images(str(classes), model(), labels=False)
    assert not images.labelled
    assert tensors(images)[1] == [UNLABELLED] * 4


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        paint(tmp_path / "flat" / f"{number}.png", (number, 0, 0))
    images = lego.open_images(str(tmp_path / "flat"), model())
    x, labels = tensors(images)
    assert (images.labelled, labels) == (False, [UNLABELLED] * 3)
    assert ((x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255).round().tolist() == [1, 2, 10]


def test_a_class_map_gives_the_order(classes: Path, tmp_path: Path) -> None:
    order = tmp_path / "classes.txt"
    order.write_text("deep\nb\n\nzebra\na\n")  # a class is the last folder
    x, labels = tensors(lego.open_images(str(classes), model(), class_map=str(order)))
    reds = ((x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255).round().tolist()
    found = dict(zip(reds, labels, strict=True))
    assert found == {1: 4, 9: 1, 10: 1, 4: 0}  # a line's number is the output's


def test_a_class_map_that_names_none_of_the_folders(classes: Path, tmp_path: Path) -> None:
    order = tmp_path / "classes.txt"
    order.write_text("x\ny\n")
    with pytest.raises(DataError, match=r"holds no images in a sub-folder that .*classes.txt"):
        lego.open_images(str(classes), model(), class_map=str(order))


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_a_class_map_that_cannot_be_read(
    classes: Path, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "map").write_bytes(content)
    with pytest.raises(DataError, match=r"class map .* cannot be read"):
        lego.open_images(str(classes), model(), class_map=str(tmp_path / "map"))


def test_grey_networks_see_grey(tmp_path: Path) -> None:
    paint(tmp_path / "i" / "x.png", (255, 0, 0))
    x, _ = tensors(lego.open_images(str(tmp_path / "i"), grey()))
    assert x.shape == (1, 1, 8, 8)
    torch.testing.assert_close(x, torch.full_like(x, (76 / 255 - 0.5) / 0.25))


def test_a_tilde_is_the_home_folder(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "order.txt").write_text("c\nb\na\ndeep\n")
    images = lego.open_images("~/classes", model(), class_map="~/order.txt")
    assert (images.name, tensors(images)[1]) == (str(classes), [2, 1, 1, 3])
    named = lego.open_images("torch/image_folder", model(), data_dir="~/classes")
    assert named.size == 4


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="empty' holds no images"):
        lego.open_images(str(tmp_path / "empty"), model())


# Arrays


def test_colour_arrays_with_labels(tmp_path: Path) -> None:
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    pixels[1], pixels[2, ..., 2] = 255, 51
    images = lego.open_images(npz(tmp_path, images=pixels, labels=np.array([4, 0, 2])), model())
    x, labels = tensors(images)
    assert (images.size, images.labelled, labels) == (3, True, [4, 0, 2])
    torch.testing.assert_close(x[:, :, 3, 3], torch.stack(
        [normalised(c) for c in ((0, 0, 0), (255, 255, 255), (0, 0, 51))]))  # fmt: skip


def test_grey_arrays_for_grey_and_colour_networks(tmp_path: Path) -> None:
    where = npz(tmp_path, images=np.full((2, 8, 8), 51, np.uint8))
    images = lego.open_images(where, grey())
    x, labels = tensors(images)
    assert (images.labelled, labels) == (False, [UNLABELLED] * 2)
    torch.testing.assert_close(x, torch.full((2, 1, 8, 8), (0.2 - 0.5) / 0.25))
    x, _ = tensors(lego.open_images(where, model()))
    torch.testing.assert_close(x, normalised((51, 51, 51)).reshape(1, 3, 1, 1).expand(2, 3, 8, 8))


def test_labels_of_arrays_can_be_dropped(tmp_path: Path) -> None:
    where = npz(tmp_path, images=np.zeros((2, 8, 8), np.uint8), labels=np.array([1, 2]))
    images = lego.open_images(where, model(), labels=False)
    assert not images.labelled
    assert tensors(images)[1] == [UNLABELLED] * 2


@pytest.mark.parametrize(
    "arrays",
    [
        {"pictures": EIGHT},
        {"images": EIGHT.astype(np.float32)},
        {"images": EIGHT.astype(np.int64)},
        {"images": EIGHT[0]},
        {"images": EIGHT[:0]},
        {"images": np.zeros((2, 3, 8, 8, 1), np.uint8)},
        {"images": np.zeros((2, 8, 8, 1), np.uint8)},
        {"images": np.zeros((2, 8, 8, 2), np.uint8)},
        {"images": np.zeros((2, 3, 8, 8), np.uint8)},
        {"images": np.zeros((2, 0, 8), np.uint8)},
        {"images": np.array([EIGHT, None], dtype=object)},
        {"images": np.array(5, np.uint8)},
        {"images": EIGHT, "labels": np.array([1])},
        {"images": EIGHT, "labels": np.array([[1, 2]])},
        {"images": EIGHT, "labels": np.array(["cat", "dog"])},
        {"images": EIGHT, "labels": np.array([0.5, 1.5])},
        {"images": EIGHT, "labels": np.array([None, 1], dtype=object)},
        {"images": EIGHT, "labels": np.array([np.nan, 1])},
    ],
)
def test_malformed_arrays(tmp_path: Path, arrays: dict[str, Any]) -> None:
    where = npz(tmp_path, **arrays)
    with pytest.raises(DataError, match=r"x.npz"):
        tensors(lego.open_images(where, model()))


def test_pickles_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    raw = b"c__builtin__\nexec\n(V" + code.encode() + b"\ntR."
    pickle.loads(raw)
    assert marker.exists()  # so it runs where pickles are trusted
    marker.unlink()
    (tmp_path / "x.npz").write_bytes(raw)
    with pytest.raises(DataError, match=r"is not an .npz file"):
        lego.open_images(str(tmp_path / "x.npz"), model())
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_truncated_arrays(tmp_path: Path, kept: float) -> None:
    np.savez_compressed(tmp_path / "x.npz", images=np.random.default_rng(0).integers(
        0, 255, (20, 8, 8), np.uint8))  # fmt: skip
    raw = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(raw[: int(kept * len(raw))])
    with pytest.raises(DataError, match=r"x.npz"):
        lego.open_images(str(tmp_path / "x.npz"), model())


def test_damaged_arrays(tmp_path: Path) -> None:
    generator = random.Random(0)
    np.savez_compressed(tmp_path / "x.npz", images=np.random.default_rng(0).integers(
        0, 255, (20, 8, 8), np.uint8), labels=np.arange(20))  # fmt: skip
    raw = (tmp_path / "x.npz").read_bytes()
    failures = 0
    for _ in range(150):
        damaged = bytearray(raw)
        for _ in range(2):
            damaged[generator.randrange(len(raw))] = generator.randrange(256)
        (tmp_path / "x.npz").write_bytes(bytes(damaged))
        try:
            lego.open_images(str(tmp_path / "x.npz"), model())
        except DataError:
            failures += 1
    assert failures > 50


def test_one_array_is_no_archive(tmp_path: Path) -> None:
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, EIGHT)
    with pytest.raises(DataError, match=r"is not an .npz file"):
        lego.open_images(str(tmp_path / "x.npz"), model())


# Names


@pytest.mark.parametrize(
    "where", ["nowhere", "./nowhere", "/no/where", "nowhere/images.npz", "no/where", "../x/y", ""]
)
def test_a_place_that_is_not_there(where: str) -> None:
    with pytest.raises(DataError, match="folder"):
        lego.open_images(where, model())


@pytest.mark.parametrize("where", ["torch/no_such_set", "torch/cifar10", "wds/no", "hfds/no"])
def test_a_named_set_that_cannot_be_opened(where: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"data set '{where}'.*cannot be opened"):
        lego.open_images(where, model(), data_dir=str(tmp_path))


def test_a_named_set_is_read(tmp_path: Path) -> None:
    batch = {b"data": np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072), b"labels": [3, 7],
             b"fine_labels": [1, 2]}  # fmt: skip
    pytest.importorskip("torchvision")
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    with (place / "test_batch").open("wb") as file:
        pickle.dump(batch, file)
    # Its checksums are not those of this stand-in, which must be told, not skipped over.
    with pytest.raises(DataError, match="torch/cifar10"):
        lego.open_images("torch/cifar10", model(), data_dir=str(tmp_path), split="validation")


@pytest.mark.parametrize("channels", [2, 4, 12])
def test_networks_of_other_channels(tmp_path: Path, channels: int) -> None:
    where = npz(tmp_path, images=EIGHT)
    with pytest.raises(DataError, match=f"takes {channels} channels; images have 1"):
        lego.open_images(where, model(input_size=(channels, 8, 8)))


@pytest.mark.parametrize(
    "cfg",
    [
        {"interpolation": "no_such"},
        {"interpolation": 5},
        {"mean": "x"},
        {"mean": (0.5, 0.5)},
        {"std": (0.0, 0.0, 0.0)},
        {"crop_pct": "x"},
        {"input_size": 5},
        {"input_size": (3, 0, 0)},
        {"input_size": (3, -8, 8)},
        {"input_size": ("a", "b", "c")},
    ],
)
def test_preprocessing_that_makes_no_sense(tmp_path: Path, cfg: dict[str, Any]) -> None:
    where = npz(
        tmp_path, images=np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
    )
    with pytest.raises(LegoError):
        tensors(lego.open_images(where, model(**cfg)))


@pytest.mark.slow
def test_a_reader_ends_when_its_process_is_already_gone() -> None:
    # PyTorch's own watch would take the process that adopted the reader for the one to watch.
    code = (
        "import time; from legocompress.data.loader import _end_with; "
        "_end_with(0, 0); time.sleep(60)"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=40, check=False)
    assert ran.returncode == 1
