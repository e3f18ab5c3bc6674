"""Where training and validation images come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset
from torch import nn

import legocompress as lego
from legocompress.data.datasets import NamedImages
from legocompress.data.images import preprocessing
from legocompress.errors import DataError, UsageError
from legocompress.finetune.training_data import open_training
from tests.support.finetuning import write_grey_image
from tests.support.tiny import recipe, write_images


def test_held_out_images_are_not_trained_on(model: nn.Module, tmp_path: Path) -> None:
    place = write_images(tmp_path / "x.npz")
    for holdout, where in ((12, "random"), (0.25, "random"), (12, "end")):
        settings = recipe(data={"holdout": holdout, "holdout_from": where})
        train, validation = open_training(model, settings, str(place))
        assert (train.size, validation.size) == ((39, 13) if holdout == 0.25 else (40, 12))
        positions: Any = train.dataset
        assert len(positions.indices) == train.size
        if where == "end":
            assert positions.indices == list(range(40))
        else:
            assert positions.indices != list(range(train.size))
    for holdout in (60, 0.001):
        with pytest.raises(UsageError, match="leaves nothing"):
            open_training(model, recipe(data={"holdout": holdout}), str(place))


def test_arrays_mark_their_test_images(model: nn.Module, tmp_path: Path) -> None:
    place = write_images(tmp_path / "x.npz", test=10)
    train, validation = open_training(model, recipe(data={}), str(place))
    assert (train.size, validation.size) == (42, 10)
    bare = write_images(tmp_path / "bare.npz")
    with pytest.raises(DataError, match=r"no boolean 'test'.*data.holdout=0.1"):
        open_training(model, recipe(data={}), str(bare))


def test_folders_open_by_split(model: nn.Module, tmp_path: Path) -> None:
    for split, number in (("train", 4), ("val", 2)):
        for label in "ab":
            for image in range(number):
                write_grey_image(tmp_path / split / label / f"{image}.png", 9)
    settings = recipe(data={}, batch_size=8)
    train, validation = open_training(model, settings, str(tmp_path))
    assert (train.size, validation.size, train.n_classes) == (8, 4, 2)
    dataset: Any = validation.dataset
    assert dataset[0][0].shape == (1, 16, 16)
    write_grey_image(tmp_path / "val" / "c" / "0.png", 3)
    with pytest.raises(DataError, match=r"2 classes and .* 3"):
        open_training(model, settings, str(tmp_path))
    with pytest.raises(DataError, match=r"no validation images.*looked for test"):
        open_training(model, recipe(data={"validation": "test"}), str(tmp_path))
    held, _ = open_training(model, recipe(data={"holdout": 2}), str(tmp_path / "train"))
    assert held.size == 6
    with pytest.raises(DataError, match="no train images"):
        open_training(model, settings, str(tmp_path / "nowhere"))


def test_a_corrupt_image_of_a_named_set_is_named(model: nn.Module, tmp_path: Path) -> None:
    """timm's own class would show the next image in its place."""
    for number in range(10):
        write_grey_image(tmp_path / "ab"[number % 2] / f"{number}.png", number)
    (tmp_path / "b" / "7.png").write_bytes(b"no image")
    named: Any = NamedImages(ImageDataset(str(tmp_path)), "hfds/mine", lambda image: image, "L")
    assert [named[place][1] for place in (0, 5)] == [0, 1]
    with pytest.raises(DataError, match=r"image 8 \(.*b/7\.png\) of data set 'hfds/mine'"):
        named[8]


def test_16_bits_train_and_validate_alike(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("train", "val"):
        for name in "ab":
            path = tmp_path / "data" / split / name / "x.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((16, 16), 51 * 257, np.uint16)).save(path)
    train, validation = open_training(model, recipe(data={}), "~/data")
    dataset: Any = train.dataset
    assert np.asarray(dataset[0][0]).tolist() == [[51] * 16] * 16
    transform = preprocessing(model)[0]
    dataset = validation.dataset
    assert torch.equal(dataset[1][0], transform(Image.new("L", (16, 16), 51)))


def test_a_stream_is_converted_before_its_transform(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reader:
        def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
            yield Image.fromarray(np.full((16, 16), 51 * 257, np.uint16)), 1
            yield Image.fromarray(np.zeros((16, 16), np.float32)), 0

        def __len__(self) -> int:
            return 2

    def create(*args: Any, **kwargs: Any) -> IterableImageDataset:
        assert kwargs["input_img_mode"] == ""  # timm's reader would clip
        return IterableImageDataset("", reader=Reader())

    monkeypatch.setattr("legocompress.data.images.create_dataset", create)
    train, validation = open_training(model, recipe(data={"dataset": "wds/mine"}), "")
    stream: Any = iter(train.dataset)  # type: ignore[call-overload]
    image, label = next(stream)
    assert (image.mode, image.getpixel((0, 0)), label) == ("L", 51, 1)
    stream = iter(validation.dataset)  # type: ignore[call-overload]
    assert torch.equal(next(stream)[0], preprocessing(model)[0](image))
    with pytest.raises(DataError, match="image of data set 'wds/mine' has mode F"):
        next(stream)


def test_cifar10_opens_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle  # CIFAR-10 comes so

    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    raw = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    names = [name for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]]
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"data": raw, "labels": [0, 1, 2, 3]}))
    meta = {"label_names": list("abcdefghij")}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    model = lego.create("resnet18", pretrained=False, num_classes=10,
                        preprocess={"input_size": (32, 32)})  # fmt: skip
    train, validation = open_training(model, lego.load_recipe("cifar10-paper"), str(tmp_path))
    assert (train.size, validation.size) == (20, 4)
    dataset: Any = validation.dataset
    image, label = dataset[2]
    assert (image.shape, label) == ((3, 32, 32), 2)
