"""What the tests of deploying share: converted networks, and the check that all is as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.common.networks import randomise_
from benchmarks.coverage import collect_tensors

SPEC = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)


def conv(c: int, n: int, kernel: Any = 3, **kwargs: Any) -> nn.Conv2d:
    if "padding" not in kwargs:
        kwargs["padding"] = kernel // 2
    return nn.Conv2d(c, n, kernel, **kwargs)


def converted(model: nn.Module, x: Any, **settings: Any) -> nn.Module:
    randomise_(model.eval())
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.normal_(layer.bias, std=0.1)
    return lego.convert_(model, lego.plan(model, SPEC.model_copy(update=settings), x))


def relative(expected: Any, found: Any) -> float:
    gaps = []
    for a, b in zip(collect_tensors(expected), collect_tensors(found), strict=True):
        assert a.shape == b.shape
        if a.numel():
            gaps.append(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)))
    return max(gaps)


@torch.no_grad()
def check(model: nn.Module, *inputs: Tensor, **settings: Any) -> lego.Deployment:
    """Deploy, compare on the example and on another batch, and give back what was done."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    others = tuple(torch.cat([x, 2 * x.flip(0)]) for x in inputs)
    expected, expected_others = model(*inputs), model(*others)
    assert relative(expected, torch.zeros_like(expected)) > 0
    lego.deploy_(model, inputs, seconds=0, **settings)
    assert "forward" in model.__dict__
    limit = 1e-12 if inputs[0].dtype == torch.float64 else 1e-5
    assert relative(expected, model(*inputs)) <= limit
    for _ in range(2):  # recorded and replayed
        assert relative(expected_others, model(*others)) <= limit
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())
    return lego.lego_state(model).deployment  # type: ignore[return-value]


class Block(nn.Module):
    """A stem, and a residual block whose parts a test may change."""

    def __init__(self, norm: Any = nn.BatchNorm2d, act: Any = nn.ReLU) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.conv1, self.norm1, self.act1 = conv(8, 8, bias=False), norm(8), act()
        self.conv2, self.norm2 = conv(8, 16, stride=2), norm(16)
        self.down, self.norm3 = conv(8, 16, 1, stride=2, bias=False), norm(16)
        self.act2 = act()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.norm3(self.down(x))
        return self.act2(y)


X = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(3))


def deployed() -> tuple[nn.Module, Tensor]:
    model = converted(Block(), X)
    with torch.no_grad():
        expected = model(X)
    return lego.deploy_(model, X, seconds=0), expected


def runs_by_graph(model: nn.Module) -> bool:
    """Whether a call without gradients runs the graph."""
    own = model.__dict__["forward"]
    run, ran = own.run, []
    own.run = lambda *args: ran.append(1) or run(*args)
    try:
        with torch.no_grad():
            model(X)
    finally:
        own.run = run
    return bool(ran)


class Twice(nn.Module):
    """Two sums with one map: the second alone may overwrite it, and not where it is kept."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep
        self.stem, self.one, self.two = conv(3, 8), conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.two(self.one(x) + x) + x
        return y + x.mean() if self.keep else y
