"""The deployed conv: a conv with its norm, activation and residual sum, run by one backend."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from legocompress.deploy.backends import BACKENDS, Runner, possible_routes
from legocompress.deploy.folding import FoldedConv
from legocompress.deploy.hooks import is_hooked
from legocompress.lego.module import computes_plainly
from legocompress.state.deployment import ConvRoute, Format


def is_deployable_conv(layer: nn.Module, allow_hooks: bool = False) -> bool:
    """Whether a layer computes as nn.Conv2d or Conv2dSame does, and (unless allowed) has no hooks.

    A Lego layer counts as the conv that it replaced.
    """
    if not isinstance(layer, nn.Conv2d) or (is_hooked(layer) and not allow_hooks):
        return False
    return computes_plainly(layer)


class DeployedConv(nn.Module):
    """y = activation(norm(conv(x)) + residual), with the norm folded in.

    `prepare` builds a backend, `use` selects it, and `release_others` drops the rest with the
    source tensors. Before the first `use` the layer cannot run.
    """

    route: ConvRoute
    memory_format: Format
    run: Runner

    def __init__(self, name: str, folded: FoldedConv) -> None:
        super().__init__()
        self.name = name
        self.folded = folded  # until `release_others`
        self.is_lego = folded.is_lego
        self.is_depthwise = folded.is_depthwise
        self.geometry = folded.geometry
        self._runners: dict[tuple[ConvRoute, Format], Runner] = {}

    def routes(self, device: torch.device, dtype: torch.dtype) -> tuple[ConvRoute, ...]:
        """The backends that can run this layer on inputs of this device and dtype."""
        return possible_routes(self.folded, device, dtype)

    def prepare(self, route: ConvRoute, memory_format: Format, x: Tensor) -> None:
        """Build a backend for inputs of the size of x, unless it is built already.

        Raises:
            RuntimeError: the backend's library refuses the layer.
        """
        if (route, memory_format) not in self._runners:
            runner = BACKENDS[route].build(self.folded, memory_format, x)
            self._runners[route, memory_format] = runner

    def use(self, route: ConvRoute, memory_format: Format) -> None:
        """Run by a prepared backend from now on."""
        self.route, self.memory_format = route, memory_format
        self.run = self._runners[route, memory_format]

    def runner(self, route: ConvRoute, memory_format: Format) -> Runner:
        """The function that a prepared backend runs."""
        return self._runners[route, memory_format]

    def keep(self, routes: set[ConvRoute], memory_format: Format) -> None:
        """Drop the prepared backends of a memory format other than these."""
        self._runners = {
            key: runner
            for key, runner in self._runners.items()
            if key[1] != memory_format or key[0] in routes
        }

    def release_others(self) -> None:
        """Drop the source tensors and every prepared backend but the one in use."""
        self._runners = {(self.route, self.memory_format): self.run}
        del self.folded

    def is_kernel_call(self, adds_residual: bool) -> bool:
        """Whether the layer, as it runs now, is exactly one kernel call on its own inputs."""
        # The residual of a depthwise conv is added by PyTorch.
        pytorch_adds = self.is_depthwise and adds_residual
        is_kernel = BACKENDS[self.route].is_kernel
        return is_kernel and not self.geometry.pads_before_conv and not pytorch_adds

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """Run the layer: x (N, c, H, W) and residual (N, n, H', W') give (N, n, H', W').

        With `overwrite` nobody reads the residual any more: the output may take its memory.
        """
        return self.run(x, residual, overwrite)
