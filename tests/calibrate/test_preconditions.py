"""What calibration cannot compare is refused before anything is changed; the rest is calibrated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import DataError, LegoError, UsageError
from tests.support.structures import ModelOutput, Pair, Result, Structured, TwoInputs, converted

IMAGES = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SCALAR = torch.tensor(0.5)


class Detector(nn.Module):
    """Takes images, and returns a dict of boxes for each."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Structured(lambda maps, _: {"0": maps})

    def forward(self, images: Any, targets: Any = None) -> list[dict[str, Tensor]]:
        maps = self.backbone(images if isinstance(images, Tensor) else torch.stack(images))["0"]
        return [{"boxes": x.flatten(1)[:, :4]} for x in maps]


@pytest.mark.parametrize(
    ("make", "agreement"),
    [
        (lambda maps, logits: {"out": logits, "aux": None}, True),
        (lambda maps, logits: Result({"n": 1, "maps": maps}, logits), True),
        (lambda maps, logits: ModelOutput(loss=SCALAR, logits=logits), True),
        (lambda maps, logits: Pair([maps, "name"], None), False),
    ],
)
def test_outputs_of_any_structure(make: Callable[..., Any], agreement: bool) -> None:
    original = Structured(make).eval()
    student = converted(original, IMAGES[:1])
    steps: list[tuple[int, int]] = []
    record = lego.calibrate_(
        student, original, IMAGES, epochs=8, on_batch=lambda *step: steps.append(step)
    )
    assert record.error_after < record.error_before
    # Tuning ran to its end. Whether it helps so small a network depends on the random weights.
    assert steps[-1][0] == steps[-1][1] == len(steps)
    assert (record.agreement_after is not None) == agreement


def assert_refused(network: nn.Module, example: Any, images: Any, kind: type, match: str) -> None:
    student = converted(network, example)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(LegoError, match=match) as caught:
        lego.calibrate_(student, network, images)
    assert type(caught.value) is kind
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert lego.lego_state(student).calibration is None


def test_what_is_refused() -> None:
    x = IMAGES[:1]
    assert_refused(
        TwoInputs(), (x, x), IMAGES, UsageError, r"one image input; this network's.* 2 \(x, y\)"
    )
    advice = r"FasterRCNN|Detector returns a list.*calibrate_\(model.backbone, original.backbone, "
    assert_refused(Detector(), (list(x),), IMAGES, DataError, advice)
    network = Structured(lambda maps, _: None)
    assert_refused(network, x, IMAGES, DataError, "no floating-point tensor")
    assert_refused(network, x, list(IMAGES), DataError, r"one float tensor.*not list.*torch.stack")
    assert_refused(network, x, IMAGES.int(), DataError, r"one float tensor.*not torch.int32")
    assert_refused(network, x, IMAGES[:, :2], DataError, r"refuses images of shape \(2, 2, 8, 8\)")
    student = converted(Structured(lambda maps, logits: (maps, logits)), x)
    other = Structured(lambda maps, logits: logits)
    with pytest.raises(DataError, match="cannot be compared"):
        lego.calibrate_(student, other, IMAGES)


def test_the_backbone_of_a_detector_is_calibrated_alone() -> None:
    original = Detector().eval()
    student = converted(original, (list(IMAGES[:1]),))
    record = lego.calibrate_(student.backbone, original.backbone, IMAGES, epochs=0)  # type: ignore[arg-type]
    assert record.error_after < record.error_before
