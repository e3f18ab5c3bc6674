"""Sensitivity: fitted forms, runs with one layer changed, resumes, and budgets spent by it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.calibrate import layer_fits, layer_losses
from legocompress.calibrate.layer_losses import list_shapes
from legocompress.compress.planning import plan
from legocompress.errors import DataError, PlanError, SpecError
from tests.support.calibrating import Odd, converted

IMAGE = torch.zeros(1, 3, 8, 8)


class Deaf(nn.Module):
    """A classifier that hardly listens to one of two equal branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.loud = nn.Conv2d(16, 32, 3, padding=1)
        self.quiet = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)
        self.pretrained_cfg = {"input_size": (3, 8, 8), "first_conv": "stem", "classifier": "head"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        scores: Tensor = self.head((self.loud(x).relu() + 0.03 * self.quiet(x).relu()).mean((2, 3)))
        return 20 * scores


@pytest.fixture
def deaf() -> nn.Module:
    torch.manual_seed(0)
    return Deaf().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(36, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_layer_that_decides_costs_more(deaf: nn.Module, images: Tensor) -> None:
    before = copy.deepcopy(deaf.state_dict())
    deaf.train()
    found = lego.sensitivity(deaf, images)
    assert deaf.training
    assert all(torch.equal(value, before[name]) for name, value in deaf.state_dict().items())
    assert [layer.name for layer in found.layers] == ["loud", "quiet"]
    assert (found.images, found.divergence) == (36, True)
    loud, quiet = found.layers
    assert loud.measured_loss is not None
    assert quiet.measured_loss is not None
    assert loud.measured_loss > 20 * quiet.measured_loss
    for a, b in zip(loud.forms, quiet.forms, strict=True):
        assert (a.m, a.o, a.k) == (b.m, b.o, b.k)
        assert a.loss > 20 * b.loss
        assert a.output_error is not None
        assert a.output_error < a.weight_error  # fitted
    assert loud.agreement is not None
    assert quiet.agreement == 100


def test_the_measured_loss_is_that_of_the_layer_alone(deaf: nn.Module, images: Tensor) -> None:
    run = lego.sensitivity(deaf, images, n_run=64).layers[0]
    assert run.measured_loss == pytest.approx(run.forms[0].loss, rel=0.7)
    alone = lego.sensitivity(deaf, images, n_run=0).layers[0]
    assert (alone.measured_loss, alone.agreement, alone.correction) == (None, None, 1)
    assert alone.forms == run.forms


def test_a_budget_is_spent_where_outputs_listen(deaf: nn.Module, images: Tensor) -> None:
    found = lego.sensitivity(deaf, images)
    blind = lego.allocate(deaf, max_macs=0.6)
    spec = lego.allocate(deaf, max_macs=0.6, sensitivity=found)
    rows = {row.name: row for row in plan(deaf, spec).rows}
    assert (rows["loud"].macs or 0) > (rows["quiet"].macs or 0)
    losses = []
    for chosen in (blind, spec):
        student = lego.convert_(copy.deepcopy(deaf), plan(deaf, chosen))
        with torch.no_grad():
            y, z = deaf(images).log_softmax(1), student(images).log_softmax(1)
        losses.append(float((y.exp() * (y - z)).sum()))
    assert losses[1] < losses[0]


def test_an_interrupted_run_continues(
    deaf: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_losses, "MOST_LAYERS", 1)
    expected = lego.sensitivity(deaf, images)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lego.sensitivity(deaf, images, journal=tmp_path, on_layer=stop)
    assert len(list(tmp_path.iterdir())) == 1
    fitted: list[object] = []
    fit = layer_fits.fit_form
    monkeypatch.setattr(
        layer_losses, "fit_form", lambda *args: (fitted.append(args[0]), fit(*args))[1]
    )
    seen: list[tuple[int, int]] = []
    on_layer = lambda done, total: seen.append((done, total))  # noqa: E731
    assert lego.sensitivity(deaf, images, journal=tmp_path, on_layer=on_layer) == expected
    assert set(map(id, fitted)) == {id(deaf.quiet)}
    assert seen == [(2, 2)]
    other = lego.sensitivity(deaf, images, seed=1, journal=tmp_path)
    assert other.layers[0].forms != expected.layers[0].forms  # another seed is another run


def test_odd_layers_are_measured_or_explained() -> None:
    torch.manual_seed(0)
    network = Odd().eval()
    images = torch.randn(30, 3, 12, 12)
    spec = lego.LegoSpec(allow_expansion=True, linear=True)
    found = lego.sensitivity(network, images, spec)
    layers = found.by_name
    assert "changes the weight" in str(layers["standard"].note)
    assert layers["standard"].forms[0].output_error is None
    assert layers["standard"].forms[0].loss > 0
    assert layers["grouped"].forms[0].output_error is not None
    assert layers["shared"].forms[0].loss > 0
    assert layers["unused"].forms[0].loss == 0
    assert "never ran" in str(layers["unused"].note)


def test_outputs_that_are_maps(images: Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
    found = lego.sensitivity(network, images, lego.LegoSpec(allow_expansion=True))
    assert not found.divergence
    (layer,) = found.layers
    assert layer.agreement is None
    assert layer.measured_loss == pytest.approx(layer.forms[0].loss, rel=0.5)


def test_forms_pad_the_channels_alike() -> None:
    network = nn.Sequential(nn.Conv2d(3, 30, 3), nn.Conv2d(30, 64, 3))
    row = plan(network, lego.LegoSpec(m=0.5, o=2), torch.zeros(1, 3, 8, 8)).layers["1"]
    assert {shape.n_split * shape.width for shape, _ in list_shapes(row)} == {30}


def test_what_cannot_be_measured(deaf: nn.Module, images: Tensor) -> None:
    with pytest.raises(DataError, match="9 images are too few"):
        lego.sensitivity(deaf, images[:9])
    with pytest.raises(DataError, match="refuses images"):
        lego.sensitivity(deaf, torch.randn(36, 4, 8, 8))
    with pytest.raises(PlanError, match="Lego modules already"):
        lego.sensitivity(converted(deaf), images)
    found = lego.sensitivity(deaf, images, lego.LegoSpec(only="loud"))
    with pytest.raises(SpecError, match="knows no layer 'quiet'"):
        lego.allocate(deaf, max_macs=0.6, sensitivity=found)
