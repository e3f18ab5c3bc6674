"""What the tests of quantisation share: a small network with every kind of integer operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import legocompress as lego

SIDE = 12


class Small(nn.Module):
    """Convs, norms, a residual sum, a gate, a joined map, pooling, tables and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.a_norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.b = nn.Conv2d(16, 12, 1)
        self.average = nn.AvgPool2d(2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.stem(x)).relu())
        y = nn.functional.hardswish(self.depthwise(x))
        y = (self.a_norm(self.a(y)) + x).relu()
        gate = y.mean((2, 3), keepdim=True)
        gate = self.excite(nn.functional.silu(self.squeeze(gate))).sigmoid()
        z = nn.functional.relu6(self.b(torch.cat([y * gate, x], 1)))
        z = self.average(z) + self.average(z)
        return self.head(z.mean((2, 3)))  # type: ignore[no-any-return]


def small_network(seed: int = 0, convert: bool = True) -> nn.Module:
    """The small network with random norms, as a Lego network or dense, in eval mode."""
    torch.manual_seed(seed)
    model = Small().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    if not convert:
        return model
    spec = lego.LegoSpec(m=0.5, o=2, k=2, allow_expansion=True)
    return lego.convert_(model, lego.plan(model, spec, torch.zeros(1, 3, SIDE, SIDE)))


def small_images(n_images: int = 16, seed: int = 1) -> Tensor:
    """Smooth random images (N, 3, 12, 12)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n_images, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")
