"""Export a network as an ONNX file of plain operators, with Lego units in storage dtypes."""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from legocompress.errors import ExportError, UsageError, first_line
from legocompress.export.interface import (
    TensorOutputs,
    has_plain_containers,
    make_example_inputs,
    measure_differences,
    name_outputs,
)
from legocompress.export.onnx_graph import attach_tensors_, attach_unit_, rename_interface_, strip_
from legocompress.export.program import (
    Exported,
    Form,
    build_reference,
    check_agrees,
    join_name,
    make_hollow_copy,
    trace_program,
)
from legocompress.export.qdq_network import build_rounded_network
from legocompress.export.qdq_operators import make_translations
from legocompress.files import check_free, write_atomically
from legocompress.models.checks import check_network, refuse_quantized
from legocompress.models.inputs import name_inputs
from legocompress.models.outputs import flatten_leaves, flatten_tensors
from legocompress.quantize import active_quantization

OPSET = 18
MAX_BYTES = 2**31 - 2**20  # limit of one protobuf file
# Largest relative difference between an export and the integers of a quantised network.
ROUNDED_TOLERANCE = 0.5
FORMS: tuple[Form, ...] = ("lego", "assemble-at-load", "dense")


def export_onnx(
    model: nn.Module,
    path: str | Path,
    form: Form = "lego",
    force: bool = False,
    example_input: Any = None,
) -> Exported:
    """Write a network as an ONNX file with a dynamic batch, checked against ONNX Runtime.

    The file has one input `image` (N, c, H, W) float32 and plain operators only; several inputs
    have the names that the network's `forward` gives them. Its outputs are the tensors of the
    network's output: one is `output`, those of a tuple `output_0` and so on, those of a dict or
    dataclass have the names of their keys, joined by dots where they are nested. The forms:

    - 'lego' stores what the checkpoint stores (filters and coefficients in their storage dtypes,
      indices in the narrowest integer) and computes split-transform-merge.
    - 'assemble-at-load' stores the same, and computes the dense weights from these constants. ONNX
      Runtime and OpenVINO do this once, when they load the file.
    - 'dense' stores the dense weights.

    A quantised network has QuantizeLinear to uint8 and DequantizeLinear after the maps that are
    uint8, and int8 weights. The forms 'assemble-at-load' and 'dense' have one scale per output
    channel, in the first by QuantizeLinear on the assembled weights. Layers that stay in fp32 have
    dense weights. Outputs may differ by steps of the maps.

    Args:
        model: the converted network; the file computes in float32, or as described above.
        path: the file to write.
        form: see above.
        force: replace an existing file.
        example_input: (N, c, H, W), for the size of images; by default that of the configuration.
            For networks of several inputs a tuple of such tensors, or a dict of them by name.

    Raises:
        UsageError: the form is unknown, the model is wrapped, compiled or scripted or holds a lazy
            layer, or the packages for ONNX are not installed.
        QuantizationError: the network was quantised and has changed since.
        CheckpointError: the record of its quantisation does not fit the network.
        ExportError: the network cannot be traced or expressed in ONNX, an input is not a float
            tensor, it is too large for one file, or ONNX Runtime computes other outputs than it.
        OutputExistsError: the file exists and `force` is not given.
        OutputError: it cannot be written.
    """
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}; allowed are {', '.join(FORMS)}")
    check_network(model)
    is_quantized = active_quantization(model) is not None
    if not is_quantized:  # what was quantised once may be so no more
        refuse_quantized(model, "export_onnx")
    onnx, runtime = _need("onnx"), _need("onnxruntime")
    _need("onnxscript")
    target = Path(path)
    check_free(target, force)
    inputs = make_example_inputs(model, example_input, 3)
    if is_quantized:
        expected, proto = _build_rounded(onnx, model, form, inputs)
    else:
        expected, proto = _build_float(onnx, model, form, inputs)
    names = [*name_inputs(model, len(inputs)), *name_outputs(expected)]
    strip_(proto, set(names))
    rename_interface_(proto.graph, names)
    data = _serialize(onnx, proto)
    with write_atomically(target, force) as temporary:
        temporary.write_bytes(data)
        outputs = _run(runtime, temporary, inputs)
        absolute, relative = measure_differences(flatten_tensors(expected), outputs)
        if is_quantized:
            _check_rounded(relative)
        else:
            check_agrees("ONNX Runtime", relative)
    return Exported(target, form, len(data), absolute, relative)


