"""The dense network in OpenVINO: in fp32, in bf16, and quantised to int8 by NNCF."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from legocompress.errors import first_line
from legocompress.report.rivals.form import LeftOut, Runner, Subject, import_library
from legocompress.report.rivals.instructions import check_bf16


def build_fp32(subject: Subject) -> Runner:
    """Convert and compute in fp32; on CPUs with bf16, OpenVINO would compute in bf16 by default."""
    return _open(_convert(subject, subject.x), {"INFERENCE_PRECISION_HINT": "f32"}, False)


def build_bf16(subject: Subject) -> Runner:
    """Convert and compute in bf16, which is OpenVINO's default on CPUs that have it."""
    openvino = import_library("openvino")
    check_bf16()
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise LeftOut("not available on this CPU: OpenVINO finds no bf16")
    return _open(_convert(subject, subject.x), {"INFERENCE_PRECISION_HINT": "bf16"}, True)


def build_int8(subject: Subject) -> Runner:
    """Quantise with `nncf.quantize` as it stands, and leave the rest to OpenVINO's defaults.

    NNCF advises batches of one image, so the network is reshaped afterwards.
    """
    import_library("openvino")
    import_library("nncf")
    key = "openvino-int8"
    if key not in subject.cache:
        subject.cache[key] = _quantise(subject)
    model = subject.cache[key].clone()
    model.reshape(list(subject.x.shape))
    return _open(model, {}, True)


def _quantise(subject: Subject) -> Any:
    """Quantise at batch 1, without the messages and progress bars of NNCF."""
    with contextlib.redirect_stdout(io.StringIO()):
        nncf = import_library("nncf")
        nncf.set_log_level(logging.ERROR)
        model = _convert(subject, subject.x[:1])
        images = [image.numpy() for image in subject.calibration_batches(1)]
        # By default NNCF takes 300 images: at most those that there are.
        return nncf.quantize(model, nncf.Dataset(images), subset_size=min(300, len(images)))


def _convert(subject: Subject, x: Tensor) -> Any:
    openvino = import_library("openvino")
    try:
        return openvino.convert_model(subject.dense, example_input=x, input=list(x.shape))
    # The converter fails in many ways.
    except Exception as error:
        raise LeftOut(f"OpenVINO does not convert the network: {first_line(error)}") from error


def _open(model: Any, settings: dict[str, Any], compress_to_fp16: bool) -> Runner:
    """Compile a model; `compress_to_fp16` is how it is shipped, as `save_model` does by default."""
    openvino = import_library("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        **settings,
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(x: Any) -> Any:
        request.set_input_tensor(x)
        request.infer()
        return request.get_output_tensor().data

    def count_bytes() -> int:
        with tempfile.TemporaryDirectory() as folder:
            openvino.save_model(model, f"{folder}/dense.xml", compress_to_fp16=compress_to_fp16)
            return sum(path.stat().st_size for path in Path(folder).iterdir())

    return Runner(run, lambda x: openvino.Tensor(x.numpy(), shared_memory=True), count_bytes)
