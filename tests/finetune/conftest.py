"""Images and a network that the tests of fine-tuning share."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.support.tiny import dense, write_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An .npz file of labelled images."""
    return write_images(tmp_path / "images.npz")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The tiny network, dense."""
    return dense()
