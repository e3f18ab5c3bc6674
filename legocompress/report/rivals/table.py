"""The table of rivals, and how they are built and checked.

To add a rival, add a line to RIVALS and the function that builds it.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from legocompress.errors import UsageError, first_line
from legocompress.report.judge import Judge
from legocompress.report.rivals import onnxruntime_forms, openvino_forms, torch_forms
from legocompress.report.rivals.form import EXTRA, LeftOut, Precision, Runner, Subject

Against = Literal[
    "dense",
    "torchvision",
    "torch-bf16",
    "onnxruntime",
    "onnxruntime-int8",
    "openvino",
    "openvino-bf16",
    "openvino-int8",
]
AGAINST: tuple[Against, ...] = get_args(Against)
ONNX = ("onnxruntime", "onnxscript", "onnx")
PACKAGES: dict[Against, tuple[str, ...]] = {
    "onnxruntime": ONNX,
    "onnxruntime-int8": ONNX,
    "openvino": ("openvino",),
    "openvino-bf16": ("openvino",),
    "openvino-int8": ("openvino", "nncf"),
}


@dataclass(frozen=True)
class Rival:
    """A dense form: its name in the report, the group that selects it, and how it is built.

    `same_weights` is false where the rival brings weights of its own, so that its output differs.
    `keeps_memory` is true where the rival's runtime keeps its memory from run to run, so that its
    peak cannot be measured.
    """

    name: str
    group: Against
    build: Callable[[Subject], Runner]
    precision: Precision = "fp32"
    same_weights: bool = True
    keeps_memory: bool = False


RIVALS = (
    Rival("eager", "dense", torch_forms.build_eager),
    Rival(
        "eager, channels_last", "dense", partial(torch_forms.build_eager, layout="channels_last")
    ),
    Rival("jit, frozen and optimized", "dense", torch_forms.build_scripted),
    Rival("torch.compile", "dense", torch_forms.build_compiled),
    Rival(
        "torch.compile, channels_last",
        "dense",
        partial(torch_forms.build_compiled, layout="channels_last"),
    ),
    Rival("oneDNN prepacked, norms folded", "dense", torch_forms.build_prepacked),
    Rival("own Winograd", "dense", torch_forms.build_winograd),
    Rival("deployed dense", "dense", torch_forms.build_deployed),
    Rival("torchvision", "torchvision", torch_forms.build_torchvision, same_weights=False),
    Rival(
        "torchvision, channels_last",
        "torchvision",
        partial(torch_forms.build_torchvision, layout="channels_last"),
        same_weights=False,
    ),
    Rival("PyTorch bf16, channels_last", "torch-bf16", torch_forms.build_bf16, "bf16"),
    Rival("PyTorch bf16, jit, frozen", "torch-bf16", torch_forms.build_bf16_scripted, "bf16"),
    Rival("PyTorch bf16, torch.compile", "torch-bf16", torch_forms.build_bf16_compiled, "bf16"),
    Rival("ONNX Runtime", "onnxruntime", onnxruntime_forms.build_fp32, keeps_memory=True),
    Rival(
        "ONNX Runtime int8",
        "onnxruntime-int8",
        onnxruntime_forms.build_int8,
        "int8",
        keeps_memory=True,
    ),
    Rival("OpenVINO", "openvino", openvino_forms.build_fp32, keeps_memory=True),
    Rival("OpenVINO bf16", "openvino-bf16", openvino_forms.build_bf16, "bf16", keeps_memory=True),
    Rival("OpenVINO int8", "openvino-int8", openvino_forms.build_int8, "int8", keeps_memory=True),
)


def check_packages(against: tuple[Against, ...]) -> None:
    """Raise UsageError if a group needs a package that is not installed."""
    for group in against:
        for package in PACKAGES.get(group, ()):
            if importlib.util.find_spec(package) is None:
                raise UsageError(
                    f"--against {group} needs the package {package}, which is not installed; run "
                    f"pip install '{EXTRA}', or leave {group} out"
                )


def build_rivals(
    dense: nn.Module,
    architecture: str | None,
    x: Tensor,
    against: tuple[Against, ...],
    on_form: Callable[[str], None],
    judge: Judge | None = None,
) -> Iterator[tuple[Rival, Runner | str]]:
    """Build the selected rivals one by one, and check each against the dense network's output.

    Args:
        dense: the network with ordinary layers, in eval mode.
        architecture: its name, to find torchvision's network of the same name.
        x: (N, c, H, W), the input that every rival runs on.
        against: the groups of rivals to build, in this order.
        on_form: called with the name of each rival before it is built.
        judge: has the photos to calibrate int8 forms with, whose original is `dense`; without it
            they are calibrated with random images, which shows their speed only.

    Yields:
        Each rival, and what runs it or the reason why it is left out.
    """
    subject = Subject(dense, x, architecture, judge, {} if judge is None else judge.cache)
    with torch.no_grad():
        expected = dense(x)
    for group in against:
        for rival in RIVALS:
            if rival.group == group:
                on_form(rival.name)
                yield rival, build_rival(rival, subject, expected)


def build_rival(rival: Rival, subject: Subject, expected: Any) -> Runner | str:
    """Return what runs a rival, or the reason why it is left out.

    Args:
        rival: one of `RIVALS`.
        subject: what it is built from.
        expected: the output of the dense network on `subject.x`.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            runner = rival.build(subject)
            output = runner.predict(subject.x)
        fault = _find_fault(rival, expected, output)
        return runner if fault is None else fault
    except LeftOut as reason:
        return str(reason)
    # A rival may fail in any way; then it is left out, and the report tells why.
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"[:200]


def _find_fault(rival: Rival, expected: Any, output: Any) -> str | None:
    """Compare an output with the expected tensor; only tensors of the same weights are compared.

    In fp32 a difference of a thousandth of the largest value is a fault. In other precisions it is
    not: `Judge` measures what they lose.
    """
    if not isinstance(expected, Tensor) or not rival.same_weights:
        return None
    if not isinstance(output, Tensor) or expected.shape != output.shape:
        return f"its output is not a tensor of shape {tuple(expected.shape)}"
    if rival.precision != "fp32":
        return None if bool(output.isfinite().all()) else "its output is not finite"
    gap = float((expected - output).abs().max())
    return None if gap <= 1e-3 * float(expected.abs().max()) else "it computes something else"
