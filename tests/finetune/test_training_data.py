"""Training images: where they come from, and an order and draws that depend on nothing else."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from torch import Tensor, nn

import legocompress as lego
from legocompress.data.datasets import NamedImages
from legocompress.errors import DataError, UsageError
from legocompress.finetune.seeding import derive_seed, preserve_random_state, seed_all
from legocompress.finetune.training_data import (
    TrainingLoader,
    create_training_transform,
    open_training,
)
from tests.support.tiny import dense, recipe, write_images

PLAIN = {"crop": "none", "hflip": 0}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return dense()


def loader(model: nn.Module, place: Path, rank: int = 0, processes: int = 1, workers: int = 0,
           **changes: Any) -> TrainingLoader:  # fmt: skip
    found = recipe(**changes)
    train, _ = open_training(model, found, str(place))
    return TrainingLoader(train, model, found, rank, processes, workers)


def batches(loader: TrainingLoader, epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(x, y) for x, y in loader.parts(epoch, start)]


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_an_epoch_is_the_same_wherever_it_is_drawn(model: nn.Module, tmp_path: Path) -> None:
    place = write_images(tmp_path / "x.npz")
    augment = {"augment": {"crop": "resized", "auto_augment": "rand-m5", "re_prob": 0.5}}
    drawn = batches(loader(model, place, **augment))
    torch.rand(3), random.random(), np.random.rand()  # type: ignore[func-returns-value]
    assert len(drawn) == 5
    assert same(drawn, batches(loader(model, place, **augment)))
    assert same(drawn, batches(loader(model, place, workers=2, **augment)))
    assert same(drawn[3:], batches(loader(model, place, **augment), start=3))
    assert not same(drawn, batches(loader(model, place, **augment), epoch=1))
    assert not same(drawn, batches(loader(model, place, seed=1, **augment)))


def test_an_epoch_shows_every_image_once(model: nn.Module, tmp_path: Path) -> None:
    place = write_images(tmp_path / "x.npz")
    with np.load(place) as file:
        pixels, labels = file["images"], file["labels"]
    expected = {((p / 255 - 0.5) / 0.25).astype(np.float32).tobytes(): y for p, y in
                zip(pixels, labels, strict=True)}  # fmt: skip
    shown = batches(loader(model, place, augment=PLAIN))
    images, classes = torch.cat([x for x, _ in shown]), torch.cat([y for _, y in shown])
    known = torch.stack(
        [torch.from_numpy(np.frombuffer(raw, np.float32).copy()) for raw in expected]
    )
    distance, which = torch.cdist(
        images.flatten(1), known, compute_mode="donot_use_mm_for_euclid_dist"
    ).min(1)
    assert distance.max() < 1e-3
    assert len(which.unique()) == 40
    assert [list(expected.values())[i] for i in which] == classes.tolist()


def test_processes_and_parts_share_an_update(model: nn.Module, tmp_path: Path) -> None:
    place = write_images(tmp_path / "x.npz")
    whole = batches(loader(model, place))
    ranks = [batches(loader(model, place, rank, 2)) for rank in range(2)]
    parts = batches(loader(model, place, accumulate=2))
    for update, (x, y) in enumerate(whole):
        for split in ([rank[update] for rank in ranks], parts[2 * update : 2 * update + 2]):
            assert torch.equal(torch.cat([a for a, _ in split]), x)
            assert torch.equal(torch.cat([b for _, b in split]), y)


@pytest.mark.parametrize(
    ("changes", "processes", "words"),
    [
        ({"batch_size": 64}, 1, "--set batch_size=20"),
        ({"batch_size": 9}, 2, "cannot be cut into 2 equal parts"),
        ({"batch_size": 6, "accumulate": 2, "mixup": {"mixup": 1}}, 1, "in pairs"),
        ({"augment": {"auto_augment": "nonsense"}}, 1, "timm refuses"),
    ],
)
def test_what_does_not_fit(
    changes: dict[str, Any], processes: int, words: str, model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        loader(model, write_images(tmp_path / "x.npz"), 0, processes, **changes)


def test_held_out_images_are_not_trained_on(model: nn.Module, tmp_path: Path) -> None:
    place = write_images(tmp_path / "x.npz")
    for holdout, where in ((12, "random"), (0.25, "random"), (12, "end")):
        found = recipe(data={"holdout": holdout, "holdout_from": where})
        train, validation = open_training(model, found, str(place))
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


def test_arrays_tell_their_test_images(model: nn.Module, tmp_path: Path) -> None:
    place = write_images(tmp_path / "x.npz", test=10)
    train, validation = open_training(model, recipe(data={}), str(place))
    assert (train.size, validation.size) == (42, 10)
    bare = write_images(tmp_path / "bare.npz")
    with pytest.raises(DataError, match=r"no boolean 'test'.*data.holdout=0.1"):
        open_training(model, recipe(data={}), str(bare))


def test_idx_files(model: nn.Module, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16), dtype=np.uint8)
    for prefix, number in (("train", 20), ("t10k", 6)):
        labels = np.arange(number) % 3
        for kind, data in (("images-idx3", pixels[:number]), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, data.ndim)) + np.array(data.shape, ">u4").tobytes()
            with gzip.open(tmp_path / f"{prefix}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + data.astype(np.uint8).tobytes())
    train, validation = open_training(model, recipe(data={}), str(tmp_path))
    assert (train.size, validation.size) == (20, 6)
    dataset: Any = train.dataset
    assert np.array_equal(np.asarray(dataset[7][0]), pixels[7])
    assert dataset[7][1] == 1
    for raw in (b"", b"nonsense", gzip.compress(b"\0\0\x08\x03")):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(raw)
        with pytest.raises(DataError, match="cannot be read"):
            open_training(model, recipe(data={}), str(tmp_path))


def paint(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 16), value).save(path)


def test_folders_by_split(model: nn.Module, tmp_path: Path) -> None:
    for split, number in (("train", 4), ("val", 2)):
        for label in "ab":
            for image in range(number):
                paint(tmp_path / split / label / f"{image}.png", 9)
    found = recipe(data={}, batch_size=8)
    train, validation = open_training(model, found, str(tmp_path))
    assert (train.size, validation.size, train.n_classes) == (8, 4, 2)
    dataset: Any = validation.dataset
    assert dataset[0][0].shape == (1, 16, 16)
    paint(tmp_path / "val" / "c" / "0.png", 3)
    with pytest.raises(DataError, match=r"2 classes and .* 3"):
        open_training(model, found, str(tmp_path))
    with pytest.raises(DataError, match=r"no validation images.*looked for test"):
        open_training(model, recipe(data={"validation": "test"}), str(tmp_path))
    held, _ = open_training(model, recipe(data={"holdout": 2}), str(tmp_path / "train"))
    assert held.size == 6
    with pytest.raises(DataError, match="no train images"):
        open_training(model, found, str(tmp_path / "nowhere"))


def test_a_corrupt_image_is_named(model: nn.Module, tmp_path: Path) -> None:
    for number in range(10):
        paint(tmp_path / "ab"[number % 2] / f"{number}.png", number)
    (tmp_path / "b" / "7.png").write_bytes(b"no image")
    for workers in (0, 1):
        part = loader(model, tmp_path, workers=workers, data={"holdout": 1}, seed=3)
        with pytest.raises(DataError, match=r"b/7\.png' cannot be read"):
            [batches(part, epoch) for epoch in range(5)]


def test_a_corrupt_image_of_a_named_set_is_named(model: nn.Module, tmp_path: Path) -> None:
    """timm's own class would show the next image in its place."""
    for number in range(10):
        paint(tmp_path / "ab"[number % 2] / f"{number}.png", number)
    (tmp_path / "b" / "7.png").write_bytes(b"no image")
    named: Any = NamedImages(ImageDataset(str(tmp_path)), "hfds/mine", lambda image: image, "L")
    assert [named[place][1] for place in (0, 5)] == [0, 1]
    with pytest.raises(DataError, match=r"image 8 \(.*b/7\.png\) of data set 'hfds/mine'"):
        named[8]


