"""Post-training compression of pretrained CNNs with Lego filters."""

from importlib.metadata import version

from legocompress.allocate import allocate
from legocompress.benchmark import BenchmarkRun, benchmark
from legocompress.calibrate import Calibration, calibrate_, gather, synthesise
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
from legocompress.deploy import Deployment, deploy_, undeploy_
from legocompress.errors import LegoError
from legocompress.evaluate import Evaluation, evaluate
from legocompress.export import (
    Exported,
    export_dense,
    export_onnx,
    export_program,
    export_timm,
    to_dense,
)
from legocompress.finetune import Recipe, finetune_, load_recipe, open_training
from legocompress.head import reset_classifier_
from legocompress.measure import Report, measure
from legocompress.models import Source, create
from legocompress.plan import Plan, plan
from legocompress.push import push
from legocompress.spec import LegoSpec, Rule

__version__ = version("legocompress")

__all__ = [
    "BenchmarkRun",
    "Calibration",
    "Deployment",
    "Evaluation",
    "Exported",
    "LegoError",
    "LegoModule",
    "LegoSpec",
    "Plan",
    "Recipe",
    "Report",
    "Rule",
    "Source",
    "allocate",
    "benchmark",
    "calibrate_",
    "convert_",
    "create",
    "deploy_",
    "evaluate",
    "export_dense",
    "export_onnx",
    "export_program",
    "export_timm",
    "finetune_",
    "freeze_",
    "freeze_indices_",
    "gather",
    "lego_modules",
    "load",
    "load_recipe",
    "measure",
    "open_images",
    "open_model",
    "open_training",
    "plan",
    "push",
    "reset_classifier_",
    "save",
    "synthesise",
    "to_dense",
    "to_dense_",
    "train_indices_",
    "undeploy_",
]
