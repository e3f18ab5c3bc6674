"""Fine-tuning with the straight-through estimator, from recipes."""

from legocompress.finetune.loop import finetune_
from legocompress.finetune.optimize import add_anchor_, add_balance_, group_parameters
from legocompress.finetune.recipe import Recipe
from legocompress.finetune.recipe_loading import load_recipe
from legocompress.finetune.training_data import open_training

__all__ = [
    "Recipe",
    "add_anchor_",
    "add_balance_",
    "finetune_",
    "group_parameters",
    "load_recipe",
    "open_training",
]
