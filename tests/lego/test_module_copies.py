"""Copies, pickles, state dicts, traces and replicas of Lego modules compute the same."""

from __future__ import annotations

import copy
import io
import pickle  # a round trip, as copies between processes make it
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import nn

from legocompress.errors import DenseOnlyError
from legocompress.lego.module import LegoModule, lego_modules
from legocompress.lego.surgery import freeze_, to_dense
from tests.support.lego_layers import close, conv, lego_


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "kind", [nn.Conv2d, Conv2dSame, ScaledStdConv2d], ids=lambda kind: kind.__name__
)
def test_deepcopy_is_equal_and_independent(kind: type[nn.Conv2d], frozen: bool) -> None:
    module: Any = lego_(kind(6, 4, 3, bias=True).double(), n_split=4, n_terms=2).eval()
    if frozen:
        module.freeze()
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    expected = module(x)
    copied = copy.deepcopy(module)
    assert type(copied) is type(module)
    assert copied.lego_shape == module.lego_shape
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        copied.lego_filters.mul_(2)
        copied.bias.add_(1)
        copied.index.zero_()
    copied.train()
    assert torch.equal(module(x), expected)
    assert not torch.equal(copied(x), expected)


def test_pickle_round_trip() -> None:
    # Processes hand networks on so; no file of ours is read that way.
    model = nn.Sequential(
        lego_(conv(6, 4, 3), n_split=4, n_terms=2),
        lego_(Conv2dSame(4, 4, 3, stride=2).double(), coefficients=False),
        nn.Flatten(),
        lego_(nn.Linear(16, 3, dtype=torch.float64)),
    )
    x = torch.randn(2, 6, 5, 6, dtype=torch.float64)
    back = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in back] == [type(m) for m in model]
    assert torch.equal(back(x), model(x))
    with torch.no_grad():
        back[0].lego_filters.zero_()
    assert model[0].lego_filters.abs().max() > 0


def test_state_dict_holds_the_unit_and_no_dense_weight() -> None:
    module: Any = lego_(conv(6, 4, 3), n_terms=2)
    module.freeze()
    state = module.state_dict()
    assert set(state) == {"lego_filters", "coefficients", "bias", "index"}
    assert set(lego_(conv(6, 4, 3, bias=False), coefficients=False).state_dict()) == {
        "lego_filters",
        "index",
    }


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_state_dict_round_trip_leaves_no_stale_weight(frozen: bool, assign: bool) -> None:
    source: Any = lego_(conv(6, 4, 3), n_terms=2).eval()
    target: Any = lego_(conv(6, 4, 3), n_terms=2).eval()
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    if frozen:
        freeze_(target)
        freeze_(source)
    assert not torch.equal(target(x), source(x))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target(x), source(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("route", ["assemble", "reference"])
def test_fx_traces_the_same_function(route: str) -> None:
    model = nn.Sequential(
        lego_(conv(6, 8, 3, stride=2, padding=1), n_split=4, n_terms=2),
        nn.ReLU(),
        lego_(conv(8, 4, 1, groups=2, bias=False), coefficients=False),
    )
    for _, module in lego_modules(model):
        module.route = route  # type: ignore[assignment]
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(model)
    close(traced(x), model(x))
    again = torch.randn(3, 6, 9, 8, dtype=torch.float64)
    close(traced(again), model(again))


def test_fx_traces_linear_and_frozen_modules() -> None:
    model = nn.Sequential(lego_(conv(6, 8, 3)), nn.Flatten(), lego_(nn.Linear(8, 3).double()))
    freeze_(model.eval())
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    close(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("route", ["assemble", "reference"])
def test_compiling_gives_the_same_function_without_graph_breaks(route: str) -> None:
    model = nn.Sequential(
        lego_(conv(6, 8, 3, stride=2, padding=1), n_split=4, n_terms=2),
        nn.Flatten(),
        lego_(nn.Linear(8 * 9, 3, dtype=torch.float64)),
    )
    for _, module in lego_modules(model):
        module.route = route  # type: ignore[assignment]
    x = torch.randn(2, 6, 6, 6, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripting_is_refused_and_the_dense_network_scripts() -> None:
    model = nn.Sequential(lego_(conv(6, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 1).double()).eval()
    with pytest.raises(DenseOnlyError, match=r"script legocompress\.to_dense\(model\)"):
        torch.jit.script(model)
    assert isinstance(model[0], LegoModule)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert torch.equal(torch.jit.script(to_dense(model))(x), model(x))
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))


def test_a_replica_for_data_parallel_computes_and_learns_the_same() -> None:
    for coefficients in (True, False):
        module: Any = lego_(conv(6, 4, 3), n_terms=2, coefficients=coefficients)
        replica = module._replicate_for_data_parallel()
        for name, value in module._parameters.items():  # as torch.nn.parallel.replicate does
            if value is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, value * 1)
        for name, buffer in module._buffers.items():
            if buffer is None:
                replica._buffers[name] = None
            else:
                setattr(replica, name, buffer.clone())
        x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
        for route in ("assemble", "reference"):
            replica._route = route
            close(replica(x), module(x))
        replica(x).square().sum().backward()
        assert module.lego_filters.grad.abs().max() > 0
