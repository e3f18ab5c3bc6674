"""Norms, activations and sums are folded and fused where that is exact, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import legocompress as lego
from legocompress import kernels
from legocompress.deploy import deployed_graph
from tests.support.deploying import Block, Twice, X, check, conv, converted, relative

pytestmark = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "coefficients"), [(1, True), (1, False), (3, True)])
@pytest.mark.parametrize("act", [nn.ReLU6, nn.SiLU, nn.Hardswish])
def test_a_residual_block_is_folded_and_fused(
    dtype: torch.dtype, k: int, coefficients: bool, act: Any
) -> None:
    x = X.to(dtype)
    model = converted(Block(act=act), X, k=k, coefficients=coefficients).to(dtype)
    found = check(model, x)
    fused = 0 if act is nn.Hardswish else 2
    assert (found.n_layers, found.n_lego, found.notes) == (4, 3, ())
    assert (found.n_norms, found.n_sums, found.n_activations) == (3, 1, fused)
    assert found.choices.routes.keys() == {"stem", "conv1", "conv2", "down"}
    if dtype == torch.float64:
        assert set(found.choices.routes.values()) <= {"assemble", "table", "reference"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "n_norms"),
    [
        (FrozenBatchNorm2d, 3),
        (lambda n: BatchNormAct2d(n, act_layer=nn.ReLU), 3),
        (lambda n: BatchNormAct2d(n, act_layer=nn.Hardswish), 3),
        (lambda n: BatchNormAct2d(n, apply_act=False), 3),
        (lambda n: nn.BatchNorm2d(n, affine=False), 3),
        (lambda n: nn.BatchNorm2d(n, track_running_stats=False), 0),
        (lambda n: nn.GroupNorm(2, n), 0),
    ],
)
def test_norms_of_every_kind(norm: Any, n_norms: int) -> None:
    model = converted(Block(norm), X)
    if n_norms:
        assert check(model, X).n_norms == n_norms
    else:
        with torch.no_grad():  # such norms know their batch
            expected = model(X)
            assert lego.lego_state(lego.deploy_(model, X, seconds=0)).deployment.n_norms == 0
            assert relative(expected, model(X)) < 1e-5


class Sums(nn.Module):
    """Sums that may be fused, and those that may not, by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.conv, self.norm = conv(3, 8), conv(8, 8), nn.BatchNorm2d(8)
        self.one = conv(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.kind == "add":
            return x + self.norm(self.conv(x))
        if self.kind == "method":
            return self.norm(self.conv(x)).add_(x).relu_()
        if self.kind == "twice":
            y = self.norm(self.conv(x))
            return y + y
        if self.kind == "alpha":
            return torch.add(self.conv(x), x, alpha=2)
        if self.kind == "broadcast":
            return self.conv(x) + x.mean((2, 3), keepdim=True)
        if self.kind == "wider":
            return self.one(x) + x
        if self.kind == "input changes":
            y = self.conv(x)
            x.mul_(2)
            return y + x
        if self.kind == "both convs":
            return F.relu(self.conv(x) + self.norm(self.conv(x)))
        y = self.norm(self.conv(x))  # "heard twice"
        return F.relu(y) + y


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "n_sums"),
    [("add", 1), ("method", 1), ("twice", 0), ("alpha", 0), ("broadcast", 0), ("wider", 0),
     ("input changes", 0), ("both convs", 1), ("heard twice", 0)],
)  # fmt: skip
def test_sums(kind: str, n_sums: int) -> None:
    found = check(converted(Sums(kind), X), X)
    assert found.n_sums == n_sums
    if kind == "both convs":
        assert {"conv", "conv#2"} < found.choices.routes.keys()


def test_an_alias_that_tracing_does_not_see() -> None:
    class Alias(Sums):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = x
            y += self.conv(x)  # traced as y = y + ..., which leaves x as it was
            return y + x

    model = converted(Alias(""), X)
    with torch.no_grad():
        expected = model(X)
        lego.deploy_(model, X, seconds=0)
        assert relative(expected, model(X)) < 1e-6


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv(3, 8), conv(8, 8)
        self.again, self.norm = self.conv, nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.again(self.stem(x)))
        return self.norm(self.conv(x))


def test_a_conv_that_is_called_several_times() -> None:
    found = check(converted(Shared(), X), X)
    assert found.choices.routes.keys() == {"stem", "conv", "conv#2"}


def test_what_changes_its_buffers_is_not_traced() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Block()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1  # type: ignore[assignment]
            return self.body(x) * self.count

    model = converted(Counting(), X)
    before = float(model.count)
    lego.deploy_(model, X, seconds=0)
    assert "changes its buffers" in lego.lego_state(model).deployment.notes[0]
    with torch.no_grad():
        assert relative(model.body(X) * (model.count + 1), model(X)) == 0
    assert float(model.count) > before


@pytest.mark.skipif(not kernels.available(), reason=str(kernels.why_unavailable()))
@pytest.mark.parametrize("keep", [False, True])
def test_residuals_are_overwritten_only_where_nobody_reads_them(keep: bool) -> None:
    model = converted(Twice(keep), torch.randn(1, 3, 9, 11))
    assert check(model, torch.randn(1, 3, 9, 11), only=("fused",)).n_sums == 2
    calls = [n for n in deployed_graph(model).graph.nodes if n.op == "call_module"]
    assert [len(node.args) for node in calls if "deployed" in node.target] == [
        1,
        2,
        2 if keep else 3,
    ]
