"""Images made from the statistics of norms."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import legocompress as lego
from legocompress.calibrate.synthetic import _mismatch
from legocompress.errors import DataError
from tests.support.calibrating import NAME, Odd


@pytest.mark.slow
def test_noise_is_shaped_to_the_norms() -> None:
    original = lego.create(NAME)
    before = lego.synthesise(original, 16, steps=0)
    images = lego.synthesise(original, 16, steps=15)
    norms: list[_BatchNorm] = [m for m in original.modules() if isinstance(m, _BatchNorm)]
    with torch.no_grad():
        assert _mismatch(original, norms, images) < 0.5 * _mismatch(original, norms, before)
    assert images.shape == (16, 1, 56, 56)
    assert torch.equal(images, lego.synthesise(original, 16, steps=15))
    with pytest.raises(DataError, match="no BatchNorm"):
        lego.synthesise(Odd(), 16)
