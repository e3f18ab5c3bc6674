"""Stages, rates and the moving average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from legocompress.errors import UsageError
from tests.support.finetuning import compute_outputs, train
from tests.support.tiny import compressed

pytestmark = pytest.mark.slow

ONE_FROZEN_EPOCH = [{"epochs": 1, "indices": "frozen"}]


def test_stages_freeze_indices_and_rates(images: Path, tmp_path: Path) -> None:
    model = compressed()
    filters = {n: p.clone() for n, p in model.named_parameters() if "lego_filters" in n}
    stem = model.conv1.weight.clone()  # type: ignore[union-attr, operator]
    stages = [
        {"epochs": 1, "rates": {"proxies": 1000.0, "rest": 0}},
        {"epochs": 1, "indices": "frozen", "rates": {"rest": 0}},
    ]
    _, epochs = train(model, images, {"stages": stages}, out=tmp_path / "run")
    assert epochs[0].progress.changed > 0
    assert epochs[1].progress.changed == 0
    assert torch.equal(model.conv1.weight, stem)  # type: ignore[union-attr, arg-type]
    assert all(not torch.equal(p, filters[n]) for n, p in model.named_parameters() if n in filters)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_stage_in_which_nothing_trains_is_refused(images: Path) -> None:
    rates = dict.fromkeys(["filters", "coefficients", "norms", "rest"], 0)
    with pytest.raises(UsageError, match="nothing trains in epoch 1"):
        train(compressed(), images, {"stages": [{**ONE_FROZEN_EPOCH[0], "rates": rates}]})


def test_the_moving_average_is_evaluated(images: Path) -> None:
    plain, _ = train(compressed(), images, {})
    averaged, _ = train(compressed(), images, {"ema": {"decay": 0.9, "warmup": False}})
    assert not torch.equal(compute_outputs(plain), compute_outputs(averaged))
