"""The transform of training images."""

from __future__ import annotations

import pytest
from PIL import Image
from torch import nn

from legocompress.finetune.augmentation import create_training_transform
from tests.support.tiny import recipe


@pytest.mark.parametrize("crop", ["resized", "shift", "none"])
def test_training_images_have_the_input_size_of_the_network(crop: str, model: nn.Module) -> None:
    transform = create_training_transform(model, recipe(augment={"crop": crop}).augment)
    assert transform(Image.new("L", (28, 20), 100)).shape == (1, 16, 16)
