"""A part that cannot be deployed runs by its own code, with a note; deploy_ does not fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.deploy import backends, deployed_graph
from legocompress.errors import DeployError, KernelError, UsageError
from tests.support.deploying import Block, X, conv, converted, relative


class Parts(nn.Module):
    """Two blocks, which are traced one by one since the network looks at its values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), nn.Sequential(conv(16, 16), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > -1e9 else x


def check_fallback(model: nn.Module, note: str, deployed: tuple[str, ...] = ()) -> lego.Deployment:
    """Deploy, and expect one part to run by its own code."""
    model.eval()
    with torch.no_grad():
        expected = model(X)
        lego.deploy_(model, X, seconds=0)
        assert relative(expected, model(X)) < 1e-5
    found = lego.lego_state(model).deployment
    assert found is not None
    notes = [text for text in found.notes if "runs by its own code" in text]
    assert len(notes) == 1
    assert notes[0].startswith(note)
    ours = {name for name, part in model.named_modules() if "forward" in part.__dict__}
    assert ours == set(deployed)
    frozen = {name for name, layer in lego.lego_modules(model) if layer.frozen_weight is not None}
    assert frozen == {
        name for name, _ in lego.lego_modules(model) if not name.startswith(tuple(deployed) or "?")
    }
    return found


def break_build(monkeypatch: pytest.MonkeyPatch, route: Any, error: Exception, n_out: int) -> None:
    """Let a backend refuse the convs of one number of outputs."""
    backend = backends.BACKENDS[route]

    def build(folded: Any, *args: Any) -> Any:
        if folded.shape.n_out == n_out:
            raise error
        return backend.build(folded, *args)

    monkeypatch.setitem(backends.BACKENDS, route, replace(backend, build=build))


@pytest.mark.parametrize("error", [RuntimeError("no memory\nat all"), ValueError(), KeyError(3)])
def test_a_backend_that_always_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    break_build(monkeypatch, "assemble", error, 16)
    name = "RuntimeError" if isinstance(error, KeyError) else type(error).__name__
    found = check_fallback(converted(Block(), X), f"(root) runs by its own code: {name}: ")
    assert (found.n_layers, found.n_lego, found.milliseconds) == (0, 0, {})


@pytest.mark.parametrize("error", [RuntimeError("refused"), KernelError("not finite")])
def test_a_backend_that_refuses_a_layer_is_not_used(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for route in ("fused", "winograd", "onednn", "table"):
        break_build(monkeypatch, route, error, 16)
    model = lego.deploy_(converted(Block(), X), X, seconds=0)
    found = lego.lego_state(model).deployment
    assert found is not None
    assert found.notes == ()
    assert found.choices.routes["conv2"] in ("assemble", "reference")


def test_the_other_parts_are_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    break_build(monkeypatch, "assemble", RuntimeError("no memory"), 8)
    note = "first runs by its own code: RuntimeError: no memory"
    found = check_fallback(converted(Parts(), X), note, deployed=("second",))
    assert (found.n_layers, found.n_activations) == (1, 1)
    assert found.choices.formats.keys() == {"first", "second"}


def test_autotuning_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("no time")

    monkeypatch.setattr("legocompress.deploy.autotune.pick_fastest", fail)
    check_fallback(converted(Block(), X), "(root) runs by its own code: ZeroDivisionError: no time")


class Limited(nn.Conv1d):
    """Fails at one of its calls; stays one node of a traced graph."""

    def __init__(self, n_calls: int) -> None:
        super().__init__(1, 1, 1)
        self.left = n_calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise OSError("not again")
        return x


@pytest.mark.parametrize(
    ("n_calls", "note"),
    [
        (1, ["(root) is not traced as a whole: OSError: not again"]),
        (2, ["(root) runs by its own code: OSError: not again"]),  # layers in NCHW
        (3, []),  # layers in channels_last, a format that is left out then
        (4, ["(root) runs by its own code: OSError: not again"]),  # the whole graph
    ],
)
def test_a_graph_that_does_not_run_on_the_example(n_calls: int, note: list[str]) -> None:
    model = nn.Sequential(conv(3, 8), conv(8, 8), Limited(n_calls), conv(8, 8)).eval()
    with torch.no_grad():
        lego.deploy_(model, X, seconds=0)
    found = lego.lego_state(model).deployment
    assert found is not None
    assert list(found.notes) == note


def test_a_plan_that_cannot_be_installed_can_be_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise AttributeError("no such tape")

    model = converted(Block(), X)
    with monkeypatch.context() as patched:
        patched.setattr("legocompress.deploy.deployment.install_", fail)
        found = check_fallback(model, "(root) runs by its own code: AttributeError: no such tape")
        with pytest.raises(DeployError, match=r"no single graph.*no such tape"):
            deployed_graph(model)
    with torch.no_grad():
        expected = model(X)
        lego.deploy_(model, X, choices=found.choices)
        assert lego.lego_state(model).deployment.notes == ()  # type: ignore[union-attr]
        assert relative(expected, model(X)) < 1e-5


def test_choices_that_cannot_be_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lego.deploy_(converted(Block(), X), X, seconds=0, only=("assemble",))
    choices = lego.lego_state(model).deployment.choices  # type: ignore[union-attr]
    break_build(monkeypatch, "assemble", ValueError("no"), 16)
    lego.deploy_(model, X, choices=choices)
    notes = lego.lego_state(model).deployment.notes  # type: ignore[union-attr]
    assert notes == ("(root) runs by its own code: ValueError: no",)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_the_errors_of_a_callback_are_raised(error: BaseException) -> None:
    model = converted(Parts(), X)

    def stop(name: str) -> None:
        if name.startswith("first"):
            raise error

    with pytest.raises(type(error)):
        lego.deploy_(model, X, seconds=0, on_layer=stop)
    if isinstance(error, OSError):
        assert lego.lego_state(model).deployment is None
        assert not any("forward" in part.__dict__ for part in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": ("quick",)}, "no route 'quick'; there are assemble, onednn"),
        ({"formats": ()}, "name one or more of nchw, channels_last"),
        ({"formats": ("nhwc",)}, "name one or more of nchw, channels_last"),
    ],
)
def test_wrong_usage_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lego.deploy_(converted(Block(), X), X, **settings)
