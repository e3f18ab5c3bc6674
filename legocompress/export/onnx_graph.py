"""Edit the graph of an ONNX model: attach stored Lego units, and remove what no runtime needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from legocompress.export.interface import make_unique
from legocompress.export.program import Form, StoredUnit, join_name


def attach_unit_(onnx: Any, proto: Any, name: str, unit: StoredUnit, form: Form) -> None:
    """Replace the graph inputs of a unit by its stored tensors and nodes that decode them.

    The units were inputs until now, so that the exporter could not fold them into larger constants.
    """
    graph = proto.graph
    nodes = []

    def add_constant(key: str, tensor: Tensor) -> str:
        graph.initializer.append(_make_tensor(onnx, key, tensor))
        return key

    def add_narrow(key: str, tensor: Tensor) -> str:
        return add_constant(f"{key}.{str(tensor.dtype).removeprefix('torch.')}", tensor)

    def add_cast(stored: str, key: str, dtype: torch.dtype) -> None:
        to = _onnx_type(onnx, dtype)
        nodes.append(onnx.helper.make_node("Cast", [stored], [key], to=to))

    def add_widened(key: str, tensor: Tensor, dtype: torch.dtype) -> None:
        if tensor.dtype == dtype:
            add_constant(key, tensor)
        else:
            add_cast(add_narrow(key, tensor), key, dtype)

    filters, scales = join_name(name, "lego_filters"), join_name(name, "lego_scales")
    add_widened(join_name(name, "index"), unit.index, torch.int64)
    if unit.coefficients is not None:
        add_widened(join_name(name, "coefficients"), unit.coefficients, torch.float32)
    if not unit.holds_bank:
        pass  # the layer reads the bank of another unit
    elif unit.scales is None:
        add_widened(filters, unit.filters, torch.float32)
    elif form == "lego":
        add_widened(scales, unit.scales, torch.float32)
        inputs = [add_narrow(filters, unit.filters), scales]
        nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [filters], axis=0))
    else:  # ONNX Runtime folds a product, but keeps DequantizeLinear for its int8 kernels
        column = unit.scales.reshape(-1, *[1] * (unit.filters.dim() - 1))
        add_widened(scales, column, torch.float32)
        add_cast(add_narrow(filters, unit.filters), f"{filters}.float32", torch.float32)
        inputs = [f"{filters}.float32", scales]
        nodes.append(onnx.helper.make_node("Mul", inputs, [filters]))
    for node in reversed(nodes):
        graph.node.insert(0, node)
    _remove_inputs_(graph, {join_name(name, leaf) for leaf in unit()})


def attach_tensors_(onnx: Any, proto: Any, tensors: dict[str, Tensor]) -> None:
    """Replace the graph inputs of these names by stored tensors."""
    graph = proto.graph
    read = {name for node in graph.node for name in node.input}
    graph.initializer.extend(
        _make_tensor(onnx, name, tensor) for name, tensor in tensors.items() if name in read
    )
    _remove_inputs_(graph, set(tensors))


def _remove_inputs_(graph: Any, names: set[str]) -> None:
    inputs = [value for value in graph.input if value.name not in names]
    del graph.input[:]
    graph.input.extend(inputs)


def _make_tensor(onnx: Any, name: str, tensor: Tensor) -> Any:
    kind = _onnx_type(onnx, tensor.dtype)
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return onnx.helper.make_tensor(name, kind, list(tensor.shape), raw, raw=True)


def _onnx_type(onnx: Any, dtype: torch.dtype) -> int:
    names = {"uint8": "UINT8", "int8": "INT8", "int16": "INT16", "int32": "INT32",
             "int64": "INT64", "float32": "FLOAT", "float16": "FLOAT16",
             "bfloat16": "BFLOAT16"}  # fmt: skip
    return int(getattr(onnx.TensorProto, names[str(dtype).removeprefix("torch.")]))


def strip_(proto: Any, reserved: set[str]) -> None:
    """Remove stack traces, node names and inner shapes, which no runtime needs.

    Inner values get short names, none of them reserved, unless a sub-graph might use them.
    """
    graph = proto.graph
    proto.producer_name, proto.producer_version = "legocompress", ""
    del proto.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    proto.doc_string = graph.doc_string = ""
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == batch:
                dim.dim_param = "batch"
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return
    interface = {value.name for value in (*graph.input, *graph.output)} | {""}
    short = _short_names({*interface, *reserved, *(tensor.name for tensor in graph.initializer)})
    renamed: dict[str, str] = {}
    for node in graph.node:
        node.name = ""
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                names[position] = renamed.get(name, name)
        for position, name in enumerate(node.output):
            if name not in interface:
                renamed[name] = node.output[position] = next(short)


def rename_interface_(graph: Any, interface: list[str]) -> None:
    """Name the graph's inputs, then its outputs; a name that is taken gets a number."""
    values = [*graph.input, *graph.output]
    graphs = list(_list_graphs(graph))
    taken = {name for part in graphs for node in part.node for name in node.output}
    taken |= {tensor.name for part in graphs for tensor in part.initializer}
    taken -= {value.name for value in values}
    names = dict(zip([v.name for v in values], make_unique(interface, taken), strict=True))
    for value in values:
        value.name = names[value.name]
    for node in (node for part in graphs for node in part.node):
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name) for name in ends]


def _list_graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _list_graphs(attribute.g)


def _short_names(taken: set[str]) -> Iterator[str]:
    number = 0
    while True:
        if (name := f"{number:x}") not in taken:
            yield name
        number += 1
