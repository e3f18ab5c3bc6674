"""The dense network in ONNX Runtime, in fp32 and quantised to int8."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from legocompress.errors import first_line
from legocompress.report.rivals.form import LeftOut, Runner, Subject, import_library
from legocompress.report.rivals.instructions import needs_reduced_range

INPUT = "x"


def build_fp32(subject: Subject) -> Runner:
    """Export to ONNX and open it in ONNX Runtime."""
    import_library("onnxruntime")
    import_library("onnxscript")
    with tempfile.TemporaryDirectory() as folder:
        path = _export(subject, Path(folder))
        return _open(path.read_bytes())


def build_int8(subject: Subject) -> Runner:
    """Quantise statically, as ONNX Runtime advises for CNNs.

    That is pre-processing, QDQ nodes, u8 activations, s8 weights with one scale per channel, the
    MinMax method, and 7-bit weights only where the CPU has no VNNI (onnxruntime.ai, "Quantize ONNX
    models").
    """
    import_library("onnxruntime")
    import_library("onnxscript")
    key = ("onnxruntime-int8", subject.x.shape[0])
    if key not in subject.cache:
        subject.cache[key] = _quantise(subject)
    return _open(subject.cache[key])


def _quantise(subject: Subject) -> bytes:
    quantization = import_library("onnxruntime.quantization")
    inference = import_library("onnxruntime.quantization.shape_inference")
    batches = subject.calibration_batches(subject.x.shape[0])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def get_next(self) -> Any:
            images = next(batches, None)
            return None if images is None else {INPUT: images.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        path = _export(subject, Path(folder))
        prepared, quantised = (str(path.with_name(f"{n}.onnx")) for n in ("prepared", "int8"))
        inference.quant_pre_process(str(path), prepared)
        quantization.quantize_static(
            prepared,
            quantised,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=needs_reduced_range(),
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return Path(quantised).read_bytes()


def _export(subject: Subject, folder: Path) -> Path:
    path = folder / "dense.onnx"
    try:
        torch.onnx.export(
            subject.dense,
            (subject.x,),
            str(path),
            dynamo=True,
            external_data=False,
            input_names=[INPUT],
            verbose=False,
        )
    # The exporter fails in many ways.
    except Exception as error:
        raise LeftOut(f"the network does not convert to ONNX: {first_line(error)}") from error
    return path


def _open(model: bytes) -> Runner:
    runtime = import_library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    # Threads that keep spinning after a run would slow down the form that runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def prepare(x: Tensor) -> dict[str, Any]:
        return {name: x.numpy()}

    return Runner(lambda feed: session.run(None, feed)[0], prepare, lambda: len(model))
