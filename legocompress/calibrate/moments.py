"""Second moments of the inputs of a layer and of its target outputs."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30


class Moments:
    """Sums over samples, from which the squared error of any filters follows.

    With inputs x and target outputs y, sum |y - W x|^2 = tr(W H W^T) - 2 tr(W C^T) + E. So the sums
    H, C and E are enough, whatever the number of samples.

    Shapes: g groups, n outputs, D values per input patch of a group. H is stored as blocks on its
    diagonal, one per group and part of the patch. Where a patch has several parts, the targets are
    the outputs of the original filters on these parts, since other targets would be biased.

    Attributes:
        square: H = sum x x^T, (g, parts, D / parts, D / parts).
        cross: C = sum y x^T, (g, n/g, D).
        energy: E = sum |y|^2.
        samples: number of samples.
    """

    def __init__(
        self, groups: int, patch: int, n_out: int, parts: int, device: torch.device
    ) -> None:
        side = patch // parts
        self.square = torch.zeros(groups, parts, side, side, device=device)
        self.cross = torch.zeros(groups, n_out // groups, patch, device=device)
        self.energy = 0.0
        self.samples = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add patches (P, g, D) and target outputs (P, g, n/g)."""
        groups, parts, side, _ = self.square.shape
        split = x.reshape(len(x), groups * parts, side).transpose(0, 1)
        self.square.view(groups * parts, side, side).baddbmm_(split.mT, split)
        if parts == 1:
            self.cross.baddbmm_(y.permute(1, 2, 0), x.transpose(0, 1))
            self.energy += float(y.double().square().sum())
        self.samples += len(x)

    def finish(self, original: Tensor, damping: float = 0.0) -> None:
        """Complete the sums, and pull the solution towards the `original` filters.

        Args:
            original: (g, n/g, D).
            damping: weight of the pull, as the share of white noise that is added to the inputs. It
                decides the directions in which there were too few inputs.
        """
        if self.square.shape[1] > 1:
            self.cross = self.times(original)
            self.energy = float((self.cross.double() * original).sum())
        diagonal = self.square.diagonal(dim1=2, dim2=3)
        extra = damping * diagonal.mean() + TINY
        diagonal.add_(extra)
        self.cross += extra * original

    def times(self, weight: Tensor) -> Tensor:
        """W H for filters (g, r, D)."""
        groups, rows, _ = weight.shape
        parts = weight.reshape(groups, rows, self.square.shape[1], -1).transpose(1, 2)
        return (parts @ self.square).transpose(1, 2).reshape(weight.shape)

    def split_times(self, weight: Tensor, split: int, n_split: int) -> Tensor:
        """W H for filters that are zero but in one of the splits, (g, r, D / n_split)."""
        groups, rows, width = weight.shape
        if self.square.shape[1] == 1:
            return weight @ self.square[:, 0, split * width : (split + 1) * width]
        whole = weight.new_zeros(groups, rows, n_split * width)
        whole[:, :, split * width : (split + 1) * width] = weight @ self.square[:, split]
        return whole

    def split_square(self, split: int, n_split: int) -> Tensor:
        """The block of H that belongs to one of the splits, (g, D / n_split, D / n_split)."""
        if self.square.shape[1] > 1:
            return self.square[:, split]
        width = self.square.shape[2] // n_split
        part = slice(split * width, (split + 1) * width)
        return self.square[:, 0, part, part]

    def mean_square(self, n_split: int) -> Tensor:
        """The mean of those blocks over groups and splits, (D / n_split, D / n_split), float64."""
        blocks = [self.split_square(split, n_split).double().mean(0) for split in range(n_split)]
        return torch.stack(blocks).mean(0)

    def solve(self) -> Tensor:
        """The filters (g, n/g, D) of least error."""
        groups, rows, _ = self.cross.shape
        parts = self.cross.reshape(groups, rows, self.square.shape[1], -1).transpose(1, 2)
        factor = torch.linalg.cholesky(self.square.double())
        solved = torch.cholesky_solve(parts.double().mT, factor).mT
        return solved.transpose(1, 2).reshape(self.cross.shape).to(self.cross.dtype)

    def error(self, weight: Tensor) -> float:
        """Relative squared error sum |y - W x|^2 / sum |y|^2 of filters (g, n/g, D)."""
        fitted = (weight * (self.times(weight) - 2 * self.cross)).sum(dtype=torch.float64)
        return max(0.0, float(fitted) + self.energy) / max(self.energy, TINY)
