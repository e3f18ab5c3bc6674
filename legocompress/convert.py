"""Plan -> the converted model: cluster each layer's filters and turn it into a Lego module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from legocompress.cluster import clusterings
from legocompress.conv import LegoModule, become_lego_, guard_fusing_, lego_modules
from legocompress.errors import ConversionError, PlanError
from legocompress.models import source_of
from legocompress.plan import LayerPlan, Plan, deployed_copy
from legocompress.spec import FilterDtype, LegoSpec, UnitShape
from legocompress.unit import assemble, fragments

ModelT = TypeVar("ModelT", bound=nn.Module)
Unit = tuple[Tensor, Tensor, Tensor | None]  # Lego filters, index, coefficients
TORCH_DTYPES: dict[FilterDtype, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class Record:
    """What a conversion was asked for and what it left dense, kept as `model.lego_record`.

    `recipe` is what the network was fine-tuned by.
    """

    spec: LegoSpec
    seed: int
    skipped: dict[str, str]
    recipe: dict[str, Any] | None = None


def convert_(
    model: ModelT,
    plan: Plan,
    seed: int = 0,
    on_layer: Callable[[LayerPlan], None] | None = None,
) -> ModelT:
    """Turn the planned layers of `model` into Lego modules, in place, and return it.

    Every layer's filters are clustered on the layer's own device; layers are done one after the
    other, so memory stays at the model and one layer's work. Values are rounded to the storage
    dtypes of the spec, so that what is measured is what is saved.

    Args:
        model: the network that the plan was made for.
        plan: what to do.
        seed: of the clustering; the same seed gives the same bytes.
        on_layer: called after each layer, for a progress bar.

    Raises:
        PlanError: the plan converts nothing, or does not fit the model.
        ConversionError: a layer's weights hold NaN or infinity; nothing has been changed then.
    """
    if not plan.layers:
        raise PlanError(f"no layer can be converted: {reasons(plan)}")
    if plan.reparameterize:
        check_layers(deployed_copy(model), plan)  # so that what fails fails before a change
        model = reparameterize_model(model.eval(), inplace=True)
    layers = check_layers(model, plan)
    for name, row in plan.layers.items():
        _convert_layer_(layers[name], row, seed)
        if on_layer is not None:
            on_layer(row)
    guard_fusing_(model)
    noted: Any = model
    noted.lego_source = replace(source_of(model), reparameterized=plan.reparameterize)
    noted.lego_record = Record(plan.spec, seed, dict(plan.skipped))
    return model


def reasons(plan: Plan) -> str:
    """Why layers stay dense, as one text: each reason with the number of layers, most first."""
    counts = Counter(reason.partition(":")[0] for reason in plan.skipped.values())
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common())


def check_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Conv2d | nn.Linear]:
    """The planned layers by name, whose weights are finite and as the plan says.

    Raises:
        PlanError: the plan does not fit the model.
        ConversionError: a layer's weights hold NaN or infinity.
    """
    layers = {name: _find(model, row) for name, row in plan.layers.items()}
    for name, layer in layers.items():
        if not torch.isfinite(layer.weight).all():
            raise ConversionError(
                f"the weight of layer {name!r} holds NaN or infinity; repair the weights, "
                f"or leave the layer out with --skip {name!r}"
            )
    return layers


def _find(model: nn.Module, row: LayerPlan) -> nn.Conv2d | nn.Linear:
    try:
        layer = model.get_submodule(row.name)
    except AttributeError:
        raise PlanError(f"the plan names a layer {row.name!r}, which this model has not") from None
    weight = layer._parameters.get("weight")
    if (
        not isinstance(layer, (nn.Conv2d, nn.Linear))
        or type(layer).__name__ != row.type_name
        or weight is None
        or tuple(weight.shape) != row.weight_shape
        or getattr(layer, "groups", 1) != row.groups
    ):
        raise PlanError(f"layer {row.name!r} is not the one that the plan was made for")
    return layer


@torch.no_grad()
def unit_for(weight: Tensor, shape: UnitShape, spec: LegoSpec, seed: int) -> Unit:
    """Lego filters, index and coefficients of a dense weight, rounded as the spec stores them.

    Args:
        weight: (n, c, kh, kw).
        shape: sizes of the unit.
        spec: whether there are coefficients, and the storage types.
        seed: of the clustering.
    """
    return next(units_for(weight, [shape], spec, seed))


@torch.no_grad()
def units_for(
    weight: Tensor, shapes: Sequence[UnitShape], spec: LegoSpec, seed: int
) -> Iterator[Unit]:
    """As `unit_for` for shapes that differ in their number of terms alone, in less time."""
    first = shapes[0]
    rows = fragments(weight, first.n_split).reshape(first.n_fragments, -1)
    terms = [shape.n_terms for shape in shapes]
    found = clusterings(rows, first.n_lego, terms, spec.coefficients, seed)
    for n_terms, factors in zip(terms, found, strict=True):
        slots = (first.n_split, first.n_out, n_terms)
        filters = factors.lego_filters.reshape(first.n_lego, first.width, *first.kernel)
        gains = None
        if factors.coefficients is not None:
            filters, gains = balanced(filters, factors.coefficients.reshape(slots))
            gains = rounded(gains, spec.coefficients_dtype)
        yield rounded(filters, spec.dtype), factors.index.reshape(slots), gains


def dense_weight(layer: nn.Conv2d | nn.Linear, shape: UnitShape) -> Tensor:
    """The weight of a layer as (n, c, kh, kw), which a Linear's becomes too."""
    return layer.weight.detach().reshape(shape.n_out, shape.channels, *shape.kernel)


