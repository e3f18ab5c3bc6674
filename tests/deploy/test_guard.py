"""A deployed network notices whatever changes what its own code computes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import legocompress as lego
from tests.support.deploying import X, conv, converted, relative, runs_by_graph

pytestmark = pytest.mark.slow


class Changing(nn.Module):
    """A network with something of every kind that can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = conv(3, 8), nn.LeakyReLU(0.1)
        self.conv, self.norm, self.relu = conv(8, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.body = nn.Sequential(conv(8, 8), nn.ReLU())
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, 10)
        self.scale, self.powers, self.config = 2.0, [1, 2], SimpleNamespace(shift=1.0)
        self.offset = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.scale * self.relu(self.norm(self.conv(x))) + x ** self.powers[1]
        x = self.body(self.drop(x) + self.config.shift)
        return self.fc(x.mean((2, 3)) + self.offset)  # type: ignore[no-any-return]


@functools.cache
def prepared() -> nn.Module:
    torch.manual_seed(0)
    model = converted(Changing(), X)
    model.fc.bias.data.normal_()
    return model


def deployed() -> Any:
    return lego.deploy_(copy.deepcopy(prepared()), X, seconds=0, only=("assemble",))


def run_own_code(model: nn.Module, x: Tensor = X) -> Any:
    torch.manual_seed(1)  # of dropout
    return lego.undeploy_(copy.deepcopy(model))(x)


def load_assigned(n: Any) -> None:
    state = n.state_dict()
    changed = {k: v * 1.5 if v.is_floating_point() else v.clone() for k, v in state.items()}
    n.load_state_dict(changed, assign=True)


def assign_data_twice(n: Any) -> None:
    for _ in range(2):  # the second tensor may take the place of the first in memory
        n.conv.lego_filters.data = n.conv.lego_filters.data * 1.5


def scale_by_vector(n: Any) -> None:
    vector_to_parameters(parameters_to_vector(n.parameters()) * 1.5, n.parameters())


def replace_index(n: Any) -> None:
    n.conv.index = n.conv.index.flip(1)


def replace_parameter(n: Any) -> None:
    n.norm.weight = nn.Parameter(torch.full((8,), 3.0))


def replace_forward(n: Any) -> None:
    n.relu.forward = torch.tanh


def change_class(n: Any) -> None:
    n.relu.__class__ = nn.Sigmoid


