"""Model + spec -> Plan: which layers become Lego modules, which do not and why, at what cost."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.layers import CondConv2d
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from legocompress.conv import LegoModule
from legocompress.errors import PlanError, SpecError
from legocompress.probe import WEIGHT_LAYERS, Calls, default_input, model_cfg, probe
from legocompress.spec import SCALE_BITS, STORAGE_BITS, LegoSpec, UnitShape, check_patterns, matches
from legocompress.unit import lego_bits, lego_macs, lego_params


@dataclass(frozen=True)
class LayerPlan:
    """What is to happen to one layer, and what it costs before and after.

    `reason` says why the layer stays dense; it is None where the layer is converted, and only then
    are `shape` and `spec` there. Bits are ideal ones; macs are for one input of the probed size and
    None where the layer did not run.
    """

    name: str
    type_name: str
    weight_shape: tuple[int, ...]
    groups: int
    reason: str | None
    dense_params: int
    dense_bits: int
    dense_macs: int | None
    shape: UnitShape | None = None
    spec: LegoSpec | None = None
    pixels: int | None = None

    @property
    def converted(self) -> bool:
        """Whether the layer becomes a Lego module."""
        return self.reason is None

    @property
    def params(self) -> int:
        """Numbers in the layer's weight afterwards: bank and coefficients, or the dense weight."""
        if self.shape is None or self.spec is None:
            return self.dense_params
        return lego_params(self.shape, self.spec.coefficients)

    @property
    def bits(self) -> int:
        """Ideal bits of the layer's weight afterwards."""
        if self.shape is None or self.spec is None:
            return self.dense_bits
        return unit_bits(self.shape, self.spec)

    @property
    def proxy_params(self) -> int:
        """Numbers of the proxy N while the index trains; 0 where there is nothing to choose."""
        if self.shape is None or self.shape.n_lego == self.shape.n_terms:
            return 0
        return self.shape.n_fragments * self.shape.n_lego

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates afterwards, by the cheaper form: merge, or dense once assembled."""
        if self.shape is None or self.dense_macs is None:
            return self.dense_macs
        assert self.pixels is not None
        return min(self.dense_macs, lego_macs(self.shape, self.pixels))


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do; `convert_` carries it out.

    `rows` holds every conv and Linear of the model in execution order. `other_params` and
    `other_bits` are those of all that stands in no row (norms, biases, ...), so that the rows and
    the rest sum to the model. `reparameterize` tells that the model has blocks in training form,
    which conversion first turns into their deployed form; the names are those of the deployed one.
    """

    spec: LegoSpec
    rows: tuple[LayerPlan, ...]
    other_params: int
    other_bits: int
    reparameterize: bool = False
    input_shape: tuple[int, ...] | None = None
    note: str | None = None
    layers: dict[str, LayerPlan] = field(init=False, repr=False)
    skipped: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", {r.name: r for r in self.rows if r.converted})
        skipped = {r.name: r.reason for r in self.rows if r.reason is not None}
        object.__setattr__(self, "skipped", skipped)

    @property
    def dense_bits(self) -> int:
        """Bits of the whole network before."""
        return sum(row.dense_bits for row in self.rows) + self.other_bits

    @property
    def bits(self) -> int:
        """Ideal bits of the whole network afterwards."""
        return sum(row.bits for row in self.rows) + self.other_bits

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates before, of the layers that ran."""
        return sum(row.dense_macs or 0 for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-accumulates afterwards."""
        return sum(row.macs or 0 for row in self.rows)

    @property
    def proxy_bytes(self) -> int:
        """Memory of all proxies N in float32 while indices train; an optimiser may keep as much."""
        return 4 * sum(row.proxy_params for row in self.rows)


def unit_bits(shape: UnitShape, spec: LegoSpec) -> int:
    """Ideal bits of one Lego unit under the storage dtypes of `spec`."""
    coefficient_bits = STORAGE_BITS[spec.coefficients_dtype] if spec.coefficients else 0
    scale_bits = SCALE_BITS.get(spec.dtype, 0)
    return lego_bits(shape, STORAGE_BITS[spec.dtype], coefficient_bits, scale_bits)


