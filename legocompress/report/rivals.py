"""Build the rivals: the dense network in the fastest forms that a user could run instead.

To add a rival, add a line to RIVALS and the function that builds it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
COMPILE_SECONDS = 240  # the limit of each torch.compile; 0 leaves these forms out
Form = Callable[[], Any]


class _LeftOut(Exception):
    """A rival cannot run here; the message is the reason, in one sentence."""


@dataclass(frozen=True)
class _Subject:
    """What the rivals are built from.

    `dense` is the network with ordinary layers, in eval mode; `x` (N, c, H, W) the input that every
    rival runs on; `architecture` the name of the network, if it has one.
    """

    dense: nn.Module
    x: Tensor
    architecture: str | None


@dataclass(frozen=True)
class _Rival:
    """A dense form: its name in the report, the group that selects it, and how it is built.

    `same_weights` is false where the rival brings weights of its own, so that its output differs.
    `keeps_memory` is true where the rival's runtime keeps its memory from run to run, so that its
    peak cannot be measured.
    """

    name: str
    group: Against
    build: Callable[[_Subject], Form]
    same_weights: bool = True
    keeps_memory: bool = False


RIVALS = (
    _Rival("eager", "dense", lambda s: _build_eager(s.dense, s.x, "nchw")),
    _Rival("eager, channels_last", "dense", lambda s: _build_eager(s.dense, s.x, "channels_last")),
    _Rival("jit, frozen and optimized", "dense", lambda s: _build_scripted(s.dense, s.x)),
    _Rival("torch.compile", "dense", lambda s: _build_compiled(s.dense, s.x, "nchw")),
    _Rival(
        "torch.compile, channels_last",
        "dense",
        lambda s: _build_compiled(s.dense, s.x, "channels_last"),
    ),
    _Rival("oneDNN prepacked, norms folded", "dense", lambda s: _build_prepacked(s.dense, s.x)),
    _Rival("own Winograd", "dense", lambda s: _build_winograd(s.dense, s.x)),
    _Rival("deployed dense", "dense", lambda s: _build_deployed(s.dense, s.x)),
    _Rival(
        "torchvision",
        "torchvision",
        lambda s: _build_eager(_create_torchvision(s.architecture), s.x, "nchw"),
        same_weights=False,
    ),
    _Rival(
        "torchvision, channels_last",
        "torchvision",
        lambda s: _build_eager(_create_torchvision(s.architecture), s.x, "channels_last"),
        same_weights=False,
    ),
    _Rival(
        "ONNX Runtime",
        "onnxruntime",
        lambda s: _build_onnxruntime(s.dense, s.x),
        keeps_memory=True,
    ),
    _Rival("OpenVINO", "openvino", lambda s: _build_openvino(s.dense, s.x), keeps_memory=True),
)


def build_rivals(
    dense: nn.Module,
    architecture: str | None,
    x: Tensor,
    against: tuple[Against, ...],
    on_form: Callable[[str], None],
) -> Iterator[tuple[str, Form | str]]:
    """Build the selected rivals one by one, and check each against the dense network's output.

    Args:
        dense: the network with ordinary layers, in eval mode.
        architecture: its name, to find torchvision's network of the same name.
        x: (N, c, H, W), the input that every rival runs on.
        against: the groups of rivals to build, in this order.
        on_form: called with the name of each rival before it is built.

    Yields:
        The name of each rival, and a callable that runs it or the reason why it is left out.
    """
    subject = _Subject(dense, x, architecture)
    groups = {group: [r for r in RIVALS if r.group == group] for group in AGAINST}
    with torch.no_grad():
        expected = dense(x)
    for group in against:
        for rival in groups[group]:
            on_form(rival.name)
            yield rival.name, _build(rival, subject, expected)


def _build(rival: _Rival, subject: _Subject, expected: Any) -> Form | str:
    """Return what runs a rival, or the reason why it is left out."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            form = rival.build(subject)
            output = form()
        if rival.same_weights and not _is_same_output(expected, output):
            return "it computes something else"
        return form
    except _LeftOut as reason:
        return str(reason)
    # A rival may fail in any way; then it is left out, and the report tells why.
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _is_same_output(expected: Any, output: Any) -> bool:
    """Whether an output equals the expected tensor to a thousandth; only tensors are compared."""
    if not isinstance(expected, Tensor):
        return True
    output = torch.as_tensor(output)
    gap = float((expected - output).abs().max())
    return expected.shape == output.shape and gap <= 1e-3 * float(expected.abs().max())


