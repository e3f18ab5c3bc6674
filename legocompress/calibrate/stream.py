"""Record the convs that one layer runs, as PyTorch sees them, and cut patches of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Call:
    """One conv: padded input (N, c, H, W), effective weight (n, c/g, kh, kw), and sizes.

    They include whatever the class of the layer does to input and weight before the conv, such as
    padding of any mode and weight standardisation.
    """

    x: Tensor
    weight: Tensor
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the output."""
        sides = zip(
            self.x.shape[2:], self.weight.shape[2:], self.stride, self.dilation, strict=True
        )
        height, width = ((side - d * (k - 1) - 1) // s + 1 for side, k, s, d in sides)
        return height, width

    def patches(self, image: Tensor, position: Tensor, channels: int) -> Tensor:
        """Input patches (P, g, channels * kh * kw), zero-padded up to `channels`.

        Args:
            image: (P,) number of the image.
            position: (P,) number of the output pixel, row by row.
            channels: channels per group.
        """
        (height, width), (kh, kw) = self.size, self.weight.shape[2:]
        (sh, sw), (dh, dw) = self.stride, self.dilation
        x = self.x.contiguous()
        per_image, per_channel, per_row, per_pixel = x.stride()
        windows = x.as_strided(
            (len(x), height, width, x.shape[1], kh, kw),
            (per_image, per_row * sh, per_pixel * sw, per_channel, per_row * dh, per_pixel * dw),
        )
        taken = windows[image, position // width, position % width]
        taken = taken.reshape(len(taken), self.groups, -1, kh, kw)
        return F.pad(taken, (0, 0, 0, 0, 0, channels - taken.shape[2])).flatten(2)


class _Reached(Exception):
    """Ends a forward pass after the last call of a layer."""


class _Catch(TorchFunctionMode):
    """Records every conv2d and linear that runs inside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = False
        self.calls: list[Call] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.entered and func is F.conv2d:
            self.calls.append(_conv(*args, **kwargs))
        elif self.entered and func is F.linear:
            self.calls.append(_linear(*args, **kwargs))
        return func(*args, **kwargs)


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Call:
    steps = _pair(dilation)
    reach = [d * (k - 1) for d, k in zip(steps, weight.shape[2:], strict=True)]
    if padding == "same":
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in _pair(0 if padding == "valid" else padding)]
    x = F.pad(input, (*sides[1], *sides[0]))
    return Call(x.detach(), weight.detach(), _pair(stride), steps, groups)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    x = input.detach().reshape(-1, input.shape[-1], 1, 1)
    return Call(x, weight.detach()[:, :, None, None], (1, 1), (1, 1), 1)


def run_to(model: nn.Module, layer: nn.Module, n_calls: int, images: Tensor) -> list[Call]:
    """Run `model` on images until `layer` has run `n_calls` times; return its convs."""
    calls: list[Call] = []
    left = n_calls

    def on_call(_: nn.Module, convs: list[Call]) -> None:
        nonlocal left
        calls.extend(convs)
        left -= 1
        if not left:
            raise _Reached

    with suppress(_Reached):
        hear_calls(model, [layer], images, on_call)
    return calls


def hear_calls(
    model: nn.Module,
    layers: Iterable[nn.Module],
    images: Tensor,
    on_call: Callable[[nn.Module, list[Call]], None],
) -> None:
    """Run `model` on images, and call `on_call(layer, convs)` after each call of a layer."""
    catch = _Catch()

    def enter(*_: object) -> None:
        catch.entered = True

    def leave(layer: nn.Module, *_: object) -> None:
        catch.entered = False
        convs, catch.calls = catch.calls, []
        on_call(layer, convs)

    hooks = []
    for layer in layers:
        hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        with catch, torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
