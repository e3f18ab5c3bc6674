"""quantize_: a network whose maps and weights are 8-bit integers, without labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from legocompress.deploy import undeploy_
from legocompress.deploy.forward import outputs_agree
from legocompress.deploy.partition import describe_error, partition_model
from legocompress.errors import DataError, QuantizationError, UsageError
from legocompress.lego.module import LegoModule, ModelT
from legocompress.models.checks import check_network
from legocompress.models.probe import evaluating
from legocompress.quantize.assignment import assign_roles
from legocompress.quantize.forward import (
    install_parts_,
    quantized_parts,
    set_exact_,
    uninstall_parts_,
    weight_owner,
)
from legocompress.quantize.integer_graph import IntegerGraph
from legocompress.quantize.layers import ConvLayer
from legocompress.quantize.observation import observe
from legocompress.quantize.rounding import round_layers_, round_norms_
from legocompress.quantize.search import (
    Excluded,
    ObservedPart,
    choose_method,
    exclude_layers,
    integer_forwards,
    make_judge,
)
from legocompress.state.model_state import lego_state
from legocompress.state.quantization import PRECISIONS, Quantization

FEWEST = 10  # images
TRIED = 16  # images that candidates are compared on


def quantize_(
    model: ModelT,
    images: Tensor,
    precision: str = "int8",
    *,
    batch_size: int = 16,
    on_step: Callable[[str, int, int], None] | None = None,
) -> ModelT:
    """Quantise a network to 8 bits by unlabelled images, in place, and return it.

    The filters of Lego layers are rounded to int8 with one scale per filter, those of other convs
    and of linear layers with one scale per output channel. The images give each map a range, in
    which it becomes uint8. The way of choosing ranges is the one with the least error of the
    outputs; layers that lose most of what is lost then stay in fp32.

    The network's forward is replaced by an emulation that computes the integers exactly, under
    `torch.no_grad()` in eval mode on float32 images on the CPU. In train mode, with gradients, or
    after a change of the weights, the network computes in fp32 by its own code. What has no integer
    form stays in fp32, too. `lego_state(model).quantization` tells the ranges, and what stays.

    Args:
        model: a network in float32 on the CPU, converted or dense; it is put into eval mode.
        images: (N, c, H, W), preprocessed, ten or more; `gather` collects them from batches.
        precision: 'int8'.
        batch_size: images that run at once.
        on_step: called with what is done, how much of it is done, and of how much.

    Raises:
        UsageError: the precision is unknown, or the model is wrapped, compiled, scripted or not in
            float32 on the CPU.
        QuantizationError: the network is quantised already, or no part of it can be quantised.
        DataError: there are too few images, all pixels are equal, or a map is not finite.
    """
    _check(model, images, precision)
    undeploy_(model)
    model.eval()
    report = on_step or (lambda what, done, total: None)
    batches = torch.split(images, batch_size)
    with evaluating(model):
        parts, notes = _find_parts(model, images[:2])
        graphs = [graph for graph, _ in parts]
        seen = observe(model, graphs, batches, report)
        observed = [
            ObservedPart(graph, values, shapes)
            for (graph, shapes), values in zip(parts, seen, strict=True)
        ]
        step = max(1, len(images) // TRIED)
        judge = make_judge(model, torch.split(images[::step][:TRIED], batch_size))
        candidate = choose_method(judge, observed, report)
        candidate = exclude_layers(judge, observed, candidate, report)
        plans = candidate.plans
        similarity = judge.measure(integer_forwards(observed, plans))
    layers, dense_layers = _quantized_layers(model, observed, candidate.excluded)
    lego_state(model).quantization = Quantization(
        precision="int8",
        method=candidate.method,
        images=len(images),
        sha256=hash_tensor(images),
        parts={part.graph.name: plan for part, plan in zip(observed, plans, strict=True)},
        dense_layers=dense_layers,
        notes=tuple(notes),
        error=similarity.error,
        agreement=similarity.agreement,
    )
    round_layers_(layers)
    round_norms_(_folded_norms(observed))
    return requantize_(model)


def requantize_(model: ModelT) -> ModelT:
    """Let a network compute in the integers of its record, `lego_state(model).quantization`.

    Raises:
        CheckpointError: the record names parts that the network does not have.
    """
    record = lego_state(model).quantization
    if record is not None:
        uninstall_parts_(model)
        install_parts_(model, record.parts)
    return model


def active_quantization(model: nn.Module) -> Quantization | None:
    """The record of a network that computes by it; None after `to_dense_`, for example."""
    record = lego_state(model).quantization
    if record is None or not all(part in quantized_parts(model) for part in record.parts):
        return None
    return record


def unquantize_(model: ModelT) -> ModelT:
    """Undo `quantize_`: the network computes in fp32 again; its weights stay rounded to int8."""
    undeploy_(model)
    uninstall_parts_(model)
    lego_state(model).quantization = None
    return model


def hash_tensor(tensor: Tensor) -> str:
    """The SHA-256 of the values of a tensor."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _check(model: Any, images: Any, precision: str) -> None:
    """Raise, before anything is changed, what `quantize_` lists."""
    check_network(model)
    if precision not in PRECISIONS:
        raise UsageError(f"precision={precision!r}: there is {', '.join(PRECISIONS)}")
    if lego_state(model).quantization is not None:
        raise QuantizationError(
            "the network is quantised already; unquantize_ makes it compute in fp32 again, but its "
            "weights stay rounded, so load or convert it anew"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise UsageError(
                f"quantize_ takes a network in float32 on the CPU; parameter {name!r} is "
                f"{parameter.dtype} on {parameter.device}: call model.float().cpu() first"
            )
    if not isinstance(images, Tensor) or images.dtype != torch.float32:
        given = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"images to quantise with are one float32 tensor (N, c, H, W), not {given}; `gather` "
            "makes it of batches"
        )
    if len(images) < FEWEST:
        raise DataError(f"{len(images)} images are too few to quantise with; give {FEWEST} or more")
    if not bool(images.isfinite().all()):
        raise DataError("the images have values that are not finite")
    if bool((images == images.flatten()[0]).all()):
        raise DataError("all pixels of all images are equal, so no map has a range; give photos")


