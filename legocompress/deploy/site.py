"""A deployed layer: a conv with its norm, activation and residual sum, and the routes it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, FrozenBatchNormAct2d, pad_same
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from legocompress import kernels
from legocompress.lego.algebra import assemble, merge_by_table, slot_table, split_transform_merge
from legocompress.lego.module import LegoModule, replaced_class
from legocompress.lego.shape import UnitShape
from legocompress.lego.unit import LegoUnit
from legocompress.state.deployment import ConvRoute, Format

Activation = Literal["none", "relu", "relu6", "silu"]
# Of input, residual, and whether the residual's memory is free for the output.
Runner = Callable[[Tensor, Tensor | None, bool], Tensor]
FOLDABLE_NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, FrozenBatchNormAct2d, FrozenBatchNorm2d,
)  # fmt: skip
LAYOUT: dict[Format, torch.memory_format] = {
    "nchw": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
ONEDNN_ACTIVATION: dict[Activation, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
}


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody listens to the module's calls, or has given it another forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def is_site(layer: nn.Module, heard: bool = False) -> bool:
    """Whether a layer is a conv of known computation that nobody listens to, or may be `heard`."""
    if not isinstance(layer, nn.Conv2d) or (is_hooked(layer) and not heard):
        return False
    base = replaced_class(layer) if isinstance(layer, LegoModule) else type(layer)
    return base.forward in (nn.Conv2d.forward, Conv2dSame.forward)


def is_foldable(norm: nn.Module) -> bool:
    """Whether the norm is, in eval mode, a scale and a shift of each channel."""
    known = any(type(norm).forward is kind.forward for kind in FOLDABLE_NORMS)
    return (
        known
        and isinstance(norm, FOLDABLE_NORMS)
        and not is_hooked(norm)
        and not norm.training
        and norm.running_mean is not None
        and isinstance(getattr(norm, "drop", None), (nn.Identity, nn.Dropout, type(None)))
    )


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """The norm in eval mode as y = scale * x + shift, two (n,) tensors in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


