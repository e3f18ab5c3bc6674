"""Labels against the outputs of the network."""

from __future__ import annotations

from pathlib import Path

import pytest

import legocompress as lego
from legocompress.errors import DataError
from tests.support.finetuning import train
from tests.support.tiny import compressed


def test_labels_beyond_the_outputs_are_refused(images: Path) -> None:
    model = lego.reset_classifier_(compressed(), 2)
    with pytest.raises(DataError, match=r"label 2.*2 outputs.*--num-classes"):
        train(model, images, {})