def _find_parts(
    model: nn.Module, example: Tensor
) -> tuple[list[tuple[IntegerGraph, tuple[tuple[int, ...], ...]]], list[str]]:
    """The traced parts of a network with the shapes of their inputs, and notes on the rest."""
    partition = partition_model(model, example)
    parts, notes = [], list(partition.notes)
    for part in partition.parts:
        inputs = part.inputs()
        name = part.graph.name or "(root)"
        try:
            fault = None if all(x.dtype == torch.float32 for x in inputs) else "it is not float32"
            graph = IntegerGraph(part.graph)
            assign_roles(graph)
            fault = fault or _compare(graph, inputs)
        # The network's own code may refuse with any exception.
        except Exception as error:
            fault = describe_error(error)
        if fault is None:
            parts.append((graph, tuple((1, *x.shape[1:]) for x in inputs)))
        else:
            notes.append(f"{name} computes in fp32: {fault}"[:1000])
    if not parts:
        reason = notes[0] if notes else "it has no convs that compute as nn.Conv2d does"
        raise QuantizationError(f"no part of this network can be quantised: {reason}")
    return parts, notes


def _compare(graph: IntegerGraph, inputs: tuple[Tensor, ...]) -> str | None:
    """Say how a graph differs from the module's own code in fp32, if it does."""
    set_exact_(graph, {layer.name for _, layer in graph.layers()})
    expected = graph.root.forward(*inputs)
    actual = graph.graph_module(*inputs)
    set_exact_(graph, ())
    return None if outputs_agree(expected, actual) else "traced, it computes something else"


def _folded_norms(parts: Sequence[ObservedPart]) -> list[nn.Module]:
    """The norms that are folded into integer convs."""
    folded = [
        layer.folded
        for part in parts
        for _, layer in part.graph.layers()
        if isinstance(layer, ConvLayer)
    ]
    return [conv.norm for conv in folded if conv is not None and conv.norm is not None]


def _quantized_layers(
    model: nn.Module, parts: Sequence[ObservedPart], excluded: Excluded
) -> tuple[list[nn.Module], tuple[str, ...]]:
    """The layers whose weights are rounded, and the names of those that are no Lego modules."""
    layers: dict[nn.Module, None] = {}
    for part in parts:
        for _, layer in part.graph.layers():
            owner = weight_owner(layer)
            if owner is not None and layer.name not in excluded:
                layers[owner] = None
    names = {module: name for name, module in model.named_modules()}
    dense = tuple(names[layer] for layer in layers if not isinstance(layer, LegoModule))
    return list(layers), dense
