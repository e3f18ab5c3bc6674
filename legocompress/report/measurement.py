"""Measure a network: parameters, bits, bytes, MACs and latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from legocompress.lego.costs import (
    SCALE_BITS,
    STORAGE_BITS,
    count_used_filters,
    dense_params,
    lego_bits,
    lego_macs,
    lego_params,
)
from legocompress.lego.module import LegoModule, lego_modules
from legocompress.models.checks import check_network
from legocompress.models.probe import WEIGHT_LAYERS, Calls, probe_call
from legocompress.report.latency import time_routes
from legocompress.report.macs import count_macs_with_fvcore
from legocompress.report.results import Latency, LayerReport, Report
from legocompress.state.conversion import ConversionRecord
from legocompress.state.model_state import lego_state

LAYERS: tuple[type[nn.Module], ...] = (LegoModule, *WEIGHT_LAYERS)


def measure(
    model: nn.Module,
    baseline: nn.Module | None = None,
    example_input: Any = None,
    path: str | Path | None = None,
    repeats: int = 0,
) -> Report:
    """Measure a network, converted or dense: parameters, bits, bytes, MACs and latency.

    Args:
        model: the network; it is in eval mode while it is measured.
        baseline: the original network, to compare the latency with.
        example_input: (N, c, H, W), a tuple of arguments or a dict of keyword arguments; the
            default is that of `plan`.
        path: the network's folder on disk, for the stored bytes.
        repeats: timed runs of each form; 0 times nothing.

    Raises:
        UsageError: the model is wrapped, compiled or scripted, or holds a lazy layer.
    """
    check_network(model)
    probed = probe_call(model, example_input)
    rows = _layer_rows(model, probed.calls)
    stored_bytes = None if path is None else _folder_bytes(Path(path))
    arguments = probed.arguments
    is_converted = any(True for _ in lego_modules(model))
    fvcore_macs = None
    if arguments is not None and arguments.are_float_tensors():
        fvcore_macs = count_macs_with_fvcore(model, *arguments.args)
    latency: tuple[Latency, ...] = ()
    if repeats and arguments is not None and is_converted:
        latency = tuple(time_routes(model, baseline, arguments, repeats))
    return Report(rows, stored_bytes, fvcore_macs, probed.input_shape, probed.note, latency)


def _layer_rows(model: nn.Module, calls: dict[nn.Module, Calls]) -> tuple[LayerReport, ...]:
    """Report each layer in the order in which the layers run, then all other parameters in a row.

    A dense layer whose weight an earlier row has counted (shared weights) gets no row. Of Lego
    layers that share a bank, the first row counts it.
    """
    record = lego_state(model).conversion
    skipped = record.skipped if isinstance(record, ConversionRecord) else {}
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LAYERS)]
    layers.sort(key=lambda pair: calls[pair[1]].order if pair[1] in calls else len(layers))
    rows = []
    counted: set[int] = set()
    for name, layer in layers:
        weights = _weights(layer)
        is_lego = isinstance(layer, LegoModule)
        has_counted_bank = is_lego and id(layer.lego_filters) in counted
        if any(id(weight) in counted for weight in weights) and not is_lego:
            continue
        counted.update(id(weight) for weight in weights)
        pixels = calls[layer].pixels if layer in calls else None
        if isinstance(layer, LegoModule):
            rows.append(_lego_row(name, layer, pixels, not has_counted_bank))
        else:
            rows.append(_dense_row(name, layer, pixels, skipped.get(name)))
    rows.append(_other_row([p for p in model.parameters() if id(p) not in counted]))
    return tuple(rows)


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    """List the parameters of the layer itself, without the bias."""
    return [p for name, p in layer.named_parameters(recurse=False) if name != "bias"]


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _lego_row(name: str, layer: LegoModule, pixels: int | None, counts_bank: bool) -> LayerReport:
    shape = layer.lego_shape
    has_coefficients = layer.coefficients is not None
    memory_bits = 8 * layer.lego_filters.element_size()
    coefficient_bits = STORAGE_BITS[layer.coefficients_dtype] if has_coefficients else 0
    storage = layer.storage_dtype
    bits = lego_bits(shape, STORAGE_BITS[storage], coefficient_bits, SCALE_BITS.get(storage, 0))
    params = lego_params(shape, has_coefficients)
    if not counts_bank:
        bits -= shape.n_filter_values * STORAGE_BITS[storage]
        bits -= shape.n_lego * SCALE_BITS.get(storage, 0)
        params -= shape.n_filter_values
    dense = dense_params(shape)
    macs = macs_used_only = None
    if pixels is not None:
        filter_size = shape.n_filter_values // shape.n_lego
        macs = min(dense * pixels, lego_macs(shape, pixels))
        transform = count_used_filters(shape, layer.index) * filter_size
        macs_used_only = min(dense, transform + shape.n_slots) * pixels
    return LayerReport(
        name=name,
        type_name=type(layer).__name__,
        weight_shape=tuple(layer.weight.shape),
        n_lego=shape.n_lego,
        n_split=shape.n_split,
        n_terms=shape.n_terms,
        dense_params=dense,
        params=params,
        dense_bits=dense * memory_bits,
        bits=bits,
        dense_macs=None if pixels is None else dense * pixels,
        macs=macs,
        macs_used_only=macs_used_only,
        fewer_filters=shape.n_lego <= shape.n_out,
        fewer_bits=bits <= dense * memory_bits,
        weight_error=layer.weight_error,
        reason=None,
    )


def _dense_row(name: str, layer: nn.Module, pixels: int | None, reason: str | None) -> LayerReport:
    weights = _weights(layer)
    params, bits = _count(weights)
    # A CondConv2d mixes its experts into one weight of their size, and applies only that.
    macs = None if pixels is None else pixels * (params // int(getattr(layer, "num_experts", 1)))
    return LayerReport(
        name=name,
        type_name=type(layer).__name__,
        weight_shape=tuple(weights[0].shape) if weights else (),
        n_lego=None,
        n_split=None,
        n_terms=None,
        dense_params=params,
        params=params,
        dense_bits=bits,
        bits=bits,
        dense_macs=macs,
        macs=macs,
        macs_used_only=macs,
        fewer_filters=None,
        fewer_bits=None,
        weight_error=None,
        reason=reason or "dense",
    )


def _other_row(parameters: list[nn.Parameter]) -> LayerReport:
    params, bits = _count(parameters)
    return LayerReport(
        name="(other)",
        type_name="norms, biases",
        weight_shape=(),
        n_lego=None,
        n_split=None,
        n_terms=None,
        dense_params=params,
        params=params,
        dense_bits=bits,
        bits=bits,
        dense_macs=None,
        macs=None,
        macs_used_only=None,
        fewer_filters=None,
        fewer_bits=None,
        weight_error=None,
        reason="norms, biases",
    )


def _count(parameters: list[nn.Parameter]) -> tuple[int, int]:
    """Count the values of some parameters, and their bits in memory."""
    params = sum(p.numel() for p in parameters)
    return params, sum(8 * p.numel() * p.element_size() for p in parameters)
