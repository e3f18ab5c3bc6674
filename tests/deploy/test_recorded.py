"""Which layers of a deployed network run as one call, and that they compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import legocompress as lego
from legocompress.deploy.recorded import MAX_TAPES, RecordedRun
from tests.support.deploying import X, check, conv, converted, relative
from tests.support.kernel_cases import compiled


class Net(nn.Module):
    """Two runs of layers with an operator between them that is no kernel's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv(3, 8), nn.MaxPool2d(2)
        self.one, self.two, self.three = conv(8, 8), conv(8, 8), conv(8, 8, padding_mode="reflect")
        self.four, self.five = conv(8, 8), conv(8, 16)
        self.mean, self.flat, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(self.two(torch.relu(self.one(x))) + x)
        x = torch.sigmoid(x) + self.three(x)
        x = self.five(torch.relu(self.four(x)))
        y: Tensor = self.fc(self.flat(self.mean(x)))
        return y


def runs_of(model: nn.Module) -> list[RecordedRun]:
    graph: Any = model.__dict__["forward"].run.__self__
    return [module for module in graph.modules() if isinstance(module, RecordedRun)]


def kernels_only(model: nn.Module) -> list[RecordedRun]:
    """The model's runs, with each layer on a kernel's route whatever is fastest here."""
    check(model, X, only=("fused", "winograd"), formats=("nchw",))
    choices = lego.lego_state(model).deployment.choices
    plain = {name: "kernel" for name, route in choices.routes.items() if route == "plain"}
    every = choices.model_copy(update={"routes": {**choices.routes, **plain}})
    lego.deploy_(model, X, choices=every)
    return runs_of(model)


@compiled
def test_runs_end_where_another_operator_stands() -> None:
    model = converted(Net(), X)
    with torch.no_grad():
        expected = model(X)
    first, second = kernels_only(model)
    counts = [sum(n.op == "call_module" for n in run.body.graph.nodes) for run in (first, second)]
    assert counts == [4, 5]  # with the pooling; with mean, flatten and linear
    with torch.no_grad():
        assert relative(expected, model(X)) < 1e-5
    for run in (first, second):
        assert [tape is not None for tape in run._tapes.values()] == [True]


@compiled
def test_each_size_has_a_tape_and_the_oldest_goes() -> None:
    model = converted(Net(), X)
    runs = kernels_only(model)
    own = type(model).forward
    with torch.no_grad():
        for size in range(8, 8 + 2 * MAX_TAPES, 2):
            x = torch.randn(1, 3, size, size + 2)
            for _ in range(2):
                assert relative(own(model, x), model(x)) < 1e-5
    assert all(len(run._tapes) == MAX_TAPES for run in runs)


@compiled
def test_maps_in_another_order_give_the_same() -> None:
    model = converted(Net(), X)
    kernels_only(model)
    with torch.no_grad():
        for x in (X.transpose(2, 3), X.flip(3)[:, :, ::2], X[:1].expand(3, -1, -1, -1)):
            for _ in range(2):
                assert relative(type(model).forward(model, x), model(x)) < 1e-5


class Counted(TorchDispatchMode):
    """Hears the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


@compiled
@pytest.mark.parametrize("listens", [False, True])
def test_who_listens_to_operators_hears_them(listens: bool) -> None:
    model = converted(Net(), X)
    kernels_only(model)
    with torch.no_grad():
        expected = model(X)
        with Counted() as counted:
            found = model(X) if listens else expected
    assert torch.equal(found, expected)
    assert ("legocompress.lego_conv2d.default" in counted.heard) == listens


class Inverted(nn.Module):
    """An inverted residual, whose depthwise conv may have a residual sum of its own."""

    def __init__(self, summed: bool) -> None:
        super().__init__()
        self.stem, self.summed = conv(3, 8), summed
        self.wide, self.deep, self.narrow = conv(8, 24, 1), conv(24, 24, groups=24), conv(24, 8, 1)
        self.end = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        wide = nn.functional.relu6(self.wide(x))
        deep = self.deep(wide) + wide if self.summed else nn.functional.relu6(self.deep(wide))
        y: Tensor = self.end(self.narrow(deep) + x)
        return y


@compiled
@pytest.mark.parametrize("summed", [False, True])
def test_depthwise_convs_run_in_a_row_unless_pytorch_adds_to_them(summed: bool) -> None:
    model = converted(Inverted(summed), X, min_params=0)
    assert not isinstance(model.deep, lego.LegoModule)
    runs = kernels_only(model)
    counts = [sum(n.op == "call_module" for n in run.body.graph.nodes) for run in runs]
    assert counts == ([2, 2] if summed else [5])


@compiled
@torch.no_grad()
def test_recordings_of_tensors_that_moved_are_dropped() -> None:
    model = converted(Net(), X)
    expected = model(X)
    runs = kernels_only(model)
    before = [tape for run in runs for tape in run._tapes.values()]
    model.share_memory()
    assert relative(expected, model(X)) < 1e-5
    after = [tape for run in runs for tape in run._tapes.values()]
    assert len(runs) == len(after) == 2
    assert not set(before) & set(after)
