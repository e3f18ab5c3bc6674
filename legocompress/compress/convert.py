"""Carry out a plan: turn each planned layer into a Lego module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from legocompress.compress.eligibility import explain_unsupported
from legocompress.compress.factorize import (
    dense_weight,
    factorize,
    factorize_bank,
    relative_error,
)
from legocompress.compress.plan_types import LayerPlan, Plan
from legocompress.compress.sharing import find_shared_weights
from legocompress.errors import ConversionError, PlanError
from legocompress.lego.algebra import assemble
from legocompress.lego.module import LegoModule, ModelT
from legocompress.lego.surgery import become_lego_, guard_fusing_, share_bank_
from legocompress.models.checks import refuse_quantized, refuse_wrapper
from legocompress.models.reparameterization import fused_copy
from legocompress.models.source import source_of
from legocompress.state.conversion import ConversionRecord
from legocompress.state.model_state import lego_state


def convert_(
    model: ModelT,
    plan: Plan,
    seed: int = 0,
    on_layer: Callable[[LayerPlan], None] | None = None,
) -> ModelT:
    """Turn the planned layers of `model` into Lego modules, in place, and return it.

    The filters of each layer are clustered on the device of the layer, one layer after the other,
    so memory holds the model and the work of one layer. Values are rounded to the storage dtypes
    of the spec, so that a measurement before saving equals one after loading.

    Args:
        model: the network that the plan was made for.
        plan: what to do.
        seed: of the clustering; the same seed gives the same bytes.
        on_layer: called after each layer, for a progress bar.

    Raises:
        UsageError: the model is wrapped, compiled or scripted.
        PlanError: the plan converts nothing, does not fit the model, or was carried out already.
        ConversionError: a layer's weights are shared, hold NaN or infinity, are on the meta device
            or of an unsupported kind. As after the other errors, nothing has been changed then.
    """
    refuse_wrapper(model)
    refuse_quantized(model, "convert_")
    if not plan.layers:
        raise PlanError(f"no layer can be converted: {summarise_reasons(plan)}")
    if plan.reparameterize:
        select_planned_layers(fuse_for_plan(model), plan)  # fail before anything is changed
        model = reparameterize_model(model.eval(), inplace=True)
    layers = select_planned_layers(model, plan)
    banks = list_banks(plan)
    for row in plan.layers.values():
        if row.bank is None:
            _convert_layer_(layers[row.name], row, seed)
        elif row.name == row.bank:
            _convert_bank_(layers, banks[row.bank], seed)
        if on_layer is not None:
            on_layer(row)
    guard_fusing_(model)
    state = lego_state(model)
    state.source = replace(source_of(model), reparameterized=plan.reparameterize)
    state.conversion = ConversionRecord(plan.spec, seed, dict(plan.skipped))
    return model


def fuse_for_plan(model: nn.Module) -> nn.Module:
    """Copy a network in training form and fuse the copy, as its plan names the layers.

    Raises:
        ConversionError: a parameter is on the meta device.
    """
    for name, parameter in model.named_parameters():
        _refuse_meta(name, parameter)
    return fused_copy(model)


def _refuse_meta(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ConversionError(
            f"{name!r} is on the meta device, where it has no values; call "
            "model.to_empty(device='cpu') and load the weights before"
        )


def summarise_reasons(plan: Plan) -> str:
    """Say why layers stay dense: each reason with its number of layers, most frequent first."""
    counts = Counter(reason.partition(":")[0] for reason in plan.skipped.values())
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common())


def select_planned_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the planned layers by name, after checking that each of them can be converted.

    Raises:
        PlanError: the plan does not fit the model, or was carried out already.
        ConversionError: a layer's weights are shared, hold NaN or infinity, are on the meta device
            or of an unsupported kind.
    """
    layers = {name: _find(model, row) for name, row in plan.layers.items()}
    shared = find_shared_weights(model)
    for name, layer in layers.items():
        reason = explain_unsupported(layer, shared)
        if reason is not None:
            raise ConversionError(
                f"layer {name!r} cannot be converted: {reason}; make a new plan of this model"
            )
        _refuse_meta(f"{name}.weight" if name else "weight", layer.weight)
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
        raise PlanError(
            f"the plan names a layer {row.name!r}, which this model does not have"
        ) from None
    if isinstance(layer, LegoModule):
        raise PlanError(
            f"layer {row.name!r} is a Lego module already; a plan is carried out only once. To "
            "convert otherwise, make a new plan of the original network, or of "
            "legocompress.to_dense(model)"
        )
    weight = layer._parameters.get("weight")
    if weight is not None and is_lazy(weight):
        raise PlanError(
            f"layer {row.name!r} is lazy and has no weights yet; run the network once before"
        )
    if (
        not isinstance(layer, (nn.Conv2d, nn.Linear))
        or type(layer).__name__ != row.type_name
        or weight is None
        or tuple(weight.shape) != row.weight_shape
        or getattr(layer, "groups", 1) != row.groups
    ):
        raise PlanError(f"layer {row.name!r} is not the one that the plan was made for")
    return layer


def list_banks(plan: Plan) -> dict[str, list[LayerPlan]]:
    """The rows that share a bank, by the name of the bank."""
    banks: dict[str, list[LayerPlan]] = {}
    for row in plan.layers.values():
        if row.bank is not None:
            banks.setdefault(row.bank, []).append(row)
    return banks


def _convert_bank_(
    layers: dict[str, nn.Conv2d | nn.Linear], rows: list[LayerPlan], seed: int
) -> None:
    shapes = [row.shape for row in rows if row.shape is not None]
    spec = rows[0].spec
    assert spec is not None
    pairs = zip(rows, shapes, strict=True)
    weights = [dense_weight(layers[row.name], shape) for row, shape in pairs]
    units = factorize_bank(weights, shapes, spec, seed)
    modules = []
    for row, shape, weight, unit in zip(rows, shapes, weights, units, strict=True):
        error = relative_error(weight, assemble(shape, unit))
        layer = layers[row.name]
        module = become_lego_(layer, shape, unit, spec.dtype, spec.coefficients_dtype)
        module.weight_error = error
        modules.append(module)
    share_bank_(modules)


def _convert_layer_(layer: nn.Conv2d | nn.Linear, row: LayerPlan, seed: int) -> LegoModule:
    shape, spec = row.shape, row.spec
    assert shape is not None
    assert spec is not None
    weight = dense_weight(layer, shape)
    unit = factorize(weight, shape, spec, seed)
    error = relative_error(weight, assemble(shape, unit))
    module = become_lego_(layer, shape, unit, spec.dtype, spec.coefficients_dtype)
    module.weight_error = error
    return module
