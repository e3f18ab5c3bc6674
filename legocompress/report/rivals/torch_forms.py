"""The dense network in PyTorch: eager, scripted, compiled, and by the backends of `deploy_`."""

from __future__ import annotations

import contextlib
import copy
import importlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from legocompress import kernels
from legocompress.deploy import deploy_
from legocompress.report.rivals.form import LeftOut, Runner, Subject, count_weight_bytes
from legocompress.report.rivals.instructions import check_bf16
from legocompress.state.deployment import Format
from legocompress.state.model_state import lego_state

COMPILE_SECONDS = 240  # the limit of each torch.compile; 0 leaves these forms out


def build_eager(subject: Subject, layout: Format = "nchw") -> Runner:
    """Run the network as it is."""
    return _run_eager(subject.dense, layout)


def build_torchvision(subject: Subject, layout: Format = "nchw") -> Runner:
    """Run torchvision's network of this name; its weights are random, which costs no speed."""
    architecture = subject.architecture
    if architecture not in torchvision.models.list_models():
        raise LeftOut(f"torchvision has no network called {architecture!r}")
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = torchvision.models.get_model(architecture, weights=None)
    return _run_eager(network.eval(), layout)


def build_scripted(subject: Subject) -> Runner:
    """Trace, freeze and optimise by TorchScript."""
    jit: Any = torch.jit
    x = subject.x
    traced = jit.optimize_for_inference(jit.freeze(jit.trace(copy.deepcopy(subject.dense), x)))
    # The first two calls profile and optimise the graph.
    traced(x)
    traced(x)
    return Runner(traced, count_bytes=lambda: count_weight_bytes(subject.dense))


def build_compiled(subject: Subject, layout: Format = "nchw") -> Runner:
    """Compile by torch.compile, with the weights frozen."""
    if layout == "nchw":
        return _compile(subject.dense, subject.x)
    return _compile(_to_channels_last(subject.dense), _change_format(subject.x), _change_format)


def build_bf16(subject: Subject) -> Runner:
    """Convert weights and images to bf16, in channels last."""
    check_bf16()
    model = _to_channels_last(subject.dense).bfloat16()
    return Runner(model, _to_bf16, lambda: count_weight_bytes(subject.dense, torch.bfloat16))


def build_bf16_scripted(subject: Subject) -> Runner:
    """Trace under autocast to bf16 and freeze, in channels last, as Intel advises for CPUs."""
    check_bf16()
    jit: Any = torch.jit
    x = _change_format(subject.x)
    # The cache of autocast would make the converted weights constants outside of the graph.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        traced = jit.freeze(jit.trace(_to_channels_last(subject.dense), x))
    traced(x)
    traced(x)
    return Runner(traced, _change_format, lambda: count_weight_bytes(subject.dense, torch.bfloat16))


def build_bf16_compiled(subject: Subject) -> Runner:
    """Compile the network converted to bf16, in channels last."""
    check_bf16()
    model = _to_channels_last(subject.dense).bfloat16()
    return _compile(model, _to_bf16(subject.x), _to_bf16)


def build_prepacked(subject: Subject) -> Runner:
    """Fold norms and pack weights for oneDNN."""
    model = copy.deepcopy(subject.dense)
    deploy_(model, subject.x, seconds=0, only=("onednn",), formats=("channels_last",))
    return Runner(model)


def build_winograd(subject: Subject) -> Runner:
    """Run the layers that are fastest so by our own Winograd."""
    if not kernels.available():
        raise LeftOut(str(kernels.why_unavailable()))
    model = copy.deepcopy(subject.dense)
    deploy_(model, subject.x, only=("onednn", "winograd"))
    deployment: Any = lego_state(model).deployment
    if "winograd" not in deployment.choices.routes.values():
        raise LeftOut("no layer of the network is fastest by Winograd")
    return Runner(model)


def build_deployed(subject: Subject) -> Runner:
    """Deploy the dense network as the compressed one is deployed."""
    return Runner(deploy_(copy.deepcopy(subject.dense), subject.x))


def _run_eager(model: nn.Module, layout: Format) -> Runner:
    def count_bytes() -> int:
        return count_weight_bytes(model)

    if layout == "nchw":
        return Runner(model, count_bytes=count_bytes)
    return Runner(_to_channels_last(model), _change_format, count_bytes)


def _to_channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _change_format(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _to_bf16(x: Tensor) -> Tensor:
    return _change_format(x.bfloat16())


def _compile(model: nn.Module, x: Tensor, prepare: Any = lambda x: x) -> Runner:
    """Compile a network for a prepared batch."""
    if not COMPILE_SECONDS:
        raise LeftOut("no time was given to compile")
    torch.compiler.reset()
    # Freezing lets it fold norms and pack weights, as every other form does.
    inductor: Any = importlib.import_module("torch._inductor.config")
    compiled = torch.compile(model)
    with _limit_time(COMPILE_SECONDS), inductor.patch(freezing=True):
        compiled(x)
    return Runner(compiled, prepare, lambda: count_weight_bytes(model))


@contextlib.contextmanager
def _limit_time(seconds: int) -> Iterator[None]:
    """Raise LeftOut in the body after `seconds`.

    This needs signals, so outside the main thread of a Unix process there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise LeftOut(f"compiling took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
