"""Images for calibration where there are none: noise shaped to the norm statistics of a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from legocompress.errors import DataError
from legocompress.models.probe import default_input, evaluating

STEPS = 100
RATE = 0.1
ROUGHEST = 8  # noise starts as smooth as images are, from a grid this much coarser


def synthesise(
    original: nn.Module,
    n_images: int,
    seed: int = 0,
    batch_size: int = 32,
    steps: int = STEPS,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Shape smooth noise until every BatchNorm sees the statistics that training left in it.

    No data is read. Weaker than photos: statistics tell what single channels do, not which patterns
    go together. After DeepInversion (Yin et al., CVPR 2020), without its class term.

    Args:
        original: the dense network.
        n_images: how many; (N, c, H, W) of the size that its configuration names is returned.
        seed: of the noise.
        batch_size: images shaped together.
        steps: of Adam, for each batch.
        on_step: called with the steps done and in all.

    Raises:
        DataError: the network has no BatchNorm with statistics.
    """
    norms = [m for m in original.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    example = default_input(original)
    if not norms or example is None:
        raise DataError(
            "images cannot be synthesised: the network has no BatchNorm statistics to shape them "
            "to; calibrate with a folder of photos"
        )
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(batch_size, n_images - done) for done in range(0, n_images, batch_size)]
    parts = []
    with evaluating(original), torch.enable_grad():
        for number, size in enumerate(sizes):
            height, width = example.shape[2:]
            coarse = (size, example.shape[1], -(-height // ROUGHEST), -(-width // ROUGHEST))
            noise = F.interpolate(torch.randn(coarse, generator=generator), (height, width))
            images = noise.to(example).requires_grad_()
            optimiser = torch.optim.Adam([images], RATE)
            for step in range(steps):
                loss = _mismatch(original, norms, images)
                (images.grad,) = torch.autograd.grad(loss, [images])
                optimiser.step()
                if on_step is not None:
                    on_step(number * steps + step + 1, len(sizes) * steps)
            parts.append(images.detach())
    return torch.cat(parts)


def _mismatch(network: nn.Module, norms: list[_BatchNorm], images: Tensor) -> Tensor:
    """How far the inputs of the norms are from their statistics, in standard deviations."""
    losses: list[Tensor] = []

    def compare(norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
        variance, mean = torch.var_mean(inputs[0], axes, correction=0)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.running_var + norm.eps
        shift = ((mean - norm.running_mean).square() / scale).mean()
        spread = ((variance + norm.eps).sqrt() / scale.sqrt() - 1).square().mean()
        losses.append(shift + spread)

    hooks = [norm.register_forward_pre_hook(compare) for norm in norms]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(losses).mean()
