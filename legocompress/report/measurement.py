"""Measure a network: params, bits, bytes, MACs and latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

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
from legocompress.models.probe import WEIGHT_LAYERS, default_input, probe
from legocompress.report.latency import time_routes
from legocompress.report.macs import fvcore_macs
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
    """Measure a network, converted or dense.

    Args:
        model: the network; it is put into eval mode for the while.
        baseline: the original, for latency side by side.
        example_input: (N, c, H, W) or a tuple of arguments; by default as `plan` takes it.
        path: its folder on disk, for the stored bytes.
        repeats: timed runs of each form; 0 times nothing.

    Raises:
        UsageError: the model is wrapped, compiled or scripted, or holds a lazy layer.
    """
    check_network(model)
    calls, input_shape, note = probe(model, example_input)
    record = lego_state(model).conversion
    skipped = record.skipped if isinstance(record, ConversionRecord) else {}
    found: list[tuple[str, nn.Module]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)
    ]
    found.sort(key=lambda pair: calls[pair[1]].order if pair[1] in calls else len(found))
    rows = []
    covered: set[int] = set()
    for name, layer in found:
        pixels = calls[layer].pixels if layer in calls else None
        own = [p for n, p in layer.named_parameters(recurse=False) if n != "bias"]
        if any(id(p) in covered for p in own):
            continue
        covered.update(id(p) for p in own)
        if isinstance(layer, LegoModule):
            rows.append(_lego_row(name, layer, pixels))
        else:
            rows.append(_dense_row(name, layer, pixels, skipped.get(name)))
    rows.append(_other_row([p for p in model.parameters() if id(p) not in covered]))
    stored = None
    if path is not None:
        stored = sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file())
    image = example_input if isinstance(example_input, Tensor) else default_input(model)
    converted = any(True for _ in lego_modules(model))
    counted = fvcore_macs(model, image) if image is not None and note is None else None
    times: tuple[Latency, ...] = ()
    if repeats and image is not None and converted:
        times = tuple(time_routes(model, baseline, image, repeats))
    return Report(tuple(rows), stored, counted, input_shape, note, times)


def _lego_row(name: str, layer: LegoModule, pixels: int | None) -> LayerReport:
    shape = layer.lego_shape
    has_coefficients = layer.coefficients is not None
    memory_bits = 8 * layer.lego_filters.element_size()
    coefficient_bits = STORAGE_BITS[layer.coefficients_dtype] if has_coefficients else 0
    stored = layer.storage_dtype
    bits = lego_bits(shape, STORAGE_BITS[stored], coefficient_bits, SCALE_BITS.get(stored, 0))
    dense = dense_params(shape)
    macs = used = None
    if pixels is not None:
        filter_size = shape.n_filter_values // shape.n_lego
        macs = min(dense * pixels, lego_macs(shape, pixels))
        transform = count_used_filters(shape, layer.index) * filter_size
        used = min(dense, transform + shape.n_slots) * pixels
    return LayerReport(
        name=name,
        type_name=type(layer).__name__,
        weight_shape=tuple(layer.weight.shape),
        n_lego=shape.n_lego,
        n_split=shape.n_split,
        n_terms=shape.n_terms,
        dense_params=dense,
        params=lego_params(shape, has_coefficients),
        dense_bits=dense * memory_bits,
        bits=bits,
        dense_macs=None if pixels is None else dense * pixels,
        macs=macs,
        macs_used_only=used,
        fewer_filters=shape.n_lego <= shape.n_out,
        fewer_bits=bits <= dense * memory_bits,
        weight_error=layer.weight_error,
        reason=None,
    )


def _dense_row(name: str, layer: nn.Module, pixels: int | None, reason: str | None) -> LayerReport:
    own = [p for n, p in layer.named_parameters(recurse=False) if n != "bias"]
    size = sum(p.numel() for p in own)
    bits = sum(8 * p.numel() * p.element_size() for p in own)
    experts = int(getattr(layer, "num_experts", 1))
    macs = None if pixels is None else pixels * (size // experts)
    return LayerReport(
        name, type(layer).__name__, tuple(own[0].shape) if own else (), None, None, None,
        size, size, bits, bits, macs, macs, macs, None, None, None, reason or "dense",
    )  # fmt: skip


def _other_row(others: list[nn.Parameter]) -> LayerReport:
    size = sum(p.numel() for p in others)
    bits = sum(8 * p.numel() * p.element_size() for p in others)
    return LayerReport(
        "(other)", "norms, biases", (), None, None, None,
        size, size, bits, bits, None, None, None, None, None, None, "norms, biases",
    )  # fmt: skip
