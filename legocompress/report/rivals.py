"""The dense network in the fastest forms that a user could run instead, as callables to time."""

from __future__ import annotations

import contextlib
import copy
import importlib
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import torch
import torchvision
from torch import Tensor, nn

from legocompress import kernels
from legocompress.deploy import deploy_
from legocompress.state.deployment import Format
from legocompress.state.model_state import lego_state

Against = Literal["dense", "torchvision", "onnxruntime", "openvino"]
AGAINST: tuple[Against, ...] = get_args(Against)
COMPILE_SECONDS = 240
Form = Callable[[], Any]


class _LeftOut(Exception):
    """Why a form cannot run here, in one sentence."""


def rivals(
    dense: nn.Module,
    architecture: str | None,
    x: Tensor,
    against: tuple[Against, ...],
    on_form: Callable[[str], None],
) -> Iterator[tuple[str, Form | str]]:
    """Build each form that is asked for, one by one: its name, and what runs it or why it cannot.

    Args:
        dense: the network with ordinary layers, in eval mode.
        architecture: its name, for torchvision's own network of that name.
        x: (N, c, H, W), the input that every form runs on.
        against: which groups of forms.
        on_form: called with each name before the form is built.
    """
    groups: dict[Against, list[tuple[str, Callable[[], Form]]]] = {
        "dense": [
            ("eager", lambda: _eager(dense, x, "nchw")),
            ("eager, channels_last", lambda: _eager(dense, x, "channels_last")),
            ("jit, frozen and optimized", lambda: _scripted(dense, x)),
            ("torch.compile", lambda: _compiled(dense, x, "nchw")),
            ("torch.compile, channels_last", lambda: _compiled(dense, x, "channels_last")),
            ("oneDNN prepacked, norms folded", lambda: _prepacked(dense, x)),
            ("own Winograd", lambda: _winograd(dense, x)),
            ("deployed dense", lambda: _deployed(dense, x)),
        ],
        "torchvision": [
            ("torchvision", lambda: _eager(_torchvision(architecture), x, "nchw")),
            (
                "torchvision, channels_last",
                lambda: _eager(_torchvision(architecture), x, "channels_last"),
            ),
        ],
        "onnxruntime": [("ONNX Runtime", lambda: _onnxruntime(dense, x))],
        "openvino": [("OpenVINO", lambda: _openvino(dense, x))],
    }
    with torch.no_grad():
        expected = dense(x)
    for group in against:
        for name, make in groups[group]:
            on_form(name)
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    form = make()
                    found = form()
                same = group == "torchvision" or _same(expected, found)
                yield name, form if same else "it computes something else"
            except _LeftOut as reason:
                yield name, str(reason)
            # A rival may fail in any way; it is left out then, and the reason is told.
            except Exception as error:
                yield name, f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _same(expected: Any, found: Any) -> bool:
    if not isinstance(expected, Tensor):
        return True
    found = torch.as_tensor(found)
    gap = float((expected - found).abs().max())
    return expected.shape == found.shape and gap <= 1e-3 * float(expected.abs().max())


def _eager(model: nn.Module, x: Tensor, layout: Format) -> Form:
    if layout == "nchw":
        return lambda: model(x)
    model, x = _channels_last(model, x)
    return lambda: model(x)


def _channels_last(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, x.contiguous(memory_format=torch.channels_last)


def _scripted(model: nn.Module, x: Tensor) -> Form:
    jit: Any = torch.jit
    traced = jit.optimize_for_inference(jit.freeze(jit.trace(copy.deepcopy(model), x)))
    traced(x)
    traced(x)
    return lambda: traced(x)


def _compiled(model: nn.Module, x: Tensor, layout: Format) -> Form:
    if not COMPILE_SECONDS:
        raise _LeftOut("no time was given to compile")
    model, x = _channels_last(model, x) if layout == "channels_last" else (model, x)
    torch.compiler.reset()
    # Frozen, it may fold norms and pack weights, as every other form does.
    inductor: Any = importlib.import_module("torch._inductor.config")
    compiled = torch.compile(model)

    def run() -> Any:
        with inductor.patch(freezing=True):
            return compiled(x)

    with _limited(COMPILE_SECONDS):
        run()
    return lambda: compiled(x)


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Stop what takes too long, where signals can: in the main thread of a Unix process."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _LeftOut(f"compiling took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _prepacked(model: nn.Module, x: Tensor) -> Form:
    model = copy.deepcopy(model)
    deploy_(model, x, seconds=0, only=("onednn",), formats=("channels_last",))
    return lambda: model(x)


def _winograd(model: nn.Module, x: Tensor) -> Form:
    if not kernels.available():
        raise _LeftOut(str(kernels.why_unavailable()))
    model = copy.deepcopy(model)
    deploy_(model, x, only=("onednn", "winograd"))
    deployment: Any = lego_state(model).deployment
    if "winograd" not in deployment.choices.routes.values():
        raise _LeftOut("no layer of the network is fastest by Winograd")
    return lambda: model(x)


def _deployed(model: nn.Module, x: Tensor) -> Form:
    model = deploy_(copy.deepcopy(model), x)
    return lambda: model(x)


def _torchvision(architecture: str | None) -> nn.Module:
    if architecture not in torchvision.models.list_models():
        raise _LeftOut(f"torchvision has no network called {architecture!r}")
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = torchvision.models.get_model(architecture, weights=None)
    return network.eval()


def _library(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise _LeftOut(f"{package} is not installed: pip install {package}") from None


def _onnxruntime(model: nn.Module, x: Tensor) -> Form:
    runtime = _library("onnxruntime", "onnxruntime")
    _library("onnxscript", "onnxscript")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    # Threads that spin on after a run would slow down the form that runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "dense.onnx")
        torch.onnx.export(
            model, (x,), path, dynamo=True, external_data=False, input_names=["x"], verbose=False
        )
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)[0]


def _openvino(model: nn.Module, x: Tensor) -> Form:
    openvino = _library("openvino", "openvino")
    converted = openvino.convert_model(model, example_input=x, input=list(x.shape))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def run() -> Any:
        request.infer()
        return request.get_output_tensor().data

    return run
