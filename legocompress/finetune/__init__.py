"""Fine-tuning with the straight-through estimator, from recipes."""

from legocompress.finetune.loop import finetune_
from legocompress.finetune.recipe import Recipe
from legocompress.finetune.recipe_loading import load_recipe
from legocompress.finetune.training_data import open_training

__all__ = ["Recipe", "finetune_", "load_recipe", "open_training"]
