"""What leaves the toolkit: dense weights, timm folders, ONNX files, torch.export programs."""

from legocompress.export.dense import export_dense, export_timm
from legocompress.export.onnx_file import export_onnx
from legocompress.export.program import Exported, export_program

__all__ = [
    "Exported",
    "export_dense",
    "export_onnx",
    "export_program",
    "export_timm",
]
