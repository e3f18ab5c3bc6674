"""Failures during training: errors name what to change, and saved files stay good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import TrainingError
from legocompress.finetune.epoch import Epoch
from legocompress.finetune.loop import finetune_
from legocompress.finetune.progress import Progress
from legocompress.finetune.trainer import Trainer
from tests.support.finetuning import compute_outputs, train
from tests.support.tiny import compressed, dense, recipe


def test_a_loss_that_is_not_finite_stops_the_run(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"optimizer": {"lr": 1e30}, "stages": [{"epochs": 3, "indices": "frozen"}]}
    with pytest.raises(TrainingError, match=r"what was saved before is still good.*optimizer.lr="):
        train(compressed(), images, changes, out=out)
    assert not (out / "last").exists()


@pytest.mark.slow
def test_the_last_good_checkpoint_stays(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    model = compressed()
    settings = recipe()
    data = lego.open_training(model, settings, str(images))

    def spoil(epoch: Epoch) -> None:
        with torch.no_grad():
            model.conv1.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]

    with pytest.raises(TrainingError, match="epoch 2"):
        finetune_(model, settings, *data, out=out, on_epoch=spoil)
    assert compute_outputs(lego.load(out / "last")).isfinite().all()
    resumed, _ = train(compressed(), images, {}, out=out, resume=True)
    whole, _ = train(compressed(), images, {})
    assert torch.equal(compute_outputs(resumed), compute_outputs(whole))


def test_weights_that_are_not_finite_are_not_saved(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    model, settings = compressed(), recipe(save_every=2)
    data = lego.open_training(model, settings, str(images))
    states: list[bytes] = []

    def spoil(step: Progress) -> None:
        if step.update == 4:
            states.append((out / "state.pt").read_bytes())
            with torch.no_grad():
                model.conv1.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]

    with pytest.raises(TrainingError, match=r"conv1\.weight holds NaN"):
        finetune_(model, settings, *data, out=out, on_step=spoil)
    assert (out / "state.pt").read_bytes() == states[0]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ["--set accumulate=2", "amp=bf16", "no N"]),
        (MemoryError(), ["--set accumulate=2"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ["accumulate=2"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), ["--workers 0"]),
    ],
)
def test_errors_name_the_setting_to_lower(
    error: Exception, words: list[str], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "_backward", fail)
    with pytest.raises(TrainingError) as caught:
        train(compressed(), images, {})
    for word in words:
        assert word in str(caught.value)


class InPlace(nn.Module):
    """A classifier whose forward changes a value that the gradient of its conv needs."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = dense().pretrained_cfg
        self.stem, self.conv = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).sigmoid()
        z = self.conv(y)
        y *= 2
        return self.head(z.mean((2, 3)))


def test_an_in_place_operation_that_breaks_the_gradient_is_explained(images: Path) -> None:
    model = InPlace()
    lego.convert_(model, lego.plan(model, example_input=torch.zeros(1, 1, 16, 16)))
    assert [name for name, _ in lego.lego_modules(model)] == ["conv"]
    words = r"in-place operation in its forward.*\(.*inplace operation.*write y = y \+ x instead"
    with pytest.raises(TrainingError, match=words):
        train(model, images, {})


def test_other_errors_pass_unchanged(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "_backward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(compressed(), images, {})
