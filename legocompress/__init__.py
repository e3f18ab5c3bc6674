"""Post-training compression of pretrained CNNs with Lego filters."""

from importlib.metadata import version

from legocompress.checkpoint import load, open_model, save
from legocompress.conv import (
    LegoModule,
    freeze_,
    freeze_indices_,
    lego_modules,
    to_dense_,
    train_indices_,
)
from legocompress.convert import convert_
from legocompress.data import open_images
from legocompress.errors import LegoError
from legocompress.evaluate import Evaluation, evaluate
from legocompress.export import export_dense, to_dense
from legocompress.measure import Report, measure
from legocompress.models import Source, create
from legocompress.plan import Plan, plan
from legocompress.spec import LegoSpec, Rule

__version__ = version("legocompress")

__all__ = [
    "Evaluation",
    "LegoError",
    "LegoModule",
    "LegoSpec",
    "Plan",
    "Report",
    "Rule",
    "Source",
    "convert_",
    "create",
    "evaluate",
    "export_dense",
    "freeze_",
    "freeze_indices_",
    "lego_modules",
    "load",
    "measure",
    "open_images",
    "open_model",
    "plan",
    "save",
    "to_dense",
    "to_dense_",
    "train_indices_",
]
