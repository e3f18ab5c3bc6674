"""Run a model once to learn in which order its layers run, how often, and on which sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from legocompress.models.inputs import Arguments, to_arguments

WEIGHT_LAYERS: tuple[type[nn.Module], ...] = (_ConvNd, nn.Linear, CondConv2d)


@dataclass
class Calls:
    """What one layer did during the pass.

    `pixels` counts, over all calls and images, the positions at which the whole weight is applied.
    A dense layer costs pixels * (number of weight elements) multiply-accumulates.
    """

    order: int
    pixels: int
    sees_image: bool


@dataclass(frozen=True)
class Probe:
    """What `probe_call` has learned.

    Where no forward pass succeeded, `arguments` is None and `note` says why. `input_shape` is None
    where the first argument is not a tensor.
    """

    calls: dict[nn.Module, Calls] = field(default_factory=dict)
    arguments: Arguments | None = None
    input_shape: tuple[int, ...] | None = None
    note: str | None = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode without gradients, and restore the flags at the end."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def probe(
    model: nn.Module, example_input: Any = None
) -> tuple[dict[nn.Module, Calls], tuple[int, ...] | None, str | None]:
    """Run the model once and record the calls of each conv and Linear.

    Args:
        model: any network.
        example_input: a tensor (N, c, H, W), a tuple of arguments or a dict of keyword arguments;
            by default zeros of the size in the configuration of the model, tried as one batch, as a
            list of images (detectors) and as a pair (optical flow).

    Returns:
        The calls by layer, the shape of the input, and a note if no input was accepted. In that
        case there are no calls, and order and costs are unknown.

    Raises:
        UsageError: the model does not take such arguments.
    """
    probed = probe_call(model, example_input)
    return probed.calls, probed.input_shape, probed.note


def probe_call(model: nn.Module, example_input: Any = None) -> Probe:
    """Do what `probe` does, and return also the arguments that the model was run on."""
    if any(is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        return Probe(
            note="lazy layers have no weights yet, so costs are unknown: run the model once"
        )
    if example_input is not None:
        arguments = to_arguments(model, example_input)
        first = next(iter((*arguments.args, *arguments.kwargs.values())), None)
        shape = tuple(first.shape) if isinstance(first, Tensor) else None
        return Probe(_run(model, arguments), arguments, shape)
    image = default_input(model)
    if image is None:
        return Probe(note="the model has no parameters to take a device from; costs are unknown")
    faults = []
    for args in _default_arguments(model, image):
        try:
            first = args[0] if isinstance(args[0], Tensor) else image
            return Probe(_run(model, Arguments(args)), Arguments(args), tuple(first.shape))
        # A network may refuse an input with any exception; then the next input is tried.
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}".splitlines()[0][:200])
    return Probe(
        note=f"no forward pass on zeros of shape {tuple(image.shape)} succeeded ({faults[0]}); "
        "MACs are unknown and the first conv registered counts as the stem"
    )


def _default_arguments(model: nn.Module, image: Tensor) -> list[tuple[Any, ...]]:
    """List the inputs to try: one batch, a list of images (detectors), a pair (optical flow)."""
    tried: list[tuple[Any, ...]] = [(image,), (list(image),), (image, image)]
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels != image.shape[1]:
        # The network may have been created with other in_chans than its configuration says.
        tried.append((image.new_zeros(1, first.in_channels, *image.shape[2:]),))
    return tried


def default_input(model: nn.Module) -> Tensor | None:
    """Return one zero image (1, c, H, W), of the size in the model's configuration or else 224."""
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    if reference is None:
        return None
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    size = (first.in_channels if first is not None else 3, 224, 224)
    cfg = model_cfg(model)
    named = cfg.get("test_input_size") if cfg.get("input_size") is None else cfg["input_size"]
    if named:
        # in_chans may differ from the configuration; the first conv has the right number.
        size = (named[0] if first is None or first.in_channels > 4 else size[0], *named[1:])
    return torch.zeros(1, *size, device=reference.device, dtype=reference.dtype)


def model_cfg(model: nn.Module) -> dict[str, Any]:
    """The `pretrained_cfg` of a model as a dict; empty where there is none."""
    cfg = getattr(model, "pretrained_cfg", None)
    return dict(cfg) if isinstance(cfg, dict) else {}


def _run(model: nn.Module, arguments: Arguments) -> dict[nn.Module, Calls]:
    calls: dict[nn.Module, Calls] = {}
    values = (*arguments.args, *arguments.kwargs.values())

    def record(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not inputs:
            return
        sees_image = any(inputs[0] is value for value in values)
        layer_calls = calls.setdefault(layer, Calls(len(calls), 0, sees_image))
        layer_calls.pixels += _positions(layer, inputs[0], output)
        layer_calls.sees_image |= sees_image

    hooks = [
        module.register_forward_hook(record)
        for module in model.modules()
        if isinstance(module, WEIGHT_LAYERS)
    ]
    try:
        # Run on copies of the buffers, since some change in eval mode too (counters, observers).
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        with evaluating(model):
            functional_call(model, buffers, arguments.args, arguments.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _positions(layer: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(layer, _ConvTransposeNd):
        return x.numel() // layer.in_channels
    if isinstance(layer, nn.Linear):
        return y.numel() // layer.out_features
    assert isinstance(layer, (_ConvNd, CondConv2d))
    return y.numel() // int(layer.out_channels)
