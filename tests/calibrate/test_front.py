"""Running on from what was kept gives what running from the start gives."""

from __future__ import annotations

import copy

import pytest
import torch

import legocompress as lego
from legocompress.calibrate.front import Front
from legocompress.calibrate.stream import run_to
from tests.support.calibrating import NAME, Twice, converted, demo_images


@pytest.mark.slow
def test_running_on_from_a_cut_gives_the_same_calls() -> None:
    network = lego.create(NAME)
    student = converted(network).eval()
    images = demo_images(12)
    front = Front((network, student), torch.split(images, 5))
    for name, _ in list(lego.lego_modules(student)):
        front.advance(name)
        for number, (original, model, batch) in enumerate(front.batches()):
            for net in (original, model):
                (call,) = run_to(net, net.get_submodule(name), 1, batch)
                with torch.no_grad():
                    plain = copy.deepcopy(net)
                    for module in plain.modules():
                        module.__dict__.pop("forward", None)
                    (wanted,) = run_to(plain, plain.get_submodule(name), 1, batch)
                assert torch.equal(call.x, wanted.x), (name, number)
    # A stage ends with its last block, so the outermost of the two is named.
    wanted_cuts = "maxpool layer1.0 layer1 layer2.0 layer2 layer3.0 layer3"
    assert front.passed == wanted_cuts.split()
    assert not any("forward" in module.__dict__ for module in student.modules())


def test_no_cut_is_made_across_a_skip() -> None:
    network = Twice().eval()
    front = Front((network, network), [torch.randn(4, 3, 6, 6)])
    front.advance("last")
    assert front.passed == ["stem"]


def test_a_small_budget_keeps_nothing_and_changes_nothing() -> None:
    network = Twice().eval()
    images = torch.randn(4, 3, 6, 6)
    front = Front((network, network), [images], budget=10)
    front.advance("last")
    (both,) = [run_to(m, m.get_submodule("last"), 1, x) for _, m, x in front.batches()]
    (wanted,) = run_to(network, network.last, 1, images)
    assert torch.equal(both[0].x, wanted.x)
