"""MNIST's file format."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from legocompress.errors import DataError
from legocompress.finetune.training_data import open_training
from tests.support.tiny import recipe


def test_idx_files_are_read(model: nn.Module, tmp_path: Path) -> None:
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
