"""Estimate what changes of single weights cost the outputs, without running each change.

For a small change D of the weights of one layer, the logits of an image change by J D, and

    KL(original || changed) = 1/2 (J D)^T F (J D) + ...,   F = diag(p) - p p^T.

With a random v of covariance F, this is the mean of 1/2 (g . D)^2, where g is the gradient of
v . logits. So one backward pass per image serves all changes of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from legocompress.models.outputs import find_logits, flatten_float_tensors

PROBES = 2  # random vectors per image


def estimate_losses(
    model: nn.Module,
    changes: Mapping[Tensor, Tensor],
    images: Tensor,
    seed: int,
) -> list[Tensor]:
    """Estimate the loss that each change of a weight causes alone.

    Args:
        model: in eval mode; its gradients and flags stay as they are.
        changes: for each weight, changes (number, *shape of the weight).
        images: (N, c, H, W).
        seed: of the random vectors.

    Returns:
        For each weight the losses (number,) of its changes, means over the images: the KL
        divergence in nats, or for outputs without classes the squared relative error.
    """
    weights = list(changes)
    rows = [change.flatten(1) for change in changes.values()]
    sums = [row.new_zeros(len(row), dtype=torch.float64) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    energy = 0.0
    has_logits = True
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for image in torch.split(images, 1):
            with torch.enable_grad():
                output = model(image)
                logits = find_logits(output, 1)
                has_logits = logits is not None and logits.shape[1] > 1
                parts = [logits] if has_logits else flatten_float_tensors(output)
            energy += sum(float(p.detach().double().square().sum()) for p in parts if p is not None)
            parts = [part for part in parts if part is not None and part.requires_grad]
            for probe in range(PROBES if parts else 0):  # none if no weight reaches the outputs
                vectors = [_draw(part.detach(), has_logits, generator) for part in parts]
                gradients = torch.autograd.grad(
                    parts,
                    weights,
                    vectors,
                    retain_graph=probe < PROBES - 1,
                    allow_unused=True,
                )
                for total, row, gradient in zip(sums, rows, gradients, strict=True):
                    if gradient is not None:
                        total += (row @ gradient.flatten()).double().square()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    scale = 0.5 / len(images) if has_logits else 1 / max(energy, 1e-30)
    return [total * scale / PROBES for total in sums]


def _draw(output: Tensor, as_logits: bool, generator: torch.Generator) -> Tensor:
    """Draw a vector like `output`: of covariance F for logits (1, classes), else of identity."""
    noise = torch.randn(output.shape, generator=generator).to(output)
    if not as_logits:
        return noise
    shares = output.softmax(1)
    noise = shares.sqrt() * noise
    return noise - shares * noise.sum(1, keepdim=True)
