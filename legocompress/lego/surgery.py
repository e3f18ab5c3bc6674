"""Turn layers into Lego modules and back, and freeze or train the modules of a network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from legocompress.errors import ConversionError, DenseOnlyError
from legocompress.lego.module import (
    LegoModule,
    ModelT,
    is_channels_last,
    lego_class,
    lego_modules,
    replaced_class,
)
from legocompress.lego.plain import Replacement as Replacement
from legocompress.lego.shape import UnitShape
from legocompress.lego.unit import LegoUnit
from legocompress.spec import FilterDtype, StorageDtype


def become_lego_(
    layer: nn.Conv2d | nn.Linear,
    shape: UnitShape,
    unit: LegoUnit,
    storage_dtype: FilterDtype = "fp32",
    coefficients_dtype: StorageDtype = "fp16",
) -> LegoModule:
    """Turn a conv or Linear into a Lego module, in place.

    The object stays the same, so every reference to it (a second name, a hook, a list) sees the
    change. Everything but the weight is kept: stride, padding, bias, hooks, training flag and
    requires_grad.

    Args:
        layer: the conv or Linear, with a plain parameter as its weight.
        shape: sizes of the unit.
        unit: its filters, index (int64) and coefficients.
        storage_dtype: what the checkpoint stores the filters as.
        coefficients_dtype: what the checkpoint stores the coefficients as.
    """
    weight = layer._parameters.pop("weight")
    assert weight is not None

    def parameter(tensor: Tensor) -> nn.Parameter:
        moved = tensor.to(device=weight.device, dtype=weight.dtype)
        return nn.Parameter(moved, requires_grad=weight.requires_grad)

    layer.__class__ = lego_class(type(layer))  # type: ignore[assignment]
    module: LegoModule = layer  # type: ignore[assignment]
    module._channels_last = is_channels_last(weight)
    lego_filters = unit.lego_filters
    if module._channels_last:
        lego_filters = lego_filters.contiguous(memory_format=torch.channels_last)
    module.register_parameter("lego_filters", parameter(lego_filters))
    module.register_buffer("index", unit.index.to(weight.device))
    gains = None if unit.coefficients is None else parameter(unit.coefficients)
    module.register_parameter("coefficients", gains)
    module.register_parameter("proxy", None)
    module.register_buffer("frozen_weight", None, persistent=False)
    module.lego_shape = shape
    module.storage_dtype = storage_dtype
    module.coefficients_dtype = coefficients_dtype
    module.weight_error = None
    module._route = "assemble"
    module._watch = None
    return module


def share_bank_(modules: Sequence[LegoModule]) -> None:
    """Let Lego modules use the bank of the first of them: one parameter that all of them hold.

    As with any parameter that has several names in PyTorch, `parameters()` yields it once, copies
    of the network share it again, and a module that is replaced or removed leaves the others as
    they are.

    Raises:
        ConversionError: the banks differ in shape, dtype, device or storage dtype.
    """
    kinds = {
        (m.lego_filters.shape, m.lego_filters.dtype, m.lego_filters.device, m.storage_dtype)
        for m in modules
    }
    if len(kinds) > 1:
        raise ConversionError(
            "layers can share a bank only if their Lego filters agree in shape, dtype, device and "
            f"storage dtype; these are {' and '.join(sorted(str(kind) for kind in kinds))}"
        )
    for module in modules[1:]:
        module.lego_filters = modules[0].lego_filters
        module.frozen_weight = None


def become_dense_(module: LegoModule) -> nn.Conv2d | nn.Linear:
    """Turn a Lego module back into a layer of its replaced class, with the assembled weight."""
    weight = module.weight.detach().clone(memory_format=torch.preserve_format)
    requires_grad = module.lego_filters.requires_grad
    for name in ("lego_filters", "coefficients", "proxy"):
        module._parameters.pop(name)
    for name in ("index", "frozen_weight"):
        module._buffers.pop(name)
    module._non_persistent_buffers_set.discard("frozen_weight")
    for name in LegoModule.__annotations__:
        module.__dict__.pop(name, None)
    module.__class__ = replaced_class(module)  # type: ignore[assignment]
    layer: Any = module
    others = dict(layer._parameters)
    layer._parameters.clear()
    layer.weight = nn.Parameter(weight, requires_grad=requires_grad)
    layer._parameters.update(others)
    return layer  # type: ignore[no-any-return]


def train_indices_(model: ModelT) -> ModelT:
    """Give every Lego module a proxy N, so that its index trains (straight-through estimator).

    The outputs of the network do not change. `freeze_indices_` removes the proxies again.
    """
    for _, module in lego_modules(model):
        module.train_index()
    return model


def synchronise_indices_(model: ModelT) -> ModelT:
    """Set every index to what its proxy N chooses now, as each forward pass does by itself."""
    for _, module in lego_modules(model):
        module.synchronise_index()
    return model


def freeze_indices_(model: ModelT) -> ModelT:
    """Remove every proxy N; each index keeps what N chose last."""
    for _, module in lego_modules(model):
        module.freeze_index()
    return model


def freeze_(model: ModelT) -> ModelT:
    """Assemble every weight once and cache it, for inference, until the next call of `train()`."""
    for _, module in lego_modules(model):
        module.freeze()
    return model


def to_dense_(model: ModelT) -> ModelT:
    """Turn every Lego module back into an ordinary layer with the assembled weight, in place."""
    for _, module in list(lego_modules(model)):
        become_dense_(module)
    for part in model.modules():
        for name, value in list(part.__dict__.items()):
            if isinstance(value, Replacement):
                del part.__dict__[name]
    return model


def to_dense(model: nn.Module) -> nn.Module:
    """Copy a converted network with every Lego module turned back into an ordinary layer."""
    return to_dense_(copy.deepcopy(model))


class _RefuseFusing(Replacement):
    """Replaces the fuse method of a block, which would write to a weight that does not exist."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise DenseOnlyError(
            f"{self.method}() would rewrite weights that are assembled from Lego filters; "
            "call legocompress.to_dense(model) first"
        )


FUSING_METHODS = ("fuse", "fuse_model", "reparameterize", "switch_to_deploy")


def guard_fusing_(model: ModelT) -> ModelT:
    """Make the fuse methods of every block that holds Lego modules raise DenseOnlyError."""
    for module in model.modules():
        methods = [m for m in FUSING_METHODS if callable(getattr(type(module), m, None))]
        if methods and any(True for _ in lego_modules(module)):
            module.__dict__.update({method: _RefuseFusing(method) for method in methods})
    return model
