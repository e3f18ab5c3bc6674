"""Make calibration images without data: noise that matches the norm statistics of a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from legocompress.errors import DataError
from legocompress.models.inputs import check_one_input
from legocompress.models.probe import default_input, evaluating

STEPS = 100
RATE = 0.1
ROUGHEST = 8  # the noise starts smooth, from a grid that is this much coarser


def synthesise(
    original: nn.Module,
    n_images: int,
    seed: int = 0,
    batch_size: int = 32,
    steps: int = STEPS,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Optimise smooth noise until the inputs of every BatchNorm have its running statistics.

    No data is read. The images are weaker than photos: the statistics describe single channels, not
    which patterns occur together. From DeepInversion (Yin et al., CVPR 2020), without class term.

    Args:
        original: the dense network.
        n_images: number of images.
        seed: of the noise.
        batch_size: images that are optimised together.
        steps: steps of Adam per batch.
        on_step: called with the number of steps done and of all steps.

    Returns:
        Images (N, c, H, W) of the size in the configuration of the network.

    Raises:
        DataError: the network has no BatchNorm with statistics.
        UsageError: it takes several inputs.
    """
    check_one_input(original, "synthesise")
    norms = [m for m in original.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    example = default_input(original)
    if not norms or example is None:
        raise DataError(
            "images cannot be synthesised, since the network has no BatchNorm statistics; "
            "calibrate with a folder of photos"
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
    """The distance between the inputs of the norms and their statistics, in standard deviations."""
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
