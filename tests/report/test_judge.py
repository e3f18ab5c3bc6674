"""Photos are divided into those that calibrate and those that judge; scores are percentages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from legocompress.errors import DataError, UsageError
from legocompress.report.judge import Judge, open_judge


class Brightness(nn.Module):
    """Class 1 for bright images and class 0 for dark ones."""

    pretrained_cfg = {  # noqa: RUF012
        "input_size": (3, 8, 8), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0,
    }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """A judge of 20 grey photos that become brighter, half of them of class 1."""
    levels = np.linspace(0, 255, 20).astype(np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (20, 8, 8, 3))
    np.savez(tmp_path / "photos.npz", images=images, labels=(levels > 127).astype(int))
    path = str(tmp_path / "photos.npz")
    return open_judge(Brightness(), path, path)


def values(judge: Judge, which: str) -> list[float]:
    return [float(x.mean()) for x, _ in getattr(judge, which).batches(1)]


def test_no_photo_both_calibrates_and_judges(judge: Judge) -> None:
    calibration, held_out = values(judge, "calibration"), values(judge, "held_out")
    assert (len(calibration), len(held_out)) == (15, 5)
    assert len({*calibration, *held_out}) == 20


def test_scores(judge: Judge) -> None:
    assert judge.original_score.agreement == 100
    assert judge.original_score.top1 == 100
    always_bright = judge.score(lambda x: torch.tensor([[0.0, 1.0]]).expand(len(x), 2), 3)
    n_bright = sum(value > 0.5 for value in values(judge, "held_out"))
    assert always_bright.agreement == 100 * n_bright / 5
    assert always_bright.top1 == pytest.approx(50)


def test_a_form_gets_whole_batches(judge: Judge) -> None:
    sizes: list[int] = []

    def predict(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return Brightness()(x)

    assert judge.score(predict, 3).agreement == 100
    assert set(sizes) == {3}


def test_what_cannot_judge_is_refused(judge: Judge, tmp_path: Path) -> None:
    path = str(tmp_path / "unlabelled.npz")
    np.savez(path, images=np.zeros((9, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="has no labels"):
        open_judge(Brightness(), path, path)
    with pytest.raises(UsageError, match=r"accuracy needs one tensor \(N, classes\)"):
        judge.score(lambda x: x, 3)
