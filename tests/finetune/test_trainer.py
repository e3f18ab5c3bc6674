"""The updates: every setting of a recipe trains, and accumulated parts equal one batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import legocompress as lego
from legocompress.data.images import preprocessing
from legocompress.finetune.loop import finetune_
from legocompress.finetune.progress import Progress
from tests.support.finetuning import compute_outputs, train
from tests.support.tiny import compressed, dense, recipe

pytestmark = pytest.mark.slow

ONE_EPOCH = [{"epochs": 1, "rates": {"proxies": 100.0}}]


def test_the_first_loss_is_that_of_the_converted_network(images: Path) -> None:
    model, twin = compressed(), compressed()
    settings = recipe(augment={"crop": "none", "hflip": 0}, norm_stats="frozen", batch_size=40)
    train_images, validation = lego.open_training(model, settings, str(images))
    steps: list[Progress] = []
    finetune_(model, settings, train_images, validation, on_step=steps.append)
    shown = torch.stack([preprocessing(twin)[0](i) for i, _ in train_images.dataset])  # type: ignore[attr-defined]
    labels = torch.tensor([label for _, label in train_images.dataset])  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(twin(shown), labels)
    assert math.isclose(steps[0].loss, float(expected), rel_tol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": {"decay": 0.5, "warmup": False}},
        {"mixup": {"mixup": 0.2, "cutmix": 1.0}, "label_smoothing": 0.1},
        {"amp": "bf16"},
        {"clip": {"value": 0.1}},
        {"clip": {"value": 0.1, "mode": "agc"}},
        {"balance": 0.1},
        {"anchor": 0.1},
        {"norm_stats": "frozen"},
        {"channels_last": True},
        {"optimizer": {"name": "adamw", "lr": 0.001, "options": {"betas": [0.9, 0.95]}}},
        {"optimizer": {"name": "lamb", "lr": 0.001}},
        *[
            {"schedule": {"name": name, "warmup_epochs": 0.5}}
            for name in ("step", "multistep", "poly", "tanh", "constant")
        ],
        {"augment": {"auto_augment": "rand-m3", "re_prob": 0.3, "color_jitter": 0.1}},
        {"distill": {"labels": 0, "features": 0.5}},
        {"distill": {"logits": 0, "features": 1, "layers": ["layer2"]}},
    ],
    ids=str,
)
def test_every_setting_trains(changes: dict[str, Any], images: Path) -> None:
    model, epochs = train(compressed(), images, {"stages": ONE_EPOCH, **changes}, original=dense())
    assert compute_outputs(model).isfinite().all()
    assert math.isfinite(epochs[0].progress.loss)


def test_accumulated_parts_equal_one_batch(images: Path) -> None:
    """Norms by their running statistics, so that parts do not see each other."""
    frozen = {"norm_stats": "frozen"}
    whole, one = train(compressed(), images, frozen)
    parts, two = train(compressed(), images, {**frozen, "accumulate": 4})
    torch.testing.assert_close(compute_outputs(whole), compute_outputs(parts), rtol=1e-3, atol=1e-4)
    assert math.isclose(one[-1].progress.loss, two[-1].progress.loss, rel_tol=1e-5)