def _build_eager(model: nn.Module, x: Tensor, layout: Format) -> Form:
    if layout == "nchw":
        return lambda: model(x)
    model, x = _to_channels_last(model, x)
    return lambda: model(x)


def _to_channels_last(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, x.contiguous(memory_format=torch.channels_last)


def _build_scripted(model: nn.Module, x: Tensor) -> Form:
    jit: Any = torch.jit
    traced = jit.optimize_for_inference(jit.freeze(jit.trace(copy.deepcopy(model), x)))
    # The first two calls profile and optimise the graph.
    traced(x)
    traced(x)
    return lambda: traced(x)


def _build_compiled(model: nn.Module, x: Tensor, layout: Format) -> Form:
    if not COMPILE_SECONDS:
        raise _LeftOut("no time was given to compile")
    model, x = _to_channels_last(model, x) if layout == "channels_last" else (model, x)
    torch.compiler.reset()
    # Freezing lets it fold norms and pack weights, as every other form does.
    inductor: Any = importlib.import_module("torch._inductor.config")
    compiled = torch.compile(model)

    def run() -> Any:
        with inductor.patch(freezing=True):
            return compiled(x)

    with _limit_time(COMPILE_SECONDS):
        run()
    return lambda: compiled(x)


@contextlib.contextmanager
def _limit_time(seconds: int) -> Iterator[None]:
    """Raise _LeftOut in the body after `seconds`.

    This needs signals, so outside the main thread of a Unix process there is no limit.
    """
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


def _build_prepacked(model: nn.Module, x: Tensor) -> Form:
    model = copy.deepcopy(model)
    deploy_(model, x, seconds=0, only=("onednn",), formats=("channels_last",))
    return lambda: model(x)


def _build_winograd(model: nn.Module, x: Tensor) -> Form:
    if not kernels.available():
        raise _LeftOut(str(kernels.why_unavailable()))
    model = copy.deepcopy(model)
    deploy_(model, x, only=("onednn", "winograd"))
    deployment: Any = lego_state(model).deployment
    if "winograd" not in deployment.choices.routes.values():
        raise _LeftOut("no layer of the network is fastest by Winograd")
    return lambda: model(x)


def _build_deployed(model: nn.Module, x: Tensor) -> Form:
    model = deploy_(copy.deepcopy(model), x)
    return lambda: model(x)


def _create_torchvision(architecture: str | None) -> nn.Module:
    """Create torchvision's network of this name; its weights are random, which costs no speed."""
    if architecture not in torchvision.models.list_models():
        raise _LeftOut(f"torchvision has no network called {architecture!r}")
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = torchvision.models.get_model(architecture, weights=None)
    return network.eval()


def _import_library(name: str, package: str) -> Any:
    """Import an optional library; raise _LeftOut with the package to install if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise _LeftOut(f"{package} is not installed: pip install {package}") from None


def _build_onnxruntime(model: nn.Module, x: Tensor) -> Form:
    runtime = _import_library("onnxruntime", "onnxruntime")
    _import_library("onnxscript", "onnxscript")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    # Threads that keep spinning after a run would slow down the form that runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "dense.onnx")
        torch.onnx.export(
            model, (x,), path, dynamo=True, external_data=False, input_names=["x"], verbose=False
        )
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)[0]


def _build_openvino(model: nn.Module, x: Tensor) -> Form:
    openvino = _import_library("openvino", "openvino")
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
