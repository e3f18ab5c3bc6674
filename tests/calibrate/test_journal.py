"""Interrupted calibrations go on where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import legocompress as lego
from legocompress.calibrate.journal import Journal
from legocompress.state.calibration import LayerRepair
from tests.support.calibrating import NAME, converted, demo_images


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    original = lego.create(NAME)
    images = demo_images(40)
    whole, broken = converted(original), converted(original)
    wanted = lego.calibrate_(whole, original, images, epochs=1)
    count = 0

    def interrupt(row: LayerRepair) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    kwargs: dict[str, Any] = {"epochs": 1, "journal": tmp_path / "kept"}
    with pytest.raises(KeyboardInterrupt):
        lego.calibrate_(broken, original, images, on_layer=interrupt, **kwargs)
    assert len(list((tmp_path / "kept").iterdir())) == 5
    resumed = converted(original)
    assert lego.calibrate_(resumed, original, images, **kwargs) == wanted
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_journal_of_another_run_is_passed_over(tmp_path: Path) -> None:
    layer = dict(lego.lego_modules(converted(lego.create(NAME))))["layer1.0.conv1"]
    row = LayerRepair(name="layer1.0.conv1", before=0.5, after=0.25)
    Journal(tmp_path, "one").put(row, layer)
    assert Journal(tmp_path, "one").take_(row.name, layer) == row
    assert Journal(tmp_path, "two").take_(row.name, layer) is None
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    assert Journal(tmp_path, "one").take_(row.name, layer) is None
