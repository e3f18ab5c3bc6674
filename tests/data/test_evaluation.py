"""Accuracy and agreement, against hand computation on a network of known outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.data.datasets import UNLABELLED
from legocompress.errors import DataError


class Fixed(nn.Module):
    """A network whose outputs are its inputs' pixels times a matrix."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix


def batches(x: Tensor, labels: list[int], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), torch.tensor(labels).split(size), strict=True))


def test_evaluation_by_hand() -> None:
    outputs = torch.tensor([
        [9.0, 8, 7, 6, 5, 4, 3],
        [3.0, 4, 5, 6, 7, 8, 9],
        [1.0, 9, 2, 3, 4, 5, 6],
        [0.0, 1, 0, 0, 0, 0, 0],
    ])  # fmt: skip
    labels = [0, 2, 0, UNLABELLED]  # first; fifth; last; not known
    other = outputs.clone()
    other[0, 0] = 0  # now class 1 is first there
    x = torch.eye(4)
    model, original = Fixed(outputs), Fixed(other)
    seen: list[int] = []
    found = lego.evaluate(model, batches(x, labels, 3), original, on_batch=seen.append)
    assert seen == [3, 1]
    assert found.images == 4
    assert found.top1 == pytest.approx(100 / 3)
    assert found.top5 == pytest.approx(200 / 3)
    assert found.original_top1 == pytest.approx(0)
    assert found.original_top5 == pytest.approx(100 / 3)
    assert found.agreement == pytest.approx(75)
    assert found.output_error == pytest.approx(9 / float(other.norm()), rel=1e-5)
    alone = lego.evaluate(model, batches(x, labels, 1))
    assert (alone.top1, alone.top5) == (pytest.approx(100 / 3), pytest.approx(200 / 3))  # type: ignore[comparison-overlap]
    assert (alone.original_top1, alone.agreement, alone.output_error) == (None, None, None)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5])
def test_few_classes(classes: int) -> None:
    model = Fixed(torch.eye(classes))
    x = torch.eye(classes)
    found = lego.evaluate(model, batches(x, list(range(classes)), 2), model)
    assert (found.top1, found.top5, found.agreement, found.output_error) == (100, 100, 100, 0)
    wrong = [(label + 1) % classes for label in range(classes)]
    found = lego.evaluate(model, batches(x, wrong, 2))
    assert (found.top1, found.top5) == (100 if classes == 1 else 0, 100)


def test_unlabelled_images_have_no_accuracy() -> None:
    model = Fixed(torch.eye(3))
    found = lego.evaluate(model, batches(torch.eye(3), [UNLABELLED] * 3, 2), model)
    assert (found.images, found.top1, found.top5, found.original_top1) == (3, None, None, None)
    assert found.agreement == 100


@pytest.mark.parametrize("label", [3, 1000, -2])
def test_a_label_out_of_range(label: int) -> None:
    with pytest.raises(DataError, match=f"label {label} .*3 outputs.*--class-map"):
        lego.evaluate(Fixed(torch.eye(3)), batches(torch.eye(3), [0, 1, label], 2))


def test_networks_of_another_number_of_outputs() -> None:
    with pytest.raises(DataError, match=r"4.*3|3.*4"):
        lego.evaluate(
            Fixed(torch.eye(3)), batches(torch.eye(3), [0, 1, 2], 2), Fixed(torch.ones(3, 4))
        )


def test_what_cannot_be_evaluated() -> None:
    with pytest.raises(DataError, match="no image"):
        lego.evaluate(Fixed(torch.eye(3)), [])
    maps = nn.Conv2d(3, 2, 1)
    with pytest.raises(DataError, match=r"output is \(1, 2, 8, 8\)"):
        lego.evaluate(maps, [(torch.zeros(1, 3, 8, 8), torch.tensor([0]))])


def test_evaluation_restores_the_training_flag() -> None:
    model, original = Fixed(torch.eye(3)).train(), Fixed(torch.eye(3)).train()
    lego.evaluate(model, batches(torch.eye(3), [0, 1, 2], 2), original)
    assert model.training
    assert original.training


class Structured(Fixed):
    """Returns the outputs in a dict, beside something else."""

    def __init__(self, matrix: Tensor, **more: Any) -> None:
        super().__init__(matrix)
        self.more = more

    def forward(self, x: Tensor) -> Any:
        return {"aux": None, "logits": super().forward(x), **self.more}


def test_outputs_in_a_structure() -> None:
    x = torch.eye(3)
    model, original = (
        Structured(torch.eye(3), maps=torch.full((1, 2, 2, 2), value)) for value in (1.0, 2.0)
    )
    found = lego.evaluate(model, batches(x, [0, 1, 1], 1), original)
    assert found.top1 == pytest.approx(200 / 3)
    assert found.agreement == 100
    assert found.output_error == pytest.approx((24 / (3 + 3 * 32)) ** 0.5)  # of the maps, too
    ambiguous = Structured(torch.eye(3), other=torch.ones(1, 3))
    with pytest.raises(DataError, match=r"a dict of \(1, 3\), \(1, 3\).*need one tensor"):
        lego.evaluate(ambiguous, batches(x, [0, 1, 1], 1))
    other = Structured(torch.eye(3), maps=torch.ones(1, 2))
    with pytest.raises(DataError, match=r"original.*name the network"):
        lego.evaluate(other, batches(x, [0, 1, 1], 3), Structured(torch.eye(3)))
