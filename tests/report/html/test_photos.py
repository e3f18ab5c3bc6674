"""Photos on which two networks disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.data.images import Images
from legocompress.report.html.photos import compare_on_photos, find_class_names


class Brightness(nn.Module):
    """Answers class 0 on dark images, and class 2 on images brighter than a limit."""

    def __init__(self, limit: float, n_classes: int = 3) -> None:
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(limit))
        self.n_classes = n_classes
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), self.n_classes)
        y[:, 0] = 4 * self.limit
        y[:, 2] = 4 * x.mean((1, 2, 3))
        return y


@pytest.fixture
def photos(tmp_path: Path) -> Images:
    """Forty images of brightness 0, 1/39, ..., 1."""
    levels = np.linspace(0, 255, 40).round().astype(np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (40, 8, 8, 3))
    np.savez(tmp_path / "photos.npz", images=images)
    return lego.open_images(str(tmp_path / "photos.npz"), Brightness(0.5))


def test_photos_with_other_answers_come_first(photos: Images) -> None:
    seen: list[int] = []
    result = compare_on_photos(
        Brightness(0.6), Brightness(0.45), photos, ["dark", "never", "bright"], seen.append
    )
    assert result is not None
    # Levels 18 to 23 of 39 lie between 0.45 and 0.6.
    assert (result.n_photos, result.agreement) == (40, 100 * (40 - 6) / 40)
    assert sum(seen) == 40
    assert [item.same_answer for item in result.worst] == [False] * 6 + [True] * 2
    for item in result.worst[:6]:
        assert (item.original[0].name, item.compressed[0].name) == ("bright", "dark")
        assert [guess.name for guess in item.original][1:] == ["dark", "never"]
        assert sum(guess.probability for guess in item.compressed) == pytest.approx(1)
    distances = [item.distance for item in result.worst[:6]]
    assert distances == sorted(distances, reverse=True)


def test_networks_without_common_classes_are_not_compared(photos: Images) -> None:
    assert compare_on_photos(Brightness(0.5), Brightness(0.5, 4), photos) is None


def test_class_names_come_from_the_configuration_or_imagenet() -> None:
    model: Any = Brightness(0.5)
    assert find_class_names(model, 3) is None
    names = find_class_names(model, 1000)
    assert names is not None
    assert (names[0], len(names)) == ("tench, Tinca tinca", 1000)
    model.pretrained_cfg["label_names"] = ["n0", "n1", "n2"]
    assert find_class_names(model, 3) == ["n0", "n1", "n2"]
    assert find_class_names(model, 4) is None
    model.pretrained_cfg["label_descriptions"] = {"n1": "a dog"}
    assert find_class_names(model, 3) == ["n0", "a dog", "n2"]
