"""Which layers can be converted, and which should stay dense by default."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from legocompress.lego.plain import is_plain_parameter
from legocompress.models.probe import Calls, default_input, model_cfg
from legocompress.spec import LegoSpec, matches

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def find_structural_exclusions(
    model: nn.Module, layers: list[tuple[str, nn.Module]], calls: dict[nn.Module, Calls]
) -> dict[str, str]:
    """Find the layers that stay dense because of their place in the network: name -> reason."""
    convs = [(name, layer) for name, layer in layers if isinstance(layer, nn.Conv2d)]
    cfg = model_cfg(model)
    image = default_input(model)
    channels = 0 if image is None else image.shape[1]
    reasons = {}
    for position, (name, layer) in enumerate(convs):
        layer_calls = calls.get(layer)
        if layer.in_channels == layer.groups > 1:
            continue
        if (
            position == 0
            or name in _names(cfg.get("first_conv"))
            or (layer_calls is not None and layer_calls.sees_image)
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
    """Convs that are classifiers by torchvision's naming: `*classifier`, or the last one in it."""
    last = {}
    for name, _ in convs:
        path = name.split(".")
        if path[-1].endswith("classifier"):
            last[name] = name
        elif path[0].endswith("classifier"):
            last[path[0]] = name
    return set(last.values())


def explain_unsupported(layer: nn.Module, shared: dict[int, str]) -> str | None:
    """Say why a layer cannot be converted at all; None if it can.

    `shared` is what `find_shared_weights` found.
    """
    weight = layer._parameters.get("weight")
    if type(layer).__module__.startswith("torch.ao."):
        return "part of a quantised model"
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return f"{type(layer).__name__} is not supported"
    if isinstance(weight, UninitializedParameter):
        return "lazy layer without weights yet: run the model once"
    if weight is None or hasattr(type(layer), "weight"):
        return "its weight is computed (parametrisation or weight norm), not a parameter"
    if id(layer) in shared:
        return f"its weight is shared: with {shared[id(layer)]}"
    return _explain_unsupported_values(weight)


def _explain_unsupported_values(weight: Tensor) -> str | None:
    """Say why the values of a weight cannot be clustered; None if they can."""
    if not is_plain_parameter(weight):
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if weight.layout != torch.strided:
        return f"{_name(weight.layout)} weights are not supported"
    if weight.is_complex():
        return "complex weights are not supported"
    if weight.dtype not in DTYPES:
        return f"{_name(weight.dtype)} weights are not supported"
    return None


def _name(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.").removeprefix("_")


def explain_unwanted(name: str, layer: nn.Module, spec: LegoSpec) -> str | None:
    """Say why the patterns of the user leave this layer dense; None if they do not."""
    if spec.only and not any(matches(pattern, name) for pattern in spec.only):
        return "not named by --only"
    if any(matches(pattern, name) for pattern in spec.skip):
        return "skipped by name"
    return None