CHANGES: dict[str, Callable[[Any], object]] = {
    "a state is loaded with assign": load_assigned,
    "a parameter is replaced": replace_parameter,
    "a buffer is replaced": lambda n: setattr(n.norm, "running_mean", torch.ones(8)),
    "an index is replaced": replace_index,
    "a tensor that is no buffer is replaced": lambda n: setattr(n, "offset", torch.zeros(8)),
    "a tensor that is no buffer is changed": lambda n: n.offset.add_(1),
    "parameters come from a vector": scale_by_vector,
    "data are added to": lambda n: n.body[0].bias.data.add_(1),
    "data are multiplied": lambda n: n.conv.lego_filters.data.mul_(1.5),
    "data are copied to": lambda n: n.norm.weight.data.copy_(torch.rand(8)),
    "data are assigned": assign_data_twice,
    "data are written by NumPy": lambda n: n.conv.lego_filters.detach().numpy().fill(0.1),
    "data are cut": lambda n: setattr(n.fc.bias, "data", n.fc.bias.data[:1]),
    "eps": lambda n: setattr(n.norm, "eps", 0.5),
    "stride": lambda n: setattr(n.body[0], "stride", (2, 2)),
    "padding": lambda n: setattr(n.body[0], "padding", (0, 0)),
    "a number of the network": lambda n: setattr(n, "scale", 5.0),
    "a list of the network": lambda n: n.powers.__setitem__(1, 3),
    "a setting of the network": lambda n: setattr(n.config, "shift", -1.0),
    "a new head": lambda n: setattr(n, "fc", nn.Linear(8, 5)),
    "another activation": lambda n: setattr(n, "relu", nn.GELU()),
    "another activation in a sequence": lambda n: n.body.__setitem__(1, nn.GELU()),
    "a layer more": lambda n: n.body.append(nn.Sigmoid()),
    "a norm in train mode": lambda n: n.norm.train(),
    "dropout in train mode": lambda n: n.drop.train(),
    "a forward is replaced": replace_forward,
    "a class is changed": change_class,
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = deployed()
    before = model(X)
    assert runs_by_graph(model)
    assert relative(run_own_code(prepared()), before) < 1e-5
    assert not caplog.records
    CHANGES[name](model)
    expected = run_own_code(model)
    torch.manual_seed(1)
    after = model(X)
    assert torch.equal(expected, after)
    assert before.shape != after.shape or relative(before, after) > 1e-3
    assert not runs_by_graph(model)
    assert len(caplog.records) == 1
    assert "call deploy_ again" in caplog.records[0].message


@torch.no_grad()
def test_what_the_graph_calls_as_it_is_may_change() -> None:
    model = deployed()
    before = model(X)
    model.act.negative_slope = 0.9
    handle = model.act.register_forward_hook(lambda module, args, output: output + 1)
    expected = run_own_code(model)
    assert relative(before, expected) > 1e-3
    assert relative(expected, model(X)) < 1e-5
    handle.remove()
    assert runs_by_graph(model)
    assert relative(run_own_code(model), model(X)) < 1e-5


def test_the_warning_names_what_has_changed(caplog: pytest.LogCaptureFixture) -> None:
    model = deployed()
    model.body[0].padding = (0, 0)
    assert not runs_by_graph(model)
    assert "since deploy_ (body.0.padding)" in caplog.text
    model.body[0].padding = (1, 1)
    assert runs_by_graph(model)


@torch.no_grad()
def test_dropout_in_train_mode_draws_anew() -> None:
    model = deployed()
    model.drop.train()
    assert not torch.equal(model(X), model(X))
    model.drop.p = 0.0
    assert torch.equal(model(X), run_own_code(model))
    model.drop.eval()
    assert not runs_by_graph(model)  # p is another, which eval mode does not read
    model.drop.p = 0.5
    assert runs_by_graph(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["forward", "pre", "global"])
def test_hooks_that_come_later_run(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = deployed()
    before = model(X)
    if kind == "forward":
        handle: Any = model.relu.register_forward_hook(lambda module, args, output: output + 1)
    elif kind == "pre":
        handle = model.body[0].register_forward_pre_hook(lambda module, args: args[0] + 1)
    else:
        handle = register_module_forward_hook(
            lambda module, args, output: output + 1 if type(module) is nn.ReLU else None
        )
    with handle:
        expected = run_own_code(model)
        assert relative(before, expected) > 1e-3
        assert torch.equal(expected, model(X))
    assert runs_by_graph(model)
    assert not caplog.records


@torch.no_grad()
def test_what_does_not_change_the_outputs_leaves_the_graph(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = deployed()
    expected = model(X)
    model.train()
    model.eval()
    assert runs_by_graph(model)
    lego.freeze_(model)
    assert runs_by_graph(model)
    model.norm.register_full_backward_hook(lambda *args: None).remove()
    model.norm.eps = 1e-5 + 0.0
    model.norm.num_batches_tracked += 1
    model.powers = [1, 2]
    lego.lego_state(model.body)
    lego.lego_state(model).choices = ()
    assert runs_by_graph(model)
    ones = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    assert relative(expected, functional_call(model, ones, (X,))) > 1e-3
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "a deployed network has changed since deploy_"
    ]
    assert runs_by_graph(model)
    assert relative(expected, model(X)) < 1e-6


class Storing(nn.Module):
    """Stores a feature map, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.n_calls = conv(3, 16), conv(16, 16), 0
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        self.feature = F.relu(self.one(x))
        self.maps.append(self.feature)
        return self.two(self.feature)  # type: ignore[no-any-return]


@torch.no_grad()
def test_what_a_network_stores_is_stored_at_each_call() -> None:
    model: Any = converted(Storing(), X)
    model.maps.clear()
    del model.feature
    model.n_calls = 0
    lego.deploy_(model, X, seconds=0)
    notes = lego.lego_state(model).deployment.notes
    assert "(root) is not traced as a whole" in notes[0]
    assert "stores a value on the network" in notes[0]
    assert all(type(value) is Tensor for value in model.maps)  # nothing of the trace is left
    n_calls = model.n_calls
    for x in (X, 2 * X):
        y = model(x)
        twin = lego.undeploy_(copy.deepcopy(model))
        assert relative(twin(x), y) < 1e-5
        assert relative(twin.feature, model.feature) < 1e-5
        assert model.maps[-1] is model.feature
    assert model.n_calls == n_calls + 2
    assert set(lego.lego_state(model).deployment.choices.formats) == {"one", "two"}


def test_new_values_of_dtypes_and_layouts_are_noticed() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.complex64, torch.bool, torch.int8):
        model = deployed()
        model.other = torch.ones(3, 5, 2, 2).to(dtype, memory_format=torch.channels_last)
        lego.deploy_(model, X, seconds=0, only=("assemble",))
        assert runs_by_graph(model)
        model.other.data.zero_()
        assert not runs_by_graph(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["shared", "moved", "replaced", "loaded"])
def test_equal_values_elsewhere_leave_the_graph(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = lego.deploy_(copy.deepcopy(prepared()), X, seconds=0)
    expected = model(X)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if kind == "shared":
        model.share_memory()
    elif kind == "moved":
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    else:
        model.load_state_dict(state, assign=kind == "replaced")
    assert runs_by_graph(model)
    assert relative(expected, model(X)) < 1e-6
    assert not caplog.records
    model.fc.bias.data[3:] += 1
    assert not runs_by_graph(model)
    assert relative(expected, model(X)) > 1e-3
    assert "(fc.bias)" in caplog.text


@torch.no_grad()
def test_another_tensor_of_one_equal_value_is_watched() -> None:
    model = deployed()
    model.gain = nn.Parameter(torch.ones(1))
    lego.deploy_(model, X, seconds=0, only=("assemble",))
    model.gain = nn.Parameter(torch.ones(1))
    assert runs_by_graph(model)
    model.gain.add_(1)
    assert not runs_by_graph(model)
