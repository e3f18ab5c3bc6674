"""Deployed layers that are no convs: max and mean pooling, and linear layers.

PyTorch's threads wait actively for milliseconds after each job, on the cores of the kernels' own
threads: a network that never calls them is faster by more than its layers are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legocompress import kernels
from legocompress.deploy.site import Activation, activate_
from legocompress.state.deployment import PoolRoute


class PlainSite(nn.Module, ABC):
    """A layer with a route 'plain', PyTorch's own, and a route 'kernel'."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.route: PoolRoute = "plain"

    def forward(self, x: Tensor) -> Tensor:
        """Run by the route in use."""
        return self.run(self.route, x)

    def run(self, route: PoolRoute, x: Tensor) -> Tensor:
        """Run by a route of either name."""
        if (
            route == "kernel"
            and type(x) is Tensor
            and x.dtype == torch.float32
            and x.device.type == "cpu"
            and x.is_contiguous()
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            and self.fits(x)
        ):
            return self.fast(x)
        return self.plain(x)

    @abstractmethod
    def fits(self, x: Tensor) -> bool:
        """Whether the kernel's route can run such an input."""

    @abstractmethod
    def fast(self, x: Tensor) -> Tensor:
        """The kernel's route."""

    @abstractmethod
    def plain(self, x: Tensor) -> Tensor:
        """PyTorch's own."""


class PoolSite(PlainSite):
    """A max pooling; PyTorch's own is slow on NCHW maps. Both routes give the same bits."""

    def __init__(self, name: str, layer: nn.MaxPool2d) -> None:
        super().__init__(name)
        kernel, stride, padding, dilation = (
            (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
            for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
        self.ceil_mode = layer.ceil_mode
        self.geometry = (kernel, stride, padding, dilation)

    def fits(self, x: Tensor) -> bool:
        """Whether the compiled kernel pools such a map."""
        small = max(self.geometry[0]) <= kernels.MAX_POOL_KERNEL
        return small and not self.ceil_mode and kernels.available()

    def fast(self, x: Tensor) -> Tensor:
        """Pool (N, c, H, W) by the compiled kernel."""
        return kernels.max_pool2d(x, *self.geometry)

    def plain(self, x: Tensor) -> Tensor:
        """Pool (N, c, H, W) by PyTorch."""
        return F.max_pool2d(x, *self.geometry, self.ceil_mode)


class MeanSite(PlainSite):
    """The mean of each map."""

    def fits(self, x: Tensor) -> bool:
        """Whether the compiled kernel runs such an input."""
        return x.dim() == 4 and x.numel() > 0 and kernels.available()

    def fast(self, x: Tensor) -> Tensor:
        """(N, c, H, W) to (N, c, 1, 1) by the compiled kernel."""
        return kernels.global_mean(x)

    def plain(self, x: Tensor) -> Tensor:
        """(N, c, H, W) to (N, c, 1, 1) by PyTorch."""
        return F.adaptive_avg_pool2d(x, 1)


class LinearSite(PlainSite):
    """A linear layer on (N, c) with the activation that follows it; its weights are not copied.

    With one input PyTorch's own reads them on one thread.
    """

    def __init__(self, name: str, layer: nn.Linear, activation: Activation = "none") -> None:
        super().__init__(name)
        self.weight = layer.weight.detach()
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.activation = activation

    def fits(self, x: Tensor) -> bool:
        """Whether the compiled kernel runs such an input."""
        weights = [t for t in (self.weight, self.bias) if t is not None]
        plain = all(t.dtype == x.dtype and t.is_contiguous() and t.numel() for t in weights)
        return x.dim() == 2 and plain and kernels.available()

    def fast(self, x: Tensor) -> Tensor:
        """(N, c) to (N, n) by the compiled kernel."""
        return kernels.linear(x, self.weight, self.bias, self.activation)

    def plain(self, x: Tensor) -> Tensor:
        """(N, c) to (N, n) by PyTorch."""
        return activate_(F.linear(x, self.weight, self.bias), self.activation)
