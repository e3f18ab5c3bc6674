"""Networks are compared with the first of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import DataError
from legocompress.report.compare import compare_networks
from legocompress.report.contestants import Contestant
from tests.support.tiny import CLASSES, dense, write_images


class Chooses(nn.Module):
    """Gives every image the class of a list, in turn; its `weight` only says where it runs."""

    def __init__(self, classes: list[int], n_classes: int = CLASSES) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.classes, self.n_classes = classes, n_classes

    def forward(self, images: Tensor) -> Tensor:
        chosen = torch.tensor(self.classes).repeat(len(images))[: len(images)]
        return nn.functional.one_hot(chosen, self.n_classes).float() + 0 * self.weight


def contestant(name: str, network: Any) -> Contestant:
    return Contestant(name, "dense", network, (1, 16, 16), 10, 20)


def test_agreement_and_top1(tmp_path: Path) -> None:
    # The labels of the images are 0, 1, 2, 0, 1, 2, ...
    names = {"right": [0, 1, 2], "third": [0, 2, 1], "zero": [0]}
    contestants = [contestant(name, Chooses(classes)) for name, classes in names.items()]
    images = lego.open_images(str(write_images(tmp_path / "x.npz", 30)), dense())
    steps: list[tuple[str, int, int]] = []
    compared = compare_networks(
        contestants[::-1], None, images, batch=2, rounds=2,
        on_step=lambda *step: steps.append(step),
    )  # fmt: skip
    rows = {row.name: row for row in compared.rows}
    assert [row.name for row in compared.rows] == ["zero", "third", "right"]
    assert {name: row.top1 for name, row in rows.items()} == {
        "right": 100, "third": pytest.approx(100 / 3), "zero": pytest.approx(100 / 3)
    }  # fmt: skip
    assert rows["zero"].agreement == 100
    assert rows["right"].agreement == pytest.approx(100 / 3)
    assert rows["zero"].speedup == 1
    assert (compared.images, compared.labelled, compared.rounds) == (30, 30, 2)
    assert compared.image_shape == (2, 1, 16, 16)
    assert ("labelled images", 30, 30) in steps
    assert steps[-1][0] == "timing"


def test_numbers_of_classes_that_differ() -> None:
    contestants = [contestant("a", Chooses([0])), contestant("b", Chooses([0], 5))]
    with pytest.raises(DataError, match="'a' has 3 classes and 'b' has 5"):
        compare_networks(contestants)


def test_labels_beyond_the_classes(tmp_path: Path) -> None:
    contestants = [contestant(name, Chooses([0], 2)) for name in "ab"]
    images = lego.open_images(str(write_images(tmp_path / "x.npz", 6)), dense())
    with pytest.raises(DataError, match="label 2 is beyond the 2 classes"):
        compare_networks(contestants, labelled=images)


def test_an_output_that_is_no_classes() -> None:
    contestants = [contestant("maps", nn.Conv2d(1, 2, 3)), contestant("b", Chooses([0]))]
    with pytest.raises(DataError, match=r"the output of 'maps' is \(1, 2, 14, 14\)"):
        compare_networks(contestants)
