"""Evaluation of a network in its folded form: the same figures, and the network as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.data import evaluation
from legocompress.deploy import folded_evaluation
from legocompress.deploy.folded_evaluation import running_folded
from legocompress.deploy.forward import DeployedForward
from legocompress.errors import DataError


class Block(nn.Module):
    """Conv, norm and activation with a residual sum, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.deep(x)).mean((2, 3)))  # type: ignore[no-any-return]


def network(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    model = Block()
    for _ in range(3):
        model(torch.randn(8, 3, 16, 16))  # statistics that differ from zero and one
    return model.train()


def batches(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.randint(5, (count,), generator=generator)
    return list(zip(x.split(5), labels.split(5), strict=True))


def is_folded(model: nn.Module) -> bool:
    return any(isinstance(m.__dict__.get("forward"), DeployedForward) for m in model.modules())


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form is built for few images, too."""
    monkeypatch.setattr(folded_evaluation, "LEAST_PIXELS", 1)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("is_lego", [False, True])
def test_the_figures_are_those_of_the_networks_own_code(is_lego: bool) -> None:
    original, model = network(), network()
    if is_lego:
        lego.convert_(model, lego.plan(model, lego.LegoSpec(m=0.5, o=2, k=1)))
    folded: list[bool] = []
    expected = evaluation.evaluate(model, batches(), original)
    found = lego.evaluate(
        model, batches(), original, on_batch=lambda _: folded.append(is_folded(model))
    )
    assert folded == [True] * 3
    assert (found.images, found.top1, found.agreement) == (12, expected.top1, expected.agreement)
    assert found.original_top5 == expected.original_top5
    assert found.output_error == pytest.approx(expected.output_error, abs=1e-4)


def test_outputs_are_equal_within_rounding_and_the_network_is_as_before() -> None:
    model, x = network(), batches()[0][0]
    with torch.no_grad():
        expected = model.eval()(x)
        model.train()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        with running_folded(model, x[:2]):
            assert is_folded(model)
            assert not torch.equal(model(x), expected)  # it does run other code
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert model.training
    assert all(module.training for module in model.modules())
    assert not is_folded(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert lego.lego_state(model).deployment is None


@pytest.mark.usefixtures("always")
def test_a_deployed_network_runs_its_deployed_form() -> None:
    model = network()
    lego.deploy_(model, batches()[0][0][:1], only=("assemble",), formats=("nchw",))
    forward = model.__dict__["forward"]
    seen = []
    lego.evaluate(model, batches(), on_batch=lambda _: seen.append(model.__dict__["forward"]))
    assert seen == [forward] * 3
    assert model.__dict__["forward"] is forward
    assert lego.lego_state(model).deployment is not None


class Refuses(Block):
    """Raises what tracing does not expect, at its second forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if type(x) is not Tensor:
            raise ZeroDivisionError("not by symbols")
        return super().forward(x)


@pytest.mark.usefixtures("always")
def test_a_network_that_does_not_trace_as_a_whole_is_evaluated() -> None:
    model = Refuses()
    expected = evaluation.evaluate(model, batches())
    assert lego.evaluate(model, batches()) == expected
    assert not is_folded(model)


@pytest.mark.parametrize("case", ["float64", "three axes", "autocast"])
def test_what_onednn_does_not_run_is_left_alone(case: str) -> None:
    model, example = network(), batches()[0][0][:2]
    if case == "float64":
        model, example = model.double(), example.double()
    if case == "three axes":
        example = example[0]
    with torch.autocast("cpu", enabled=case == "autocast"), running_folded(model, example):
        assert not is_folded(model)


@pytest.mark.usefixtures("always")
def test_an_error_in_a_batch_leaves_the_network_as_before() -> None:
    model: Any = network()
    wrong = [*batches(), (torch.zeros(1, 3, 16, 16), torch.tensor([7]))]
    with pytest.raises(DataError, match="label 7 is beyond"):
        lego.evaluate(model, wrong)
    assert not is_folded(model)
    assert model.training


def test_few_images_and_streams_run_as_they_are() -> None:
    model, folded = network(), []

    def record(_: int) -> None:
        folded.append(is_folded(model))

    lego.evaluate(model, batches(), on_batch=record)
    lego.evaluate(model, iter(batches()), on_batch=record)
    assert folded == [False] * 6


@pytest.mark.usefixtures("always")
def test_a_loader_of_files(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(6) % 5)
    model: Any = network()
    model.pretrained_cfg = {"input_size": (3, 16, 16)}
    images = lego.open_images(str(tmp_path / "x.npz"), model)
    folded: list[bool] = []
    found = lego.evaluate(
        model, images.batches(4), on_batch=lambda _: folded.append(is_folded(model))
    )
    assert folded == [True, True]
    assert found == evaluation.evaluate(model, images.batches(4))