def _convert_layer_(layer: nn.Conv2d | nn.Linear, row: LayerPlan, seed: int) -> LegoModule:
    shape, spec = row.shape, row.spec
    assert shape is not None
    assert spec is not None
    weight = dense_weight(layer, shape)
    unit = unit_for(weight, shape, spec, seed)
    error = relative_error(weight, assemble(shape, *unit))
    module = become_lego_(layer, shape, *unit, spec.dtype, spec.coefficients_dtype)
    module.weight_error = error
    return module


def balanced(filters: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Move the gains' magnitude into the filters, by a power of two, so that fp16 holds them."""
    largest = gains.abs().max().double()
    scale = torch.exp2(torch.ceil(torch.log2(largest))) if largest > 0 else torch.ones(())
    return (filters.double() * scale).to(filters.dtype), (gains.double() / scale).to(gains.dtype)


def rounded(values: Tensor, dtype: FilterDtype) -> Tensor:
    """Round to what `dtype` can store, in the tensor's own dtype; finite values stay finite.

    int8 has a scale for each entry of the first axis: a Lego filter.
    """
    if dtype == "int8":
        # Where memory has few digits too, the second rounding is the one that changes no more.
        once = dequantized(*quantized(values), values.dtype)
        return dequantized(*quantized(once), values.dtype)
    storage = TORCH_DTYPES[dtype]
    limit = min(torch.finfo(storage).max, torch.finfo(values.dtype).max)
    return values.clamp(-limit, limit).to(storage).to(values.dtype)


@torch.no_grad()
def round_(model: ModelT) -> ModelT:
    """Round every Lego module's filters and coefficients to what the checkpoint stores."""
    for _, module in lego_modules(model):
        module.lego_filters.copy_(rounded(module.lego_filters, module.storage_dtype))
        if module.coefficients is not None:
            module.coefficients.copy_(rounded(module.coefficients, module.coefficients_dtype))
    return model


def quantized(filters: Tensor) -> tuple[Tensor, Tensor]:
    """Filters (m, ...) as int8 values in [-127, 127] and symmetric bf16 scales (m,).

    The largest value of a filter is always 127 scales: bf16 rounds a scale by at most 2^-9. So
    what was rounded once is rounded to itself.
    """
    exact = filters.detach().to(torch.float64)
    limit = exact.abs().reshape(len(filters), -1).amax(1)
    scales = (limit / 127).clamp(max=torch.finfo(torch.bfloat16).max).to(torch.bfloat16)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    steps = exact / scales.double().reshape(-1, *[1] * (filters.dim() - 1))
    return steps.round().clamp(-127, 127).to(torch.int8), scales


def dequantized(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `quantized`, in `dtype`; in float32 exactly, since 7 bits times 8 bits fit its 24."""
    limit = torch.finfo(dtype).max
    exact = values.double() * scales.double().reshape(-1, *[1] * (values.dim() - 1))
    return exact.clamp(-limit, limit).to(dtype)


def relative_error(exact: Tensor, approximate: Tensor) -> float:
    """||exact - approximate|| / ||exact|| over all elements; 0 where both are zero."""
    exact = exact.double()
    difference = (exact - approximate.double()).norm()
    return float(difference / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))
