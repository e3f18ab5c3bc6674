"""Small random networks: convs of every geometry, sums, ties, outputs of any structure."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn

from tests.support.custom_convs import NamedConv

OUTPUTS = ("tensor", "tuple", "dict", "none")
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Identity, nn.GELU,
)  # fmt: skip


class WrappedConv(nn.Conv2d):
    """Pads columns in a circle before its own padding, in `_conv_forward`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(input, (1, 0, 0, 0), mode="circular"), weight, bias)


class NormalisedConv(nn.Conv2d):
    """Scales its filters to unit norm, in `_conv_forward`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        norm = weight.flatten(1).norm(dim=1) + 0.1
        return super()._conv_forward(input, weight / norm[:, None, None, None], bias)


class RandomBlock(nn.Module):
    """A conv [+ norm] [+ activation] [+ sum with the input] [run twice]."""

    def __init__(self, rng: random.Random, c: int, n: int) -> None:
        super().__init__()
        self.conv = random_conv(rng, c, n)
        norms: list[Any] = [nn.BatchNorm2d, nn.BatchNorm2d, BatchNormAct2d, nn.Identity]
        self.norm = nn.Identity() if rng.random() < 0.3 else rng.choice(norms)(n)
        self.act = rng.choice(ACTIVATIONS)()
        # Decided here, since a network that looks at shapes is not traced.
        with torch.no_grad():
            keeps_shape = self.conv(torch.zeros(1, c, 10, 10)).shape == (1, c, 10, 10)
        self.adds, self.adds_first = keeps_shape and rng.random() < 0.7, rng.random() < 0.5
        self.twice = keeps_shape and rng.random() < 0.2

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.twice:
            y = self.norm(self.conv(y))
        if self.adds and self.adds_first:
            return self.act(y + x)  # type: ignore[no-any-return]
        y = self.act(y)
        return x + y if self.adds else y


class RandomNetwork(nn.Module):
    """A stem, some blocks and a head; its output is a tensor, a tuple or a dict."""

    def __init__(self, seed: int, output: str | None = None, ties: bool = True) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        widths = [6, *(rng.choice([4, 6, 6, 8, 12]) for _ in range(rng.randint(2, 5)))]
        self.blocks = nn.ModuleList(RandomBlock(rng, c, n) for c, n in pairwise(widths))
        self.head = nn.Linear(widths[-1], 5)
        self.looks_at_values = rng.random() < 0.2
        self.output = output or rng.choice(OUTPUTS)
        if rng.random() < 0.3 and ties:
            self._tie(rng)

    def _tie(self, rng: random.Random) -> None:
        """Let two convs of one shape share their weight."""
        convs = [block.conv for block in self.blocks]
        rng.shuffle(convs)  # type: ignore[arg-type]
        for one in convs:
            for two in convs:
                if one is not two and one.weight.shape == two.weight.shape:  # type: ignore[union-attr]
                    two.weight = one.weight  # type: ignore[union-attr]
                    return

    def forward(self, x: Tensor) -> Any:
        maps = [self.stem(x)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        if self.looks_at_values and maps[-1].sum() < -1e9:
            maps[-1] = -maps[-1]
        y = self.head(maps[-1].mean((2, 3)))
        if self.output == "tensor":
            return y
        if self.output == "tuple":
            return y, maps[1], [maps[-1]]
        rest = None if self.output == "none" else maps[2]
        return {"logits": y, "rest": rest, "maps": (maps[-1], y)}


def random_conv(rng: random.Random, c: int, n: int) -> nn.Conv2d:
    """A conv of any kernel, stride, dilation, groups, padding and class, perhaps edited later.

    A map may become too small to be reflected: then the network itself does not run.
    """
    kernel = rng.choice([(1, 1), (3, 3), (3, 3), (2, 2), (1, 3), (5, 5), (4, 3)])
    dilation = rng.choice([1, 1, 1, 2])
    kinds = [nn.Conv2d] * 5 + [NamedConv, Conv2dSame, WrappedConv, NormalisedConv]
    kind = rng.choice(kinds)
    padding: Any = tuple(-(-d * (k - 1) // 2) for k, d in zip(kernel, (dilation,) * 2, strict=True))
    stride: Any = rng.choice([1, 1, 1, 1, 2, (1, 2)])
    settings: dict[str, Any] = {"bias": rng.random() < 0.6}
    if kind is not Conv2dSame:
        mode = rng.choice(["zeros"] * 4 + ["reflect", "circular", "replicate"])
        settings["padding_mode"] = mode
        if rng.random() < 0.25:
            stride, padding = 1, "same"
    settings["groups"] = rng.choice([g for g in (1, 1, 1, 2, 3, c) if not (c % g or n % g)])
    layer = kind(c, n, kernel, stride=stride, dilation=dilation, padding=padding, **settings)
    if rng.random() < 0.3 and kind is not Conv2dSame and layer.padding_mode == "zeros":
        _edit_(rng, layer)
    return layer


def _edit_(rng: random.Random, layer: nn.Conv2d) -> None:
    """Make a conv dilated after its construction, as segmentation networks do."""
    step = rng.choice([1, 2])
    height, width = (-(-step * (size - 1) // 2) for size in layer.kernel_size)
    layer.stride, layer.dilation, layer.padding = (1, 1), (step, step), (height, width)


@torch.no_grad()
def random_network(seed: int, **settings: Any) -> RandomNetwork:
    """A network in eval mode with random norms; the same seed gives the same network."""
    torch.manual_seed(seed)
    network = RandomNetwork(seed, **settings).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return network
