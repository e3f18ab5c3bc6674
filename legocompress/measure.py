"""Numbers about a network: params, bits, bytes, MACs, latency -> Report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from legocompress.conv import LegoModule, Route, freeze_, lego_modules
from legocompress.convert import Record
from legocompress.probe import WEIGHT_LAYERS, default_input, evaluating, probe
from legocompress.spec import SCALE_BITS, STORAGE_BITS
from legocompress.unit import dense_params, lego_bits, lego_macs, lego_params, used_filters

LAYERS: tuple[type[nn.Module], ...] = (LegoModule, *WEIGHT_LAYERS)


@dataclass(frozen=True)
class LayerReport:
    """One layer (or, named '(other)', all that is no layer): what it was and what it is.

    Bits are ideal ones. `macs` is by the cheaper of the merge and the dense form, and
    `macs_used_only` by a merge that skips the Lego filters that a split never names.
    `fewer_filters` is m' <= n and `fewer_bits` is |G| + |B| <= |F|; both None where dense.
    """

    name: str
    type_name: str
    weight_shape: tuple[int, ...]
    n_lego: int | None
    n_split: int | None
    n_terms: int | None
    dense_params: int
    params: int
    dense_bits: int
    bits: int
    dense_macs: int | None
    macs: int | None
    macs_used_only: int | None
    fewer_filters: bool | None
    fewer_bits: bool | None
    weight_error: float | None
    reason: str | None


@dataclass(frozen=True)
class Latency:
    """Median and quartiles of interleaved runs of one form, with the conditions they hold under."""

    form: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float
    device: str
    threads: int
    batch: int
    dtype: str
    repeats: int


@dataclass(frozen=True)
class Report:
    """What a converted network is, layer by layer; the rows sum to the totals."""

    rows: tuple[LayerReport, ...]
    stored_bytes: int | None
    fvcore_macs: int | None
    input_shape: tuple[int, ...] | None
    note: str | None
    latency: tuple[Latency, ...] = ()

    def total(self, column: str) -> int:
        """Sum of a column over all rows; layers that did not run count as nothing."""
        return sum(getattr(row, column) or 0 for row in self.rows)

    @property
    def speedup(self) -> float | None:
        """Theoretical speedup of the whole network: dense over Lego multiply-accumulates."""
        macs = self.total("macs")
        return self.total("dense_macs") / macs if macs else None

    @property
    def weight_error(self) -> float | None:
        """Relative error ||F - F'|| / ||F|| over all converted layers, each weighing the same."""
        errors = [row.weight_error for row in self.rows if row.weight_error is not None]
        return statistics.fmean(e**2 for e in errors) ** 0.5 if errors else None

    def totals(self) -> dict[str, Any]:
        """The whole network's numbers, as the command line prints them."""
        columns = [
            "dense_params",
            "params",
            "dense_bits",
            "bits",
            "dense_macs",
            "macs",
            "macs_used_only",
        ]
        return {
            **{column: self.total(column) for column in columns},
            "stored_bytes": self.stored_bytes,
            "theoretical_speedup": self.speedup,
            "relative_weight_error": self.weight_error,
            "fvcore_macs": self.fvcore_macs,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {**asdict(self), "totals": self.totals()}


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
    """
    calls, input_shape, note = probe(model, example_input)
    record = getattr(model, "lego_record", None)
    skipped = record.skipped if isinstance(record, Record) else {}
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
        times = tuple(_forms_latency(model, baseline, image, repeats))
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
        transform = used_filters(shape, layer.index) * filter_size
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


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Handles for fvcore's FlopCountAnalysis: the merge costs one MAC a gathered value.

    Pass to `set_op_handle(**fvcore_handles())`. The transform is a plain conv, which fvcore counts.
    """

    def gathered(inputs: list[Any], outputs: list[Any]) -> int:
        sizes = outputs[0].type().sizes()
        if sizes is None or len(sizes) != 4:  # a gather of Lego filters, not of maps
            return 0
        return int(torch.Size(sizes).numel())

    return {"aten::index_select": gathered}


def fvcore_macs(model: nn.Module, example_input: Tensor) -> int | None:
    """MACs of all convs and Linears by fvcore's own count, each Lego layer by its cheaper form.

    None where the network cannot be traced, as fvcore needs.
    """
    with evaluating(model), cheapest_routes(model):
        analysis = FlopCountAnalysis(model, example_input)
        analysis.set_op_handle(**fvcore_handles())
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        try:
            counts = analysis.by_operator()
        # Tracing runs the network's own code on values it may refuse; there is then no count.
        except Exception:
            return None
    return int(sum(counts[kind] for kind in ("conv", "linear", "addmm", "index_select")))


@contextmanager
def cheapest_routes(model: nn.Module) -> Iterator[None]:
    """Run each Lego layer by its form of fewest MACs; weights of the others are assembled once."""
    before = [(module, module.route, module.frozen_weight) for _, module in lego_modules(model)]
    for module, _, _ in before:
        shape = module.lego_shape
        if "reference" in module.routes() and lego_macs(shape, 1) < dense_params(shape):
            module.route = "reference"
        else:
            module.route = "assemble"
            module.freeze()
    try:
        yield
    finally:
        for module, route, frozen in before:
            module.route = route
            module.frozen_weight = frozen


def _forms_latency(
    model: nn.Module, baseline: nn.Module | None, image: Tensor, repeats: int
) -> list[Latency]:
    def run(route: Route) -> None:
        for _, module in lego_modules(model):
            module.route = route if route in module.routes() else "assemble"
        model(image)

    before = [(module, module.route, module.frozen_weight) for _, module in lego_modules(model)]
    try:
        return _timed(model, baseline, image, repeats, run)
    finally:
        for module, before_route, frozen in before:
            module.route, module.frozen_weight = before_route, frozen


def _timed(
    model: nn.Module,
    baseline: nn.Module | None,
    image: Tensor,
    repeats: int,
    run: Callable[[Route], None],
) -> list[Latency]:
    with evaluating(model), evaluating(model if baseline is None else baseline):
        freeze_(model)
        forms: dict[str, Callable[[], object]] = {
            "assembled": lambda: run("assemble"),
            "reference": lambda: run("reference"),
        }
        if baseline is not None:
            forms = {"dense": lambda: baseline(image), **forms}
        return latency(forms, image, repeats)


def latency(
    forms: dict[str, Callable[[], object]], example_input: Tensor, repeats: int
) -> list[Latency]:
    """Time forms of a network against the first of them, in interleaved runs after one warm-up.

    `ratio` is the median over rounds of first / form, so above 1 is faster than the first.
    """
    cuda = example_input.device.type == "cuda"
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if cuda:
                torch.cuda.synchronize()
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - start))
    first = taken[next(iter(forms))]
    found = []
    for name, times in taken.items():
        low, middle, high = statistics.quantiles(times, n=4) if repeats > 1 else times * 3
        found.append(
            Latency(
                form=name,
                median_ms=middle,
                quartiles_ms=(low, high),
                ratio=statistics.median(a / b for a, b in zip(first, times, strict=True)),
                device=str(example_input.device),
                threads=torch.get_num_threads(),
                batch=example_input.shape[0],
                dtype=str(example_input.dtype).removeprefix("torch."),
                repeats=repeats,
            )
        )
    return found
