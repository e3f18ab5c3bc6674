"""The evaluation after an epoch."""

from __future__ import annotations

from pathlib import Path

import pytest

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.finetune.loop import finetune_
from tests.support.tiny import compressed, recipe, write_images

ONE_EPOCH = [{"epochs": 1, "rates": {"proxies": 100.0}}]


def test_validation_without_labels_or_original_is_refused(images: Path, tmp_path: Path) -> None:
    model, settings = compressed(), recipe(stages=ONE_EPOCH)
    data = lego.open_training(model, settings, str(images))
    bare = lego.open_images(str(write_images(tmp_path / "b.npz", labels=False)), model)
    with pytest.raises(UsageError, match="nothing to tell a good epoch by"):
        finetune_(model, settings, data[0], bare)
