"""The loop: what is evaluated is what is stored, and nothing else changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import DataError, UsageError
from legocompress.lego.module import lego_modules
from tests.support.finetuning import compute_outputs, train
from tests.support.tiny import compressed, dense, recipe, same, write_images

ONE_FROZEN_EPOCH = [{"epochs": 1, "indices": "frozen"}]
ONE_EPOCH = [{"epochs": 1, "rates": {"proxies": 100.0}}]


@pytest.mark.slow
@pytest.mark.parametrize(("k", "coefficients"), [(1, True), (2, True), (1, False)])
def test_training_learns_and_stores_what_it_evaluated(
    k: int, coefficients: bool, images: Path, tmp_path: Path
) -> None:
    model = compressed(k=k, coefficients=coefficients, dtype="fp16")
    before = {name: m.index.clone() for name, m in lego_modules(model)}
    changes = {"stages": [{"epochs": 4, "rates": {"proxies": 300.0}}]}
    _, epochs = train(model, images, changes, out=tmp_path / "run")
    assert epochs[-1].top1 is not None
    assert epochs[-1].progress.loss < 0.8 * epochs[0].progress.loss
    assert any(not torch.equal(m.index, before[name]) for name, m in lego_modules(model))
    for name in ("last", "best"):
        again = lego.load(tmp_path / "run" / name)
        _, validation = lego.open_training(again, recipe(), str(images))
        evaluation = lego.evaluate(again, validation.batches(5))
        expected = epochs[-1] if name == "last" else [e for e in epochs if e.best][-1]
        assert evaluation.top1 == expected.top1
    assert torch.equal(
        compute_outputs(lego.load(tmp_path / "run" / "last")), compute_outputs(model)
    )
    assert all(m.proxy is None for _, m in lego_modules(model))


@pytest.mark.slow
def test_without_labels_the_original_teaches(tmp_path: Path) -> None:
    images = write_images(tmp_path / "x.npz", labels=False)
    changes = {"stages": [{"epochs": 4}], "distill": {"labels": 0, "logits": 1}}
    _, epochs = train(compressed(), images, changes, original=dense())
    assert epochs[-1].top1 is None
    assert epochs[-1].agreement is not None
    assert epochs[-1].progress.top1 is None
    assert epochs[-1].progress.loss < epochs[0].progress.loss
    with pytest.raises(UsageError, match=r"--set distill.labels=0"):
        train(compressed(), images, {})


@pytest.mark.slow
def test_labels_that_are_not_read_change_nothing(images: Path, tmp_path: Path) -> None:
    changes = {"stages": ONE_EPOCH, "distill": {"labels": 0, "logits": 1}}
    bare = write_images(tmp_path / "bare.npz", labels=False)
    a, _ = train(compressed(), images, changes, original=dense())
    b, _ = train(compressed(), bare, changes, original=dense())
    assert torch.equal(compute_outputs(a), compute_outputs(b))


def test_the_global_random_state_is_restored(images: Path) -> None:
    state = torch.get_rng_state()
    train(compressed(), images, {"stages": ONE_EPOCH})
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dense_network_trains_too(images: Path) -> None:
    model, epochs = train(dense(), images, {"stages": ONE_FROZEN_EPOCH})
    assert compute_outputs(model).isfinite().all()
    assert epochs[0].progress.changed == 0


def test_a_run_does_not_resume_with_another_recipe_or_other_data(
    images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(compressed(), images, {"stages": ONE_EPOCH}, out=out)
    with pytest.raises(UsageError, match="batch_size: 8 then, 4 now"):
        train(compressed(), images, {"stages": ONE_EPOCH, "batch_size": 4}, out=out, resume=True)
    more = write_images(tmp_path / "more.npz", number=80)
    with pytest.raises(UsageError, match="the data has changed"):
        train(compressed(), more, {"stages": ONE_EPOCH}, out=out, resume=True)


def test_distilling_needs_the_original(images: Path) -> None:
    with pytest.raises(UsageError, match="not given"):
        train(compressed(), images, {"distill": {}})
    changes = {"distill": {"features": 1, "layers": ["layer9"]}}
    with pytest.raises(UsageError, match="has no module 'layer9'"):
        train(compressed(), images, changes, original=dense())
    other = lego.reset_classifier_(dense(), 7)
    with pytest.raises(UsageError, match=r"distill\.logits=0"):
        train(compressed(), images, {"distill": {}}, original=other)


class WithHead(nn.Module):
    """The tiny network with a second output, in train mode only or always."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.net, self.output, self.aux = compressed(), output, nn.Linear(3, 3)
        self.pretrained_cfg: Any = self.net.pretrained_cfg

    def forward(self, x: Tensor) -> Any:
        y = self.net(x)
        if self.output == "maps":
            return {"out": x, "aux": x}
        if self.output == "dict":
            return {"logits": y, "maps": x}
        return (y, self.aux(y)) if self.training else y


@pytest.mark.slow
@pytest.mark.parametrize("output", ["auxiliary", "dict"])
def test_a_network_of_several_outputs_trains_by_its_logits(output: str, images: Path) -> None:
    torch.manual_seed(0)
    model = WithHead(output)
    plain = copy.deepcopy(model.net)
    changes = {"stages": ONE_EPOCH, "distill": {"labels": 0.5, "logits": 0.5}}
    _, epochs = train(model, images, changes, original=WithHead(output))
    _, expected = train(plain, images, changes, original=compressed())
    assert epochs == [replace(e, progress=epochs[0].progress) for e in expected]
    assert epochs[0].progress.loss == expected[0].progress.loss
    assert same(model.net, plain)


def test_a_network_without_logits_is_refused_before_anything_is_changed(
    images: Path, tmp_path: Path
) -> None:
    model = WithHead("maps").train()
    before = copy.deepcopy(model)
    for student, original in ((model, dense()), (compressed(), model)):
        changes = {"stages": ONE_EPOCH, "distill": {"labels": 0.5, "logits": 0.5}}
        with pytest.raises(DataError, match=r"a dict of .*needs \(N, classes\): wrap the network"):
            train(student, images, changes, original=original, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
    assert same(model, before)
    assert model.training
    assert all(m.proxy is None for _, m in lego_modules(model))
