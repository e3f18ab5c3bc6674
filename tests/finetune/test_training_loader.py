"""The order and the draws of training images depend on seed, epoch and position only."""

from __future__ import annotations

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
from torch import nn

from legocompress.errors import DataError, UsageError
from legocompress.finetune.training_data import open_training
from tests.support.finetuning import are_equal, load_batches, make_loader, write_grey_image
from tests.support.tiny import recipe, write_images

PLAIN = {"crop": "none", "hflip": 0}


def test_an_epoch_is_the_same_in_every_process_and_worker(model: nn.Module, tmp_path: Path) -> None:
    place = write_images(tmp_path / "x.npz")
    augment = {"augment": {"crop": "resized", "auto_augment": "rand-m5", "re_prob": 0.5}}
    drawn = load_batches(make_loader(model, place, **augment))
    torch.rand(3), random.random(), np.random.rand()  # type: ignore[func-returns-value]
    assert len(drawn) == 5
    assert are_equal(drawn, load_batches(make_loader(model, place, **augment)))
    assert are_equal(drawn, load_batches(make_loader(model, place, workers=2, **augment)))
    assert are_equal(drawn[3:], load_batches(make_loader(model, place, **augment), start=3))
    assert not are_equal(drawn, load_batches(make_loader(model, place, **augment), epoch=1))
    assert not are_equal(drawn, load_batches(make_loader(model, place, seed=1, **augment)))


def test_an_epoch_shows_every_image_once(model: nn.Module, tmp_path: Path) -> None:
    place = write_images(tmp_path / "x.npz")
    with np.load(place) as file:
        pixels, labels = file["images"], file["labels"]
    expected = {((p / 255 - 0.5) / 0.25).astype(np.float32).tobytes(): y for p, y in
                zip(pixels, labels, strict=True)}  # fmt: skip
    shown = load_batches(make_loader(model, place, augment=PLAIN))
    images, classes = torch.cat([x for x, _ in shown]), torch.cat([y for _, y in shown])
    originals = torch.stack(
        [torch.from_numpy(np.frombuffer(raw, np.float32).copy()) for raw in expected]
    )
    distance, which = torch.cdist(
        images.flatten(1), originals, compute_mode="donot_use_mm_for_euclid_dist"
    ).min(1)
    assert distance.max() < 1e-3
    assert len(which.unique()) == 40
    assert [list(expected.values())[i] for i in which] == classes.tolist()


def test_processes_and_parts_divide_an_update(model: nn.Module, tmp_path: Path) -> None:
    place = write_images(tmp_path / "x.npz")
    whole = load_batches(make_loader(model, place))
    ranks = [load_batches(make_loader(model, place, rank, 2)) for rank in range(2)]
    parts = load_batches(make_loader(model, place, accumulate=2))
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
def test_settings_that_do_not_fit_are_refused(
    changes: dict[str, Any], processes: int, words: str, model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        make_loader(model, write_images(tmp_path / "x.npz"), 0, processes, **changes)


def test_a_corrupt_image_is_named(model: nn.Module, tmp_path: Path) -> None:
    for number in range(10):
        write_grey_image(tmp_path / "ab"[number % 2] / f"{number}.png", number)
    (tmp_path / "b" / "7.png").write_bytes(b"no image")
    for workers in (0, 1):
        part = make_loader(model, tmp_path, workers=workers, data={"holdout": 1}, seed=3)
        with pytest.raises(DataError, match=r"b/7\.png' cannot be read"):
            [load_batches(part, epoch) for epoch in range(5)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # open tar files
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_stream_of_tar_files_loads_and_resumes(model: nn.Module, tmp_path: Path) -> None:
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
    first = load_batches(make_loader(model, tmp_path, **changes))
    assert [len(y) for _, y in first] == [8, 8, 8]
    assert are_equal(first, load_batches(make_loader(model, tmp_path, **changes)))
    assert are_equal(first[2:], load_batches(make_loader(model, tmp_path, **changes), start=2))
    _, validation = open_training(model, recipe(**changes), str(tmp_path))
    assert sum(len(y) for _, y in validation.batches(4)) == 6
    with pytest.raises(UsageError, match="stream"):
        open_training(model, recipe(data={"dataset": "wds/images", "holdout": 3}), str(tmp_path))
