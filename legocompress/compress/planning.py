"""Make the plan: which layers become Lego modules, which stay dense and why, at what cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from legocompress.compress.banks import share_banks
from legocompress.compress.custom_computation import explain_custom_computation, explain_name_clash
from legocompress.compress.eligibility import (
    explain_unsupported,
    explain_unwanted,
    find_structural_exclusions,
)
from legocompress.compress.plan_types import LayerPlan, Plan
from legocompress.compress.sharing import find_shared_weights
from legocompress.compress.sizing import check_splits, choose_shape, explain_no_gain
from legocompress.errors import PlanError
from legocompress.lego.module import LegoModule
from legocompress.models.checks import refuse_wrapper
from legocompress.models.probe import WEIGHT_LAYERS, Calls, probe
from legocompress.models.reparameterization import fused_copy, has_training_form
from legocompress.spec import LegoSpec, check_patterns


def plan(
    model: nn.Module, spec: LegoSpec | None = None, example_input: Tensor | Any | None = None
) -> Plan:
    """Decide which layers of `model` a conversion by `spec` replaces; the model stays as it is.

    One forward pass in eval mode finds the order of the layers and their output sizes.

    Args:
        model: the dense network.
        spec: what is asked for; by default m=0.5, o=2, k=1 with coefficients.
        example_input: an input (N, c, H, W), or a tuple of arguments; by default one zero image of
            the size that the model's own configuration names.

    Raises:
        UsageError: the model is wrapped, compiled or scripted.
        PlanError: the model has no conv, or it is converted already.
        SpecError: `o` divides the input channels of no layer.
        PatternError: a pattern of the spec matches nothing.
    """
    spec = LegoSpec() if spec is None else spec
    refuse_wrapper(model)
    if any(isinstance(m, LegoModule) for m in model.modules()):
        raise PlanError(
            "the model holds Lego modules already; plan on the original network, "
            "or on legocompress.to_dense(model)"
        )
    reparameterize = has_training_form(model)
    if reparameterize:
        model = fused_copy(model)
    layers = list(_list_layers(model))
    types = (nn.Conv2d, nn.Linear) if spec.linear else (nn.Conv2d,)
    if not any(isinstance(layer, types) for _, layer in layers):
        raise PlanError(
            f"{type(model).__name__} has no Conv2d layer, so there is nothing to convert"
            + (" (--linear takes Linear layers in)" if layers and not spec.linear else "")
            + (
                "; a torch.export program holds operators, so plan before exporting"
                if isinstance(model, torch.fx.GraphModule)
                else ""
            )
        )
    check_patterns(spec, [name for name, _ in layers])
    calls, input_shape, note = probe(model, example_input)
    order = {id(layer): calls[layer].order for _, layer in layers if layer in calls}
    last = len(layers)  # taken here, since a list looks empty while it is being sorted
    layers.sort(key=lambda pair: order.get(id(pair[1]), last))
    exclusions = find_structural_exclusions(model, layers, calls)
    shared = find_shared_weights(model)
    rows = []
    counted: set[int] = set()
    for name, layer in layers:
        row = _plan_layer(name, layer, spec, exclusions.get(name), calls, shared)
        weight = layer._parameters.get("weight")
        if weight is not None and id(weight) in counted:  # a shared weight counts once
            row = replace(row, dense_params=0, dense_bits=0)
        counted.add(id(weight))
        rows.append(row)
    rows = list(share_banks(rows, dict(layers)))
    check_splits(spec, rows)
    others = [p for p in model.parameters() if id(p) not in counted and not is_lazy(p)]
    return Plan(
        spec=spec,
        rows=tuple(rows),
        other_params=sum(p.numel() for p in others),
        other_bits=sum(8 * p.numel() * p.element_size() for p in others),
        reparameterize=reparameterize,
        input_shape=input_shape,
        note=note,
    )


def _list_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every layer with the weight of a conv or Linear once, with its first name."""
    for name, module in model.named_modules():
        quantized = type(module).__module__.startswith("torch.ao.")
        if isinstance(module, WEIGHT_LAYERS) or (quantized and "Conv" in type(module).__name__):
            yield name, module


def _plan_layer(
    name: str,
    layer: nn.Module,
    spec: LegoSpec,
    exclusion: str | None,
    calls: dict[nn.Module, Calls],
    shared: dict[int, str],
) -> LayerPlan:
    weight = layer._parameters.get("weight")
    layer_calls = calls.get(layer)
    size = 0 if weight is None or isinstance(weight, UninitializedParameter) else weight.numel()
    row = LayerPlan(
        name=name,
        type_name=type(layer).__name__,
        weight_shape=tuple(weight.shape) if weight is not None and size else (),
        groups=int(getattr(layer, "groups", 1)),
        reason=None,
        dense_params=size,
        dense_bits=8 * weight.element_size() * size if weight is not None and size else 0,
        dense_macs=None
        if layer_calls is None
        else layer_calls.pixels
        * _count_applied_weight(layer, size or _count_computed_weight(layer)),
        pixels=None if layer_calls is None else layer_calls.pixels,
    )
    named = spec.names_exactly(name)
    reason = explain_unsupported(layer, shared) or explain_unwanted(name, layer, spec)
    if reason is None and not named:
        reason = exclusion or (
            "Linear layer (--linear takes it in)"
            if isinstance(layer, nn.Linear) and not spec.linear
            else None
        )
    if reason is None and isinstance(layer, nn.Conv2d) and layer.in_channels == layer.groups:
        reason = "depthwise: one input channel a group"
    if reason is None:
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        reason = explain_name_clash(layer) or explain_custom_computation(layer)
    if reason is None:
        ours = spec.for_layer(name)
        shape = choose_shape(row, ours)
        if ours.share == "layer":  # whether a shared bank pays depends on all its layers
            reason = explain_no_gain(shape, ours, row.dense_bits)
        row = replace(row, shape=shape, spec=ours)
    return row if reason is None else replace(row, reason=reason, shape=None, spec=None)


def _count_computed_weight(layer: nn.Module) -> int:
    """Number of elements of a weight that is no parameter, such as a parametrised one."""
    weight = getattr(layer, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else 0


def _count_applied_weight(layer: nn.Module, size: int) -> int:
    """Weight elements that one output pixel uses; CondConv2d mixes its experts into one weight."""
    return size // layer.num_experts if isinstance(layer, CondConv2d) else size
