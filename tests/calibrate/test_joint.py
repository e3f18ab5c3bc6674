"""Tuning all layers together, its rates and its images; norm statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.calibrate import joint
from legocompress.calibrate.basis import input_bases
from legocompress.calibrate.calibration import lego_values
from tests.support.calibrating import Odd, converted

pytestmark = pytest.mark.slow


def test_images_are_mirrored_and_blended() -> None:
    images = torch.arange(64.0).reshape(64, 1, 1, 1).expand(-1, 3, 2, 2).clone()
    images[..., 1] += 1000.0  # tells the sides apart
    varied = joint._augment(images, torch.Generator().manual_seed(0))
    again = joint._augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(varied, again)
    sides = (varied[:, 0, 0, 1] - varied[:, 0, 0, 0]) / 1000  # 1 as it was, -1 mirrored
    assert bool((sides.abs() <= 1 + 1e-4).all())
    assert sides.min() < -0.9
    assert sides.max() > 0.9
    own, before = images[..., 0].mean((1, 2)), images.roll(1, 0)[..., 0].mean((1, 2))
    level = varied.mean((1, 2, 3)) - 500.0
    assert bool((level >= torch.minimum(own, before) - 0.1).all())
    assert bool((level <= torch.maximum(own, before) + 0.1).all())


def test_the_last_quarter_of_the_steps_sees_images_as_they_are() -> None:
    original = Odd().eval()
    student, images = converted(original), torch.randn(8, 3, 12, 12)
    seen: list[Tensor] = []
    original.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    values = lego_values(student)
    joint.tune_(joint.JointTuning(student, original, images, values, [], {}, 4, 0), 4, 1e-3)
    known = {image.numpy().tobytes() for image in images}
    plain = [all(image.contiguous().numpy().tobytes() in known for image in x) for x in seen]
    assert plain == [False] * 6 + [True] * 2
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tuning_leaves_layouts_as_they_were(layout: torch.memory_format) -> None:
    original = Odd().eval().to(memory_format=layout)  # type: ignore[call-overload]
    student = converted(original)
    strides = [p.stride() for n in (student, original) for p in n.parameters()]
    values, images = lego_values(student), torch.randn(16, 3, 12, 12)
    before = joint.output_error(student, original, [images])
    bases = input_bases(student, [layer for _, layer in lego.lego_modules(student)], images)
    joint.tune_(joint.JointTuning(student, original, images, values, [], bases, 8, 0), 6, 4e-3)
    assert joint.output_error(student, original, [images]) < before
    assert [p.stride() for n in (student, original) for p in n.parameters()] == strides


@pytest.mark.parametrize(("error", "chosen"), [(1.2, 4e-3), (1.5, 1e-3), (torch.nan, 1e-3)])
def test_a_low_rate_must_lead_by_more_than_a_short_trial_gives_it(
    error: float, chosen: float
) -> None:
    found = iter([error, 1.0])
    rates: list[float] = []
    joint.tune_at_chosen_rate_(
        nn.Linear(1, 1), lambda rate, **_: rates.append(rate), lambda: next(found), epochs=2
    )
    assert rates == [4e-3, 1e-3, chosen]


@pytest.mark.slow
@pytest.mark.parametrize("rates", [(1e6, 4e-3), (4e-3, 1e6)])
def test_tuning_takes_the_rate_that_serves_better(
    monkeypatch: pytest.MonkeyPatch, rates: tuple[float, ...]
) -> None:
    original, images = Odd().eval(), torch.randn(40, 3, 12, 12)
    alone, chosen = converted(original), converted(original)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(joint, "RATES", (4e-3,))
    lego.calibrate_(alone, original, images, epochs=2)
    monkeypatch.setattr(joint, "RATES", rates)
    record = lego.calibrate_(
        chosen, original, images, epochs=2, on_batch=lambda *counts: told.append(counts)
    )
    assert record.epochs == 2
    for name, value in alone.state_dict().items():
        assert torch.equal(chosen.state_dict()[name], value), name
    steps = 4 * 8  # two trials of a pass and two passes; 32 images by fours
    assert told == [(done + 1, steps) for done in range(steps)]


def test_norm_statistics_are_those_of_the_images() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    images = 3 * torch.randn(40, 3, 6, 6) + 1
    joint.reestimate_norms_(network, torch.split(images, 10))
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert not norm.training
    assert norm.momentum == 0.1
    assert torch.allclose(norm.running_mean, network[0](images).mean((0, 2, 3)), atol=1e-3)
