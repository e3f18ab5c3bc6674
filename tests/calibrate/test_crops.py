"""Random crops of few photos: which photo each shows, and that a seed fixes them."""

from __future__ import annotations

import pickle  # by which reading processes are sent a data set
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import create_model
from torch import Tensor

from legocompress.calibrate.crops import RATIO, SCALE, Crops, open_crops, random_crop
from legocompress.calibrate.layers import HELD_OUT


class Numbers(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Photo number n is n and a number drawn."""

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return torch.tensor([float(position), float(torch.rand(()))]), position


@pytest.mark.slow
@pytest.mark.parametrize("n_photos", [3, 10, 28])
def test_each_photo_is_cropped_as_often_and_judged_by_chance(n_photos: int) -> None:
    crops = Crops(Numbers(), n_photos, 4 * HELD_OUT, 0)
    shown = [crops[position][1] for position in range(len(crops))]
    assert set(Counter(shown).values()) == {4 * HELD_OUT}
    judging = Counter(shown[HELD_OUT - 1 :: HELD_OUT])
    assert set(judging) == set(range(n_photos))


def test_a_seed_fixes_each_crop_and_leaves_the_generator_alone() -> None:
    crops = Crops(Numbers(), 10, 3, 7)
    state = torch.get_rng_state()
    drawn = [crops[position][0] for position in range(len(crops))]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(crops[p][0], drawn[p]) for p in reversed(range(len(crops))))
    assert len({float(value[1]) for value in drawn}) == len(crops)
    other = Crops(Numbers(), 10, 3, 2**63 - 1)
    assert all(not torch.equal(other[p][0][1], drawn[p][1]) for p in range(len(crops)))


def test_a_crop_is_a_part_of_the_photo() -> None:
    rows, columns = np.mgrid[:60, :80].astype(np.uint8)
    photo = Image.fromarray(np.stack([rows, columns, rows], 2))
    shares = []
    for seed in range(30):
        torch.manual_seed(seed)
        part = np.asarray(random_crop(lambda image: image)(photo))  # type: ignore[arg-type, return-value]
        height, width = part.shape[:2]
        assert (np.ptp(part[..., 0]), np.ptp(part[..., 1])) == (height - 1, width - 1)
        shares.append(height * width / (60 * 80))
        assert RATIO[0] - 0.05 <= width / height <= RATIO[1] + 0.05
    assert SCALE[0] - 0.05 <= min(shares) < 0.5 < 0.8 < max(shares) <= SCALE[1]


def test_photos_of_a_folder_are_drawn_first_and_cropped_then(tmp_path: Path) -> None:
    model = create_model("resnet18", pretrained=False)
    for number in range(12):
        Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    whole = open_crops(str(tmp_path), model, 8, 1, seed=3)
    several = open_crops(str(tmp_path), model, 8, 4, seed=3)
    assert (whole.size, several.size, several.labelled) == (8, 32, False)
    reds = {round(float(whole.dataset[p][0][0].mean()), 4) for p in range(8)}
    assert pickle.loads(pickle.dumps(several.dataset)).draws.equal(several.dataset.draws)  # type: ignore[attr-defined]
    batches = [batch[0] for batch in several.batches(16)]
    assert {round(float(image[0].mean()), 4) for batch in batches for image in batch} == reds
    assert len(open_crops(str(tmp_path), model, 8, 1, seed=4).dataset) == 8  # type: ignore[arg-type]