def plan(
    model: nn.Module, spec: LegoSpec | None = None, example_input: Tensor | Any | None = None
) -> Plan:
    """Decide what a conversion of `model` by `spec` replaces; the model is not touched.

    One forward pass in eval mode finds the order of the layers and their output sizes.

    Args:
        model: the dense network.
        spec: what is asked for; by default m=0.5, o=2, k=1 with coefficients.
        example_input: an input (N, c, H, W), or a tuple of arguments; by default one zero image of
            the size that the model's own configuration names.

    Raises:
        PlanError: the model has no conv, or it is converted already.
        SpecError: `o` divides the input channels of no layer.
        PatternError: a pattern of the spec matches nothing.
    """
    spec = LegoSpec() if spec is None else spec
    if any(isinstance(m, LegoModule) for m in model.modules()):
        raise PlanError("the model holds Lego modules already; plan on the original network")
    reparameterize = has_training_form(model)
    if reparameterize:
        model = deployed_copy(model)
    found = list(_layers(model))
    wanted = (nn.Conv2d, nn.Linear) if spec.linear else (nn.Conv2d,)
    if not any(isinstance(layer, wanted) for _, layer in found):
        raise PlanError(
            f"{type(model).__name__} has no Conv2d layer, so there is nothing to convert"
            + (" (--linear takes Linear layers in)" if found and not spec.linear else "")
        )
    check_patterns(spec, [name for name, _ in found])
    calls, input_shape, note = probe(model, example_input)
    order = {id(layer): calls[layer].order for _, layer in found if layer in calls}
    last = len(found)  # while a list is sorted it is empty
    found.sort(key=lambda pair: order.get(id(pair[1]), last))
    kept = _exclusions(model, found, calls)
    owners = Counter(id(layer._parameters.get("weight")) for _, layer in found)
    tied = {weight for weight, count in owners.items() if count > 1}
    rows = []
    counted: set[int] = set()
    for name, layer in found:
        row = _layer_plan(name, layer, spec, kept.get(name), calls, tied)
        weight = layer._parameters.get("weight")
        if weight is not None and id(weight) in counted:  # a shared weight counts once
            row = replace(row, dense_params=0, dense_bits=0)
        counted.add(id(weight))
        rows.append(row)
    _check_splits(spec, rows)
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


def has_training_form(model: nn.Module) -> bool:
    """Whether blocks of timm's have a deployed form (RepVGG, MobileOne, FastViT, LeViT, ...).

    Classes from elsewhere are left alone: a method called `fuse` may mean anything there. A block
    that has its `reparam_conv` is deployed already, and FastViT's would fail if asked again.
    """
    methods = ("fuse", "reparameterize", "switch_to_deploy")
    return any(
        type(module).__module__.startswith("timm.")
        and getattr(module, "reparam_conv", None) is None
        and any(callable(getattr(type(module), name, None)) for name in methods)
        for module in model.modules()
    )


def deployed_copy(model: nn.Module) -> nn.Module:
    """Copy a network and bring the copy into its deployed form."""
    copied = copy.deepcopy(model).eval()
    if any(parameter.is_meta for parameter in copied.parameters()):
        copied = copied.to_empty(device="cpu")  # fusing computes with the values
    with torch.random.fork_rng(devices=[]):  # fused layers draw initial weights
        return reparameterize_model(copied, inplace=True)  # type: ignore[no-any-return]


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that has a conv's or Linear's weight, once, with its first name."""
    for name, module in model.named_modules():
        quantized = type(module).__module__.startswith("torch.ao.")
        if isinstance(module, WEIGHT_LAYERS) or (quantized and "Conv" in type(module).__name__):
            yield name, module


def _exclusions(
    model: nn.Module, found: list[tuple[str, nn.Module]], calls: dict[nn.Module, Calls]
) -> dict[str, str]:
    """Reasons, by name, of the layers that the network's own structure keeps dense."""
    convs = [(name, layer) for name, layer in found if isinstance(layer, nn.Conv2d)]
    cfg = model_cfg(model)
    image = default_input(model)
    channels = 0 if image is None else image.shape[1]
    reasons = {}
    for position, (name, layer) in enumerate(convs):
        seen = calls.get(layer)
        if layer.in_channels == layer.groups > 1:
            continue
        if (
            position == 0
            or name in _names(cfg.get("first_conv"))
            or (seen is not None and seen.sees_image)
            or (layer.in_channels == channels and channels <= 4)
        ):
            reasons[name] = "stem: it sees the image"
        elif name in _names(cfg.get("classifier")) or name in _last_of_classifier(convs):
            reasons[name] = "classifier"
    return reasons


def _names(entry: object) -> tuple[str, ...]:
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry) if isinstance(entry, (list, tuple)) else ()


def _last_of_classifier(convs: list[tuple[str, nn.Conv2d]]) -> set[str]:
    """Convs that classify by torchvision's naming: `*classifier`, or the last one inside it."""
    last = {}
    for name, _ in convs:
        path = name.split(".")
        if path[-1].endswith("classifier"):
            last[name] = name
        elif path[0].endswith("classifier"):
            last[path[0]] = name
    return set(last.values())


