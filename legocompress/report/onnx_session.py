"""An ONNX file as something to compare: it runs on images, and has a size and a cost."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from legocompress.errors import DataError, UsageError, WeightsError, first_line

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# Position of the weight among the inputs of each operator that multiplies and accumulates.
WEIGHT_INPUTS = {
    "Conv": 1, "ConvInteger": 1, "QLinearConv": 3,
    "Gemm": 1, "MatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3,
}  # fmt: skip


class OnnxNetwork:
    """A classifier in an ONNX file, run by ONNX Runtime on the CPU.

    Args:
        path: the file. Its first input are images (N, c, H, W) in float32 or float16, and its first
            output (N, classes) are the logits.
        threads: number of CPU threads.

    Attributes:
        image_size: (c, H, W), None where the file leaves it open.

    Raises:
        UsageError: ONNX Runtime is not installed, or the file takes other inputs.
        WeightsError: the file does not exist or cannot be read.
    """

    def __init__(self, path: Path, threads: int):
        self.path = path
        runtime = _import("onnxruntime")
        if not path.is_file():
            raise WeightsError(f"there is no ONNX file {str(path)!r}")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        # Threads that keep spinning after a run would slow down the network that runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        # ONNX Runtime has an exception class for each kind of damage.
        except Exception as error:
            raise WeightsError(
                f"{str(path)!r} cannot be read as an ONNX file: {first_line(error)}"
            ) from error
        self.input = self._check_input()
        sizes = [size if isinstance(size, int) else None for size in self.input.shape]
        self.batch, self.image_size = sizes[0], (sizes[1], sizes[2], sizes[3])

    def _check_input(self) -> Any:
        inputs = self.session.get_inputs()
        found = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in DTYPES:
            raise UsageError(
                f"{str(self.path)!r} takes {found or 'no input'}; a file to compare takes one "
                "input of images (N, c, H, W) in float32 or float16"
            )
        return inputs[0]

    def __call__(self, images: Tensor) -> Tensor:
        """Run on images (N, c, H, W) and return the first output in float32.

        A file of a fixed batch size runs on as many parts as it takes, the last one filled up.
        """
        if self.batch is None or self.batch == len(images):
            return self._run(images)
        n_fill = -len(images) % self.batch
        filled = torch.cat([images, images.new_zeros(n_fill, *images.shape[1:])])
        outputs = [self._run(part) for part in torch.split(filled, self.batch)]
        return torch.cat(outputs)[: len(images)]

    def _run(self, images: Tensor) -> Tensor:
        values = images.numpy().astype(DTYPES[self.input.type], copy=False)
        try:
            (output, *_) = self.session.run(None, {self.input.name: values})
        except Exception as error:
            raise DataError(
                f"{str(self.path)!r} refuses images of shape {tuple(images.shape)}: "
                f"{first_line(error)}"
            ) from error
        return torch.from_numpy(np.asarray(output)).float()

    def count_bytes(self) -> int:
        """The size of the file, and of the files beside it that hold its weights."""
        graph = _import("onnx").load(str(self.path), load_external_data=False).graph
        beside = {
            entry.value
            for tensor in graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        paths = [self.path, *(self.path.parent / name for name in sorted(beside))]
        return sum(path.stat().st_size for path in paths)

    def count_macs(self, image_size: tuple[int, ...]) -> int | None:
        """The multiply-accumulates of one image (c, H, W), in convs and matrix products.

        None where the shapes in the graph cannot be inferred.
        """
        onnx = _import("onnx")
        model = onnx.load(str(self.path))
        sizes = (self.batch or 1, *image_size)
        for dim, size in zip(_dims(model.graph.input[0]), sizes, strict=True):
            dim.dim_value = size
        try:
            graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        except onnx.shape_inference.InferenceError:
            return None
        shapes = {value.name: [d.dim_value for d in _dims(value)] for value in _list_values(graph)}
        shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        total = 0
        for node in graph.node:
            if node.op_type not in WEIGHT_INPUTS:
                continue
            weight = shapes.get(node.input[WEIGHT_INPUTS[node.op_type]])
            output = shapes.get(node.output[0])
            if not weight or not output or 0 in (*weight, *output):
                return None
            total += math.prod(output) * _count_inputs(onnx, node, weight)
        return total // (self.batch or 1)


def _count_inputs(onnx: Any, node: Any, weight: list[int]) -> int:
    """How many products each output of a node adds up."""
    if "Conv" in node.op_type:
        return math.prod(weight[1:])
    transposed = any(
        attribute.name == "transB" and onnx.helper.get_attribute_value(attribute)
        for attribute in node.attribute
    )
    return weight[-1] if transposed or len(weight) == 1 else weight[-2]


def _list_values(graph: Any) -> Iterator[Any]:
    yield from (*graph.input, *graph.value_info, *graph.output)


def _dims(value: Any) -> Any:
    return value.type.tensor_type.shape.dim


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UsageError(
            f"ONNX files need the package {package}: pip install 'legocompress[onnx]'"
        ) from None
