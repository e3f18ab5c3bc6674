"""Calibration as a whole: what is repaired, recorded, resumed and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.calibrate.calibration import FEWEST, gather
from legocompress.errors import ConversionError, DataError, TrainingError
from tests.support.calibrating import DEMO, NAME, Odd, converted, demo_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repaired() -> tuple[nn.Module, nn.Module, lego.Calibration]:
    original = lego.create(NAME)
    student = converted(original)
    record = lego.calibrate_(student, original, demo_images(120), epochs=12)
    return student, original, record


@pytest.mark.slow
def test_a_broken_network_does_again_what_the_original_does(
    repaired: tuple[nn.Module, nn.Module, lego.Calibration],
) -> None:
    student, original, record = repaired
    assert record.agreement_before is not None
    assert record.agreement_after is not None
    assert record.agreement_before < 40
    assert record.agreement_after > 75
    assert record.error_after < 0.5 < record.error_before
    assert record.epochs == 12
    rows = {row.name: row for row in record.layers}
    assert set(rows) == {name for name, _ in lego.lego_modules(student)}
    for row in rows.values():
        assert row.before is not None
        assert row.after is not None
        assert row.after <= row.before
    with np.load(DEMO / "fashion-sample.npz") as file:
        labels = torch.from_numpy(file["labels"].astype(np.int64))
    images = lego.open_images(str(DEMO / "fashion-sample.npz"), original)
    with torch.no_grad():
        picks = torch.cat([student(x).argmax(1) for x, _ in images.batches(250)])
    assert float((picks == labels).float().mean()) > 0.7  # images that no step has seen


def test_the_checkpoint_keeps_the_record_and_the_values(
    repaired: tuple[nn.Module, nn.Module, lego.Calibration], tmp_path: Path
) -> None:
    student, _, record = repaired
    again = lego.load(lego.save(student, tmp_path / "folder"))
    assert lego.lego_state(again).calibration == record
    x = torch.randn(2, 1, 56, 56)
    with torch.no_grad():
        assert torch.equal(again(x), student.eval()(x))


def test_an_exact_network_stays_as_it_is() -> None:
    original = Odd().eval()
    student = converted(original, m=2.0, o=2, allow_expansion=True)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    record = lego.calibrate_(student, original, torch.randn(20, 3, 12, 12), epochs=1)
    assert record.error_after <= record.error_before < 1e-3
    for key, value in student.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_flags_hooks_and_gradients_are_given_back() -> None:
    original, images = Odd().train(), torch.randn(20, 3, 12, 12)
    student = converted(original).train()
    student.stem.weight.requires_grad_(False)  # type: ignore[union-attr]
    lego.calibrate_(student, original, images, epochs=1)
    assert student.training
    assert original.training
    assert not student.stem.weight.requires_grad  # type: ignore[union-attr]
    assert all(p.grad is None for p in student.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in student.modules())
    others = {k: v for k, v in original.state_dict().items() if k.startswith("stem")}
    assert all(torch.equal(student.state_dict()[key], value) for key, value in others.items())


def test_too_few_images_and_a_foreign_original_are_refused() -> None:
    original = lego.create(NAME)
    student = converted(original)
    with pytest.raises(DataError, match="9 images are too few"):
        gather([torch.zeros(9, 1, 8, 8)], 100)
    with pytest.raises(DataError, match="differ in size"):
        gather([torch.zeros(9, 1, 8, 8), torch.zeros(9, 1, 4, 8)], 100)
    with pytest.raises(DataError, match="too few"):
        lego.calibrate_(student, original, torch.zeros(FEWEST - 1, 1, 56, 56))
    with pytest.raises(ConversionError, match="has no layer"):
        lego.calibrate_(student, nn.Conv2d(1, 1, 1), torch.zeros(20, 1, 56, 56))


def test_gather_takes_the_first_images_and_drops_labels() -> None:
    batches = [(torch.full((8, 1, 2, 2), float(n)), torch.zeros(8)) for n in range(4)]
    images = gather(batches, 20)
    assert images.shape == (20, 1, 2, 2)
    assert images[:, 0, 0, 0].tolist() == [0.0] * 8 + [1.0] * 8 + [2.0] * 4


class InPlace(nn.Module):
    """A network whose forward changes a value that the gradient of its last conv needs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Conv2d(8, 16, 3)
        self.last = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.stem(x)).sigmoid()
        z = self.last(y)
        y *= 2
        return z.mean((2, 3))


def test_a_network_that_cannot_be_tuned_jointly_is_explained() -> None:
    torch.manual_seed(0)
    original = InPlace().eval()
    student, images = converted(original), torch.randn(12, 3, 12, 12)
    with pytest.raises(TrainingError, match=r"in-place operation.*epochs=0 \(--epochs 0\) repairs"):
        lego.calibrate_(student, original, images, epochs=1)
    record = lego.calibrate_(converted(original), original, images, epochs=0)
    assert record.error_after < record.error_before