def _layer_plan(
    name: str,
    layer: nn.Module,
    spec: LegoSpec,
    kept: str | None,
    calls: dict[nn.Module, Calls],
    tied: set[int],
) -> LayerPlan:
    weight = layer._parameters.get("weight")
    seen = calls.get(layer)
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
        if seen is None
        else seen.pixels * _applied(layer, size or _computed(layer)),
        pixels=None if seen is None else seen.pixels,
    )
    named = spec.names_exactly(name)
    reason = _unsupported(layer, tied) or _unwanted(name, layer, spec)
    if reason is None and not named:
        reason = kept or (
            "Linear layer (--linear takes it in)"
            if isinstance(layer, nn.Linear) and not spec.linear
            else None
        )
    if reason is None and isinstance(layer, nn.Conv2d) and layer.in_channels == layer.groups:
        reason = "depthwise: one input channel a group"
    if reason is None:
        ours = spec.for_layer(name)
        shape = unit_shape(row, ours)
        reason = no_gain(shape, ours, row.dense_bits)
        row = replace(row, shape=shape, spec=ours)
    return row if reason is None else replace(row, reason=reason, shape=None, spec=None)


def _computed(layer: nn.Module) -> int:
    """Elements of a weight that is computed at every read, which costs MACs but no parameters."""
    weight = getattr(layer, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else 0


def _applied(layer: nn.Module, size: int) -> int:
    """Weight elements applied at one position; CondConv2d mixes its experts into one weight."""
    return size // layer.num_experts if isinstance(layer, CondConv2d) else size


def _unsupported(layer: nn.Module, tied: set[int]) -> str | None:
    """Why a layer cannot be converted whatever the user says, or None."""
    weight = layer._parameters.get("weight")
    if type(layer).__module__.startswith("torch.ao."):
        return "part of a quantised model"
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return f"{type(layer).__name__} is not supported"
    if isinstance(weight, UninitializedParameter):
        return "lazy layer without weights yet: run the model once"
    if weight is None:
        return "its weight is computed (parametrisation or weight norm), not a parameter"
    if id(weight) in tied:
        return "its weight is shared with another layer"
    return None


def _unwanted(name: str, layer: nn.Module, spec: LegoSpec) -> str | None:
    if spec.only and not any(matches(pattern, name) for pattern in spec.only):
        return "not named by --only"
    if any(matches(pattern, name) for pattern in spec.skip):
        return "skipped by name"
    return None


def unit_shape(row: LayerPlan, spec: LegoSpec) -> UnitShape:
    """Sizes of a row's unit; where o does not divide, the padding or smaller o of fewest bits."""
    n_out, channels = row.weight_shape[:2]
    kernel = row.weight_shape[2:] or (1, 1)

    def shape(n_split: int) -> UnitShape:
        n_lego = min(max(1, round(spec.m * n_out)), n_split * n_out)
        # A bank that holds every fragment is exact with one term.
        n_terms = 1 if n_lego == n_split * n_out else min(spec.k, n_lego)
        return UnitShape(
            n_out, channels, (kernel[0], kernel[1]), row.groups, n_lego, n_split, n_terms
        )

    if channels % spec.o == 0:
        return shape(spec.o)
    # A split that leaves its last fragment all padding is the same as a smaller one.
    splits = [
        o for o in range(1, min(spec.o, channels) + 1) if (o - 1) * -(-channels // o) < channels
    ]
    return min((shape(o) for o in splits), key=lambda s: (unit_bits(s, spec), -s.n_split))


def no_gain(shape: UnitShape, spec: LegoSpec, dense_bits: int) -> str | None:
    """Why a unit of these sizes does not pay, or None."""
    if spec.allow_expansion:
        return None
    if shape.n_lego < shape.n_split:
        return f"too small: {shape.n_lego} Lego filters for {shape.n_split} splits"
    bits = unit_bits(shape, spec)
    if bits > dense_bits:
        return f"no saving: {bits:,} bits as Lego unit, {dense_bits:,} dense"
    return None


def _check_splits(spec: LegoSpec, rows: Sequence[LayerPlan]) -> None:
    """Raise SpecError if `o` divides the input channels of no layer that is to be converted."""
    wanted = [r for r in rows if r.shape is not None and r.spec is not None]
    if wanted and all(r.shape.channels % r.spec.o for r in wanted if r.shape and r.spec):
        channels = sorted({r.shape.channels for r in wanted if r.shape})
        good = [o for o in range(1, max(channels) + 1) if any(c % o == 0 for c in channels)][:8]
        raise SpecError(
            f"o={spec.o} divides the input channels of no layer (they are "
            f"{', '.join(map(str, channels[:8]))}{', ...' if len(channels) > 8 else ''}); "
            f"values that divide some: {', '.join(map(str, good))}"
        )