def _build_float(
    onnx: Any, model: nn.Module, form: Form, inputs: tuple[Tensor, ...]
) -> tuple[Any, Any]:
    """The outputs of a float network, and its ONNX model with the interface unnamed."""
    plain = build_reference(model, form)
    with torch.no_grad():
        expected = plain(*inputs)
    network, units = (plain, {}) if form == "dense" else make_hollow_copy(model, form)
    tensors = {
        join_name(name, leaf): tensor
        for name, unit in units.items()
        for leaf, tensor in unit().items()
    }
    arguments = (*(x[:2] for x in inputs), *(() if form == "dense" else (tensors,)))
    program = trace_program(_return_tensors(network, expected), *arguments)
    proto = _convert(program, [*_number_inputs(inputs), *tensors], expected)
    for name, unit in reversed(units.items()):
        attach_unit_(onnx, proto, name, unit, form)
    return expected, proto


def _build_rounded(
    onnx: Any, model: nn.Module, form: Form, inputs: tuple[Tensor, ...]
) -> tuple[Any, Any]:
    """The outputs of a quantised network, and its ONNX model with the interface unnamed."""
    rounded = build_rounded_network(model, form)
    with torch.no_grad():
        expected = rounded.emulation(*inputs)
    network = _return_tensors(rounded.hollow, expected)
    program = trace_program(network, *(x[:2] for x in inputs), rounded.tensors)
    names = [*_number_inputs(inputs), *rounded.names]
    proto = _convert(program, names, expected, make_translations())
    attach_tensors_(onnx, proto, dict(zip(rounded.names, rounded.tensors.values(), strict=True)))
    return expected, proto


def _number_inputs(inputs: tuple[Tensor, ...]) -> list[str]:
    return ["image"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]


def _check_rounded(relative: float) -> None:
    """Raise ExportError if outputs differ by more than other rounding of maps explains."""
    if not relative <= ROUNDED_TOLERANCE:
        raise ExportError(
            f"ONNX Runtime differs from the quantised network by {relative:.1e} of its largest "
            f"output, more than {ROUNDED_TOLERANCE:.0e}; nothing was written. Try another --form; "
            "unquantize_ gives the fp32 network with rounded weights, which can be exported"
        )


def _return_tensors(network: nn.Module, output: Any) -> nn.Module:
    """Return the network, in a module that returns only the tensors if its output has more.

    Raises:
        ExportError: the output has no tensor.
    """
    are_tensors = [isinstance(leaf, Tensor) for _, leaf in flatten_leaves(output)]
    if not any(are_tensors):
        raise ExportError("the network returns no tensor, so an ONNX file would have no output")
    is_plain = all(are_tensors) and has_plain_containers(output)
    return network if is_plain else TensorOutputs(network)


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UsageError(
            f"ONNX needs the package {package}: pip install 'legocompress[onnx]'"
        ) from None


def _convert(
    program: ExportedProgram, names: list[str], expected: Any, translations: Any = None
) -> Any:
    """Turn the exported program into an ONNX model, optimised by the exporter of torch."""
    n_outputs = len(flatten_tensors(expected))
    outputs = ["output"] if n_outputs == 1 else [f"output_{i}" for i in range(n_outputs)]
    loud = logging.getLogger("torch.onnx")
    level = loud.level
    loud.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = torch.onnx.export(
                program,
                dynamo=True,
                input_names=names,
                output_names=outputs,
                opset_version=OPSET,
                custom_translation_table=translations,
                verbose=False,
            )
            assert written is not None
            return written.model_proto
    # The exporter raises any kind of exception, some with pages of text.
    except Exception as error:
        raise ExportError(
            f"torch.onnx cannot express this network: {first_line(error)}. "
            "The dense weights can be exported with --to dense"
        ) from error
    finally:
        loud.setLevel(level)


def _serialize(onnx: Any, proto: Any) -> bytes:
    size = sum(math.prod(t.dims) * 4 for t in proto.graph.initializer if not t.raw_data)
    size += sum(len(t.raw_data) for t in proto.graph.initializer)
    if size > MAX_BYTES:
        raise ExportError(
            f"the network takes {size:,} bytes in this form, and one ONNX file holds 2 GiB; "
            "choose another --form, or store filters as --dtype fp16"
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"ONNX's checker refuses the graph: {first_line(error)}") from error
    return bytes(proto.SerializeToString())


def _run(runtime: Any, path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Run the file in ONNX Runtime on the CPU, and return its outputs."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        outputs = session.run(None, feeds)
    # Errors of the runtime have different base classes in different versions.
    except Exception as error:
        raise ExportError(f"ONNX Runtime refuses the file: {first_line(error)}") from error
    return [torch.from_numpy(output) for output in outputs]
