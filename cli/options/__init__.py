"""Options that several commands share; each file declares a group and reads its values."""

from .calibration import (
    CalibrationRequest,
    calibration_options,
    read_calibration,
    refuse_calibration_options,
)
from .common import (
    device_option,
    force_option,
    json_option,
    read_device,
    workers_option,
)
from .model import model_options, read_create_args
from .original import open_original, original_options
from .several_values import SeveralValues
from .spec import read_budget, read_spec, spec_options

__all__ = [
    "CalibrationRequest",
    "SeveralValues",
    "calibration_options",
    "device_option",
    "force_option",
    "json_option",
    "model_options",
    "open_original",
    "original_options",
    "read_budget",
    "read_calibration",
    "read_create_args",
    "read_device",
    "read_spec",
    "refuse_calibration_options",
    "spec_options",
    "workers_option",
]
