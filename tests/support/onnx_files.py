"""A small classifier as an ONNX file, written node by node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS, CLASSES = 4, 3


def make_weights(n_classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Filters (4, 1, 3, 3) and a classifier (n_classes, 4)."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(CHANNELS, 1, 3, 3, generator=generator),
        torch.randn(n_classes, CHANNELS, generator=generator),
    )


def classify(images: Tensor) -> Tensor:
    """What the file computes, in PyTorch."""
    filters, classifier = make_weights()
    return F.conv2d(images, filters, padding=1).mean((2, 3)) @ classifier.T


def write_classifier(
    path: Path, batch: int | str = "N", size: int = 16, n_classes: int = CLASSES
) -> Path:
    """Write a conv, a mean over the map and a linear layer, for grey images."""
    import onnx
    from onnx import helper, numpy_helper

    filters, classifier = make_weights(n_classes)
    nodes = [
        helper.make_node("Conv", ["image", "filters"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["maps"], ["means"]),
        helper.make_node("Flatten", ["means"], ["features"]),
        helper.make_node("Gemm", ["features", "classifier"], ["output"], transB=1),
    ]
    values: dict[str, Any] = {"filters": filters, "classifier": classifier}
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [batch, 1, size, size])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [batch, n_classes])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path
