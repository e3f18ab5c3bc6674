"""The deployed forward runs the graph only as long as that computes what the network would."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.data import DataLoader, Dataset

import legocompress as lego
from tests.support.deploying import X, deployed, relative, runs_by_graph


def test_training_and_gradients_go_through_the_own_code(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = deployed()
    assert runs_by_graph(model)
    model.train()
    model(X).sum().backward()
    assert model.conv1.lego_filters.grad.abs().max() > 0
    assert not caplog.records
    model.eval()
    assert not runs_by_graph(model)  # the norms' statistics have moved
    model, expected = deployed()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().max() > 0
    with torch.no_grad():
        assert relative(expected, model(X)) < 1e-5


def test_gradients_of_parameters_in_eval_mode(caplog: pytest.LogCaptureFixture) -> None:
    model, expected = deployed()
    twin = lego.undeploy_(copy.deepcopy(model))
    for network in (model, twin):
        for _ in range(2):
            network(X).square().sum().backward()
    gradients = {name: value.grad for name, value in twin.named_parameters()}
    assert all(torch.equal(gradients[n], value.grad) for n, value in model.named_parameters())
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())
    assert len(caplog.records) == 1
    assert "torch.no_grad()" in caplog.records[0].message
    with torch.inference_mode():
        assert relative(expected, model(X)) < 1e-5
    assert runs_by_graph(model)
    model.requires_grad_(False)
    assert not model(X).requires_grad
    assert runs_by_graph(model)


@pytest.mark.parametrize("change", ["load", "step", "double", "autocast", "dense"])
def test_a_change_is_seen(change: str) -> None:
    model, expected = deployed()
    x = X
    with torch.no_grad():
        if change == "load":
            other = {name: value.clone() for name, value in model.state_dict().items()}
            other["conv1.lego_filters"] *= 2
            model.load_state_dict(other)
        elif change == "step":
            model.conv1.lego_filters.mul_(2)
        elif change == "double":
            model.double()
            x = X.double()
        elif change == "dense":
            lego.to_dense_(model)
            assert "forward" not in model.__dict__
        if change in ("load", "step"):
            assert not runs_by_graph(model)
            assert relative(expected, model(X)) > 1e-3
            assert torch.equal(model(X), lego.undeploy_(model)(X))
        elif change == "autocast":
            with torch.autocast("cpu"):
                assert not runs_by_graph(model)
        else:
            assert relative(expected.to(x.dtype), model(x)) < 1e-5


@torch.no_grad()
def test_transforms_go_through_the_own_code() -> None:
    model, expected = deployed()
    twin = lego.undeploy_(copy.deepcopy(model))
    assert relative(expected, torch.vmap(lambda x: model(x[None])[0])(X)) < 1e-5
    for derive in (torch.func.jvp, torch.func.vjp):
        inputs: Any = ((X,), (X,)) if derive is torch.func.jvp else (X,)
        ours, plain = derive(model, *inputs)[1], derive(twin, *inputs)[1]
        if derive is torch.func.vjp:
            ours, plain = ours(expected), plain(expected)
        assert relative(plain, ours) < 1e-6
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, X)
        tangents = [forward_ad.unpack_dual(network(dual)).tangent for network in (twin, model)]
        assert relative(*tangents) < 1e-6


@pytest.mark.slow
def test_copies_exports_and_undeploying() -> None:
    model, expected = deployed()
    twin = copy.deepcopy(model)
    assert not runs_by_graph(twin) if "forward" in twin.__dict__ else True
    with torch.no_grad():
        assert relative(expected, twin(X)) < 1e-6
        assert relative(expected, lego.to_dense(model)(X)) < 1e-6
        exported = torch.export.export(model, (X,)).module()
        assert relative(expected, exported(X)) < 1e-6
        assert list(inspect.signature(model.forward).parameters) == ["x"]
        lego.undeploy_(model)
        assert "forward" not in model.__dict__
        assert torch.equal(model(X), twin(X))


def test_a_hook_that_comes_later_is_heard() -> None:
    model, expected = deployed()
    heard: list[Tensor] = []
    with model.norm1.register_forward_hook(lambda module, args, output: heard.append(output)):
        with torch.no_grad():
            assert relative(expected, model(X)) < 1e-6
        assert len(heard) == 1
    assert runs_by_graph(model)
    totals = lego.measure(model, example_input=X).totals()
    assert totals["dense_macs"] > totals["macs"] > 0


class Features(Dataset[Tensor]):
    """A data set that computes its items with a network."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return len(X)

    @torch.no_grad()
    def __getitem__(self, number: int) -> Tensor:
        output: Tensor = self.model(X[number : number + 1])
        return output[0]


# A forked process runs the graph. A spawned one gets a pickled copy, which runs its own code. To
# send it, PyTorch moves the tensors to shared memory; this process goes on with the graph.
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_loader_process_may_hold_a_deployed_network(start: str) -> None:
    model, expected = deployed()
    loader = DataLoader(
        Features(model), len(X), num_workers=1, multiprocessing_context=start, timeout=120
    )
    assert relative(expected, next(iter(loader))) < 1e-5
    assert runs_by_graph(model)
    with torch.no_grad():
        assert relative(expected, model(X)) < 1e-5