@dataclass(frozen=True)
class Geometry:
    """Where a conv's filters are put; `pad` is applied by itself where a conv cannot."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    pad: tuple[int, ...] = ()
    mode: str = "constant"
    same: bool = False

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Geometry:
        """The geometry of a conv, with 'same' and 'valid' as numbers."""
        kernel, stride, dilation = (
            (int(pair[0]), int(pair[1]))
            for pair in (layer.kernel_size, layer.stride, layer.dilation)
        )
        plain = cls(kernel, stride, (0, 0), dilation, layer.groups)
        if isinstance(layer, Conv2dSame):
            return replace(plain, same=True)
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        if layer.padding_mode != "zeros":
            return replace(plain, pad=(left, right, top, bottom), mode=layer.padding_mode)
        if left != right or top != bottom:
            return replace(plain, pad=(left, right, top, bottom))
        return replace(plain, padding=(top, left))

    def place(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, padded if need be, and the padding that is left to the conv."""
        if self.same:
            high, wide = self._missing(x, 0), self._missing(x, 1)
            if high % 2 == 0 and wide % 2 == 0:
                return x, (high // 2, wide // 2)
            return pad_same(x, self.kernel, self.stride, self.dilation), (0, 0)
        if any(self.pad):
            return F.pad(x, self.pad, self.mode), (0, 0)
        return x, self.padding

    def _missing(self, x: Tensor, axis: int) -> int:
        size, stride = x.shape[2 + axis], self.stride[axis]
        reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
        return max(0, (-(-size // stride) - 1) * stride + reach - size)


def activate_(y: Tensor, activation: Activation) -> Tensor:
    """Apply an activation in place."""
    if activation == "relu":
        return torch.relu_(y)
    if activation == "relu6":
        return F.hardtanh(y, 0.0, 6.0, inplace=True)
    return F.silu(y, inplace=True) if activation == "silu" else y


class ConvSite(nn.Module):
    """A conv with what follows it: y = activation(norm(conv(x)) + residual).

    The norm is folded exactly: into the coefficients and the bias of a Lego unit (a slot's
    coefficient belongs to one output channel), into the weight and the bias of a dense conv.
    It starts on the route 'assemble'; `prepare` and `use` bring it to another.
    """

    def __init__(
        self, name: str, layer: nn.Conv2d, norm: nn.Module | None, activation: Activation
    ) -> None:
        super().__init__()
        self.name = name
        self.is_lego = isinstance(layer, LegoModule)
        self.geometry = Geometry.of(layer)
        self.activation = activation
        self.route: ConvRoute = "assemble"
        self.format: Format = "nchw"
        self._runners: dict[tuple[ConvRoute, Format], Runner] = {}
        self._shape: UnitShape
        self._index: Tensor
        self._fold(layer, norm)

    @torch.no_grad()
    def _fold(self, layer: nn.Conv2d, norm: nn.Module | None) -> None:
        scale = shift = None
        bias = None if layer.bias is None else layer.bias.detach()
        if norm is not None:
            scale, shift = scale_and_shift(norm)
            bias = shift if bias is None else shift + bias.double() * scale
        self._coefficients: Tensor | None = None
        if isinstance(layer, LegoModule):
            self._shape, filters, self._index = layer.lego_shape, layer.lego_filters, layer.index
            if layer.coefficients is not None:
                self._coefficients = layer.coefficients.detach()
            if scale is not None:
                gains = scale[:, None].expand(self._index.shape)
                if self._coefficients is not None:
                    gains = gains * self._coefficients.double()
                self._coefficients = gains.to(filters.dtype).contiguous()
        else:
            filters = layer.weight
            n_out, channels = filters.shape[:2]
            kernel, groups = self.geometry.kernel, self.geometry.groups
            # The dense weight as a unit: one split, each output channel its own filter.
            self._shape = UnitShape(n_out, channels, kernel, groups, n_out, 1, 1)
            self._index = torch.arange(n_out, device=filters.device).reshape(1, n_out, 1)
            if scale is not None:
                filters = (filters.double() * scale[:, None, None, None]).to(filters.dtype)
        self._filters = filters.detach().contiguous()
        self._bias = None if bias is None else bias.to(filters.dtype)

    @property
    def is_depthwise(self) -> bool:
        """Whether it is a dense layer whose output channels read one input channel each."""
        return not self.is_lego and self.geometry.groups > 1 and self._shape.channels == 1

    def weight(self) -> Tensor:
        """The dense weight (n, c/g, kh, kw) with the norm folded in."""
        if not self.is_lego:
            return self._filters
        return assemble(self._shape, LegoUnit(self._filters, self._index, self._coefficients))

    def routes(self, device: torch.device, dtype: torch.dtype) -> tuple[ConvRoute, ...]:
        """The routes that could run this layer on inputs of this device and dtype."""
        found: list[ConvRoute] = ["assemble"]
        cpu = device.type == "cpu" and dtype == torch.float32
        if cpu and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            found.append("onednn")
        if cpu and kernels.available():
            g = self.geometry
            forms = (("fused", "direct"), ("winograd", "winograd"))
            for route, transform in forms[:1] if self.is_depthwise else forms:
                if kernels.supports(self._shape, g.stride, g.padding, g.dilation, transform):
                    found.append(route)  # type: ignore[arg-type]
        if self.is_lego:
            found.extend(["table", "reference"])
        return tuple(found)

    @property
    def unit(self) -> tuple[UnitShape, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Sizes, filters, index, coefficients and bias, the norm folded in; until settled."""
        return self._shape, self._filters, self._index, self._coefficients, self._bias

    def prepare(self, route: ConvRoute, layout: Format, x: Tensor) -> None:
        """Pack what a route needs; `x` is an input of the size to come.

        Raises:
            RuntimeError: the library refuses the layer.
        """
        make: dict[ConvRoute, Callable[[Format, Tensor], Runner]] = {
            "assemble": self._assembled,
            "onednn": self._onednn,
            "reference": self._reference,
            "table": self._table,
            "fused": lambda f, x: (
                self._depthwise(f) if self.is_depthwise else self._kernel(f, "direct")
            ),
            "winograd": lambda f, x: self._kernel(f, "winograd"),
        }
        if (route, layout) not in self._runners:
            self._runners[route, layout] = make[route](layout, x)

    def use(self, route: ConvRoute, layout: Format) -> None:
        """Run by a prepared route from now on."""
        self.route, self.format = route, layout
        self.run = self._runners[route, layout]

    def runner(self, route: ConvRoute, layout: Format) -> Runner:
        """What a prepared route runs."""
        return self._runners[route, layout]

    def keep(self, routes: set[ConvRoute], layout: Format) -> None:
        """Forget the other prepared routes of a format."""
        self._runners = {
            (route, known): run
            for (route, known), run in self._runners.items()
            if known != layout or route in routes
        }

    def settle(self) -> None:
        """Keep nothing but the route in use."""
        self._runners = {(self.route, self.format): self.run}
        del self._filters, self._index, self._coefficients

    def forward(self, x: Tensor, residual: Tensor | None = None, spare: bool = False) -> Tensor:
        """Run the layer: x (N, c, H, W) and residual (N, n, H', W') give (N, n, H', W').

        Nobody reads a `spare` residual any more, so the output may be written in its place.
        """
        return self.run(x, residual, spare)

    def _finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        # The sum is the module's own, so it may be changed in place.
        if residual is not None:
            y += residual
        return activate_(y, self.activation)

    def _assembled(self, layout: Format, _: Tensor) -> Runner:
        g, bias, memory = self.geometry, self._bias, LAYOUT[layout]
        weight = self.weight().contiguous(memory_format=memory)

        def run(x: Tensor, residual: Tensor | None, spare: bool = False) -> Tensor:
            x, padding = g.place(x)
            x = x.contiguous(memory_format=memory)
            y = F.conv2d(x, weight, bias, g.stride, padding, g.dilation, g.groups)
            return self._finish(y, residual)

        return run

    def _onednn(self, layout: Format, x: Tensor) -> Runner:
        g, bias = self.geometry, self._bias
        strides = (list(g.stride), list(g.dilation), g.groups)
        x, padding = g.place(x)
        pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # type: ignore[attr-defined]
        weight = pack(
            self.weight().contiguous(memory_format=torch.channels_last).to_mkldnn(),
            list(padding), *strides, list(x.shape),
        )  # fmt: skip
        alone = torch.ops.mkldnn._convolution_pointwise.default
        summed = torch.ops.mkldnn._convolution_pointwise.binary
        name, scalars = ONEDNN_ACTIVATION[self.activation]
        fuses_both = self.activation in ("none", "relu")
        after = "relu" if self.activation == "relu" else None

        def run(x: Tensor, residual: Tensor | None, spare: bool = False) -> Tensor:
            x, padding = g.place(x)
            if residual is None:
                y = alone(x, weight, bias, padding, *strides, name, scalars, "")
            elif fuses_both:
                both: Any = (bias, padding, *strides, "add", 1.0, after, [], "")
                y = summed(x, residual, weight, *both)
            else:
                y = alone(x, weight, bias, padding, *strides, "none", [], "")
                y = self._finish(y, residual)
            # oneDNN answers in channels_last.
            return y.contiguous() if layout == "nchw" else y  # type: ignore[no-any-return]

        return run

    def _reference(self, layout: Format, _: Tensor) -> Runner:
        g, memory = self.geometry, LAYOUT[layout]
        filters = self._filters.contiguous(memory_format=memory)
        shape, index, gains, bias = self._shape, self._index, self._coefficients, self._bias

        def run(x: Tensor, residual: Tensor | None, spare: bool = False) -> Tensor:
            x, padding = g.place(x)
            x = x.contiguous(memory_format=memory)
            y = split_transform_merge(
                shape, LegoUnit(filters, index, gains), x, bias, g.stride, padding, g.dilation
            )
            return self._finish(y, residual)

        return run

    def _table(self, layout: Format, _: Tensor) -> Runner:
        g, memory = self.geometry, LAYOUT[layout]
        shape, filters, index, gains, bias = self.unit
        tables: dict[int, tuple[Tensor, Tensor | None]] = {}

        def run(x: Tensor, residual: Tensor | None, spare: bool = False) -> Tensor:
            x, padding = g.place(x)
            batch = int(x.shape[0])
            if batch not in tables:
                tables.clear()
                tables[batch] = slot_table(shape, LegoUnit(filters, index, gains), batch)
            y = merge_by_table(
                shape, x, filters, *tables[batch], bias, g.stride, padding, g.dilation
            )
            return self._finish(y.contiguous(memory_format=memory), residual)

        return run

    def _depthwise(self, layout: Format) -> Runner:
        g, bias, memory, activation = self.geometry, self._bias, LAYOUT[layout], self.activation
        weight = self._filters

        def run(x: Tensor, residual: Tensor | None, spare: bool = False) -> Tensor:
            x, padding = g.place(x)
            conv = (g.stride, padding, g.dilation)
            if residual is None:
                y = kernels.depthwise_conv2d(x.contiguous(), weight, bias, *conv, activation)
            else:
                y = self._finish(
                    kernels.depthwise_conv2d(x.contiguous(), weight, bias, *conv), residual
                )
            return y.contiguous(memory_format=memory)

        return run

    def _kernel(self, layout: Format, transform: str) -> Runner:
        g, bias, memory, activation = self.geometry, self._bias, LAYOUT[layout], self.activation
        packed = kernels.pack(
            self._shape, self._filters, self._index, self._coefficients,
            transform=transform, stride=g.stride[0],
        )  # fmt: skip
        merge = kernels.lego_conv2d

        def run(x: Tensor, residual: Tensor | None, spare: bool = False) -> Tensor:
            x, padding = g.place(x)
            x = x.contiguous(memory_format=memory)
            if residual is not None:
                residual = residual.contiguous(memory_format=memory)
            return merge(
                x, packed, bias, residual, g.stride, padding, g.dilation, activation, spare
            )

        return run
