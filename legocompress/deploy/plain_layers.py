"""The deployed layers other than convs: max pooling, mean of each map, linear.

Each can run by PyTorch or by a kernel of this package. PyTorch's threads keep spinning for some
milliseconds after each job, on the cores that the kernels' threads need, so a network that never
calls them gains more than these layers alone show.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from legocompress import kernels
from legocompress.deploy.activation import Activation, activate_
from legocompress.state.deployment import PlainRoute

PLAIN_ROUTES: tuple[PlainRoute, ...] = ("plain", "kernel")


class PlainLayer(nn.Module, ABC):
    """A layer with two routes: 'plain' is PyTorch's operator, 'kernel' one of this package."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.route: PlainRoute = "plain"

    def forward(self, x: Tensor) -> Tensor:
        """Run by the route in use."""
        return self.run(self.route, x)

    def run(self, route: PlainRoute, x: Tensor) -> Tensor:
        """Run by a route; what the kernel cannot run, PyTorch does."""
        if (
            route == "kernel"
            and type(x) is Tensor
            and x.dtype == torch.float32
            and x.device.type == "cpu"
            and x.is_contiguous()
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            and self.kernel_supports(x)
        ):
            return self.run_kernel(x)
        return self.run_plain(x)

    @abstractmethod
    def kernel_supports(self, x: Tensor) -> bool:
        """Whether the kernel can run a contiguous float32 input on the CPU."""

    @abstractmethod
    def run_kernel(self, x: Tensor) -> Tensor:
        """Run by the kernel."""

    @abstractmethod
    def run_plain(self, x: Tensor) -> Tensor:
        """Run by PyTorch."""


class DeployedPool(PlainLayer):
    """Max pooling, (N, c, H, W) to (N, c, H', W'); both routes give the same bits.

    PyTorch's own is slow on NCHW maps.
    """

    def __init__(self, name: str, layer: nn.MaxPool2d) -> None:
        super().__init__(name)
        kernel, stride, padding, dilation = (
            (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
            for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
        self.ceil_mode = layer.ceil_mode
        self.geometry = (kernel, stride, padding, dilation)

    def kernel_supports(self, x: Tensor) -> bool:
        """Whether the pooling window is small enough, and sizes are rounded down."""
        small = max(self.geometry[0]) <= kernels.MAX_POOL_KERNEL
        return small and not self.ceil_mode and kernels.available()

    def run_kernel(self, x: Tensor) -> Tensor:
        """Pool by the kernel."""
        return kernels.max_pool2d(x, *self.geometry)

    def run_plain(self, x: Tensor) -> Tensor:
        """Pool by PyTorch."""
        return F.max_pool2d(x, *self.geometry, self.ceil_mode)


class DeployedMean(PlainLayer):
    """The mean of each map, (N, c, H, W) to (N, c, 1, 1)."""

    def kernel_supports(self, x: Tensor) -> bool:
        """Whether the input is a batch of maps that is not empty."""
        return x.dim() == 4 and x.numel() > 0 and kernels.available()

    def run_kernel(self, x: Tensor) -> Tensor:
        """Average by the kernel."""
        return kernels.global_mean(x)

    def run_plain(self, x: Tensor) -> Tensor:
        """Average by PyTorch."""
        return F.adaptive_avg_pool2d(x, 1)


class DeployedLinear(PlainLayer):
    """A linear layer with the activation after it, (N, c) to (N, n); its weights are not copied.

    At batch 1 PyTorch reads the weights on one thread only; the kernel uses all threads.
    """

    def __init__(self, name: str, layer: nn.Linear, activation: Activation = "none") -> None:
        super().__init__(name)
        self.weight = layer.weight.detach()
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.activation = activation

    def kernel_supports(self, x: Tensor) -> bool:
        """Whether input and weights are plain matrices of one dtype."""
        weights = [t for t in (self.weight, self.bias) if t is not None]
        plain = all(t.dtype == x.dtype and t.is_contiguous() and t.numel() for t in weights)
        return x.dim() == 2 and plain and kernels.available()

    def run_kernel(self, x: Tensor) -> Tensor:
        """Multiply by the kernel."""
        return kernels.linear(x, self.weight, self.bias, self.activation)

    def run_plain(self, x: Tensor) -> Tensor:
        """Multiply by PyTorch."""
        return activate_(F.linear(x, self.weight, self.bias), self.activation)
