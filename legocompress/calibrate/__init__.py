"""Repair a converted network with unlabelled images: each layer in turn, then all together."""

from legocompress.calibrate.calibration import calibrate_, gather
from legocompress.calibrate.synthetic import synthesise
from legocompress.state.calibration import Calibration

__all__ = ["Calibration", "calibrate_", "gather", "synthesise"]
