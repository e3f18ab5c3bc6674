"""Post-training compression of pretrained CNNs with Lego filters."""

from importlib.metadata import version

from legocompress.calibrate import Calibration, synthesise
from legocompress.calibrate.calibration import calibrate_, gather
from legocompress.calibrate.layer_losses import sensitivity
from legocompress.checkpoint import load, open_model, save
from legocompress.compress.budget import allocate
from legocompress.compress.convert import convert_
from legocompress.compress.losses import Sensitivity
from legocompress.compress.plan_types import Plan
from legocompress.compress.planning import plan
from legocompress.data.evaluation import Evaluation
from legocompress.data.images import open_images
from legocompress.deploy import Deployment, deploy_, undeploy_
from legocompress.deploy.folded_evaluation import evaluate
from legocompress.errors import LegoError
from legocompress.export import (
    Exported,
    export_dense,
    export_onnx,
    export_program,
    export_timm,
)
from legocompress.export.hub_upload import push
from legocompress.finetune import Recipe, finetune_, load_recipe, open_training
from legocompress.lego.module import LegoModule, lego_modules
from legocompress.lego.surgery import (
    freeze_,
    freeze_indices_,
    synchronise_indices_,
    to_dense,
    to_dense_,
    train_indices_,
)
from legocompress.models.factory import create
from legocompress.models.head import reset_classifier_
from legocompress.quantize import Quantization, quantize_, unquantize_
from legocompress.report.benchmark_run import BenchmarkRun
from legocompress.report.html import ReportSources, write_html_report
from legocompress.report.judge import Judge, open_judge
from legocompress.report.measurement import measure
from legocompress.report.results import Report
from legocompress.report.versus_dense import benchmark
from legocompress.spec import LegoSpec, Rule
from legocompress.state.model_state import LegoState, lego_state
from legocompress.state.source import Source

__version__ = version("legocompress")

__all__ = [
    "BenchmarkRun",
    "Calibration",
    "Deployment",
    "Evaluation",
    "Exported",
    "Judge",
    "LegoError",
    "LegoModule",
    "LegoSpec",
    "LegoState",
    "Plan",
    "Quantization",
    "Recipe",
    "Report",
    "ReportSources",
    "Rule",
    "Sensitivity",
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
    "lego_state",
    "load",
    "load_recipe",
    "measure",
    "open_images",
    "open_judge",
    "open_model",
    "open_training",
    "plan",
    "push",
    "quantize_",
    "reset_classifier_",
    "save",
    "sensitivity",
    "synchronise_indices_",
    "synthesise",
    "to_dense",
    "to_dense_",
    "train_indices_",
    "undeploy_",
    "unquantize_",
    "write_html_report",
]
