"""The terms of the loss against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.googlenet import GoogLeNetOutputs

from legocompress.errors import DataError, UsageError
from legocompress.finetune.distill import (
    Criterion,
    capture_outputs,
    choose_feature_layers,
    kl_divergence,
    relative_squared_error,
)
from legocompress.finetune.recipe import Distill
from tests.support.tiny import compressed, dense, recipe


def test_kl_is_zero_at_the_original_and_scaled_by_the_square_of_the_temperature() -> None:
    student, original = torch.randn(5, 4), torch.randn(5, 4)
    assert float(kl_divergence(original, original, 3.0)) == pytest.approx(0, abs=1e-6)
    p, q = (original / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(kl_divergence(student, original, 3.0), expected)


def test_the_relative_squared_error_is_zero_at_the_original() -> None:
    original = torch.randn(2, 3)
    assert float(relative_squared_error(original, original)) == 0
    torch.testing.assert_close(relative_squared_error(3 * original, original), torch.tensor(4.0))


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    student, original = compressed().eval(), dense()
    block = {"labels": 0.3, "logits": 0.5, "temperature": 2.0, "features": 0.7}
    criterion = Criterion(recipe(distill=block, label_smoothing=0.1), student, original)
    assert criterion.layers == ("layer1", "layer2", "layer3", "layer4")
    x, y = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])
    loss, logits = criterion(student, student, x, y)
    with (
        capture_outputs(student, criterion.layers) as outputs,
        capture_outputs(original, criterion.layers) as original_outputs,
    ):
        a, b = student(x), original(x)
    features = (
        sum(relative_squared_error(outputs[n], original_outputs[n]) for n in criterion.layers) / 4
    )
    labels = F.cross_entropy(a, y, label_smoothing=0.1)
    torch.testing.assert_close(loss, 0.3 * labels + 0.5 * kl_divergence(a, b, 2.0) + 0.7 * features)
    assert torch.equal(logits, a)
    assert not any(module._forward_hooks for module in student.modules())


def test_without_distillation_the_loss_is_cross_entropy() -> None:
    model = dense()
    x, y = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])
    loss, logits = Criterion(recipe(), model, None)(model, model, x, y)
    torch.testing.assert_close(loss, F.cross_entropy(logits, y))
    mixed = torch.rand(4, 3).softmax(1)
    loss, logits = Criterion(recipe(), model, None)(model, model, x, mixed)
    torch.testing.assert_close(loss, -(mixed * logits.log_softmax(1)).sum(1).mean())


def test_feature_layers_are_named_by_recipe_or_network() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    with pytest.raises(UsageError, match="does not tell its stages"):
        choose_feature_layers(Distill(features=1), model, model)
    assert choose_feature_layers(Distill(features=1, layers=("0",)), model, model) == ("0",)
    with pytest.raises(UsageError, match="the original has no module '1'"):
        choose_feature_layers(Distill(features=1, layers=("1",)), model, nn.Sequential(nn.ReLU()))


def test_stages_before_every_lego_layer_are_left_out() -> None:
    compressed_layers, dense_layers = (
        choose_feature_layers(Distill(features=1), m, dense()) for m in (compressed(), dense())
    )
    assert dense_layers == ("act1", *compressed_layers)


def test_an_output_that_is_not_a_classification_is_refused() -> None:
    model = nn.Conv2d(1, 4, 3)
    with pytest.raises(DataError, match=r"needs \(N, classes\)"):
        Criterion(recipe(), model, None)(model, model, torch.randn(1, 1, 8, 8), torch.zeros(1))


def test_of_several_outputs_the_logits_alone_enter_the_loss() -> None:
    class Auxiliary(nn.Module):
        """Returns the logits, and in train mode those of an auxiliary head."""

        def __init__(self) -> None:
            super().__init__()
            self.main, self.aux = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> GoogLeNetOutputs:
            return GoogLeNetOutputs(self.main(x), self.aux(x), None)

    student, original = Auxiliary(), Auxiliary()
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    settings = recipe(distill={"labels": 0.5, "logits": 0.5})
    plain = Criterion(settings, student.main, original.main)(student.main, student.main, x, y)
    wrapper = nn.Sequential(student)
    for runs in (student, wrapper):
        loss, logits = Criterion(settings, student, original)(runs, student, x, y)
        assert torch.equal(loss, plain[0])
        assert torch.equal(logits, student.main(x))
        loss.backward()
        assert student.main.weight.grad is not None
        gradient = student.aux.weight.grad  # a wrapper of several processes waits for it
        assert gradient is None if runs is student else gradient is not None
        assert gradient is None or not gradient.any()