def test_cifar10_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # open tar files
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_stream_of_tar_files(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    for split, number in (("train", 24), ("validation", 6)):
        with tarfile.open(tmp_path / f"{split}-0000.tar", "w") as tar:
            for count in range(number):
                buffer = io.BytesIO()
                Image.new("L", (16, 16), 10 * count).save(buffer, "PNG")
                for kind, raw in (("png", buffer.getvalue()), ("cls", str(count % 3).encode())):
                    entry = tarfile.TarInfo(f"{count:04}.{kind}")
                    entry.size = len(raw)
                    tar.addfile(entry, io.BytesIO(raw))
    splits = {
        name: {"name": name, "filenames": [f"{name}-0000.tar"], "shard_lengths": [number],
               "num_samples": number}
        for name, number in (("train", 24), ("validation", 6))
    }  # fmt: skip
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    changes: dict[str, Any] = {"data": {"dataset": "wds/images"}, "augment": {"crop": "shift"}}
    first = batches(loader(model, tmp_path, **changes))
    assert [len(y) for _, y in first] == [8, 8, 8]
    assert same(first, batches(loader(model, tmp_path, **changes)))
    assert same(first[2:], batches(loader(model, tmp_path, **changes), start=2))
    _, validation = open_training(model, recipe(**changes), str(tmp_path))
    assert sum(len(y) for _, y in validation.batches(4)) == 6
    with pytest.raises(UsageError, match="stream"):
        open_training(model, recipe(data={"dataset": "wds/images", "holdout": 3}), str(tmp_path))


@pytest.mark.parametrize("crop", ["resized", "shift", "none"])
def test_training_images_have_the_networks_size(crop: str, model: nn.Module) -> None:
    transform = create_training_transform(model, recipe(augment={"crop": crop}).augment)
    assert transform(Image.new("L", (28, 20), 100)).shape == (1, 16, 16)


def test_draws_depend_on_the_place_alone() -> None:
    drawn = []
    for _ in range(2):
        seed_all(1, "a", 2)
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert drawn[0] == drawn[1]
    assert (
        len(
            {
                derive_seed(1, "a", 2),
                derive_seed(1, "a", 3),
                derive_seed(2, "a", 2),
                derive_seed("1a2"),
            }
        )
        == 4
    )
    before = (random.getstate(), torch.get_rng_state())
    with preserve_random_state():
        seed_all(7)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
