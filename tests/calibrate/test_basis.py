"""Filters are tuned in the eigenvectors of what they see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import legocompress as lego
from legocompress.calibrate.basis import input_bases


def test_filters_are_tuned_where_their_inputs_are_uncorrelated() -> None:
    mix = torch.randn(6, 6)
    images = torch.einsum("ij,njhw->nihw", mix, torch.randn(32, 6, 8, 8))
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    lego.convert_(model, lego.plan(model, lego.LegoSpec(m=0.5, o=2, only=["0"])))
    (_, layer), *_ = lego.lego_modules(model)
    assert isinstance(model[1], nn.Conv2d)
    bases = input_bases(model, [layer, model[1]], images)
    fragments = F.unfold(images, 3, padding=1).mT.reshape(-1, 27).double()
    inputs = model[0](images).detach().movedim(1, 3).reshape(-1, 8).double()
    for filters, seen in ((layer.lego_filters, fragments), (model[1].weight, inputs)):
        basis = bases[filters].double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)).double())
        turned = basis.T @ (seen.T @ seen) @ basis
        assert (turned - turned.diag().diag()).norm() < 1e-3 * turned.norm()


def test_filters_that_saw_nothing_finite_are_tuned_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert not input_bases(model, [model[0]], torch.full((4, 3, 2, 2), torch.nan))
