"""How quantised networks run as ONNX: file sizes, agreement with the integers, and speed.

    python -m benchmarks.export_int8

Claim: a quantised Lego network as `assemble-at-load` is about a third of the size of dense int8
weights, ONNX Runtime and OpenVINO fold it to the int8 convs of the dense file, and all forms
compute nearly what the integers do. Takes the shipped network at m=0.5 o=2, not calibrated, with
ranges from shipped images, and judges by others. Change is ||y - y'|| / ||y|| of the logits,
without their mean. Speed is the median, with the quartiles, of fp32 dense / form over interleaved
runs of batch 1 on one thread. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.common.arguments import make_parser
from benchmarks.common.export_files import ONNX_FORMS
from benchmarks.common.tables import format_head, format_row
from benchmarks.common.tasks import SHIPPED
from benchmarks.storage import open_image_sets

N_RANGES = 128  # images that ranges are measured on
CONVS = ("Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "Convolution")
Run = Callable[[Any], Any]


def open_onnx_runtime(path: Path) -> tuple[Run, str]:
    """A file as a function of ONNX Runtime, and the kinds of its convs after optimisation."""
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.optimized_model_filepath = f"{path}.optimised"
    providers = ["CPUExecutionProvider"]
    session = runtime.InferenceSession(str(path), options, providers=providers)
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    kinds = Counter(node.op_type for node in nodes if node.op_type in CONVS)
    return lambda image: session.run(None, {"image": image})[0], format_kinds(kinds)


def open_openvino(path: Path) -> tuple[Run, str]:
    """A file as a function of OpenVINO, and the precisions of the inputs of its convs."""
    openvino = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    kinds: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        notes = node.get_rt_info()
        if notes["layerType"].astype(str) in CONVS:
            kinds[notes["runtimePrecision"].astype(str)] += 1
    request = compiled.create_infer_request()
    return lambda image: request.infer([image])[0], format_kinds(kinds)


RUNTIMES = {"ONNX Runtime": open_onnx_runtime, "OpenVINO": open_openvino}


def format_kinds(kinds: Counter[str]) -> str:
    """The kinds with their numbers."""
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))


def time_runs(runs: dict[str, Run], image: Any, repeats: int) -> dict[str, str]:
    """Median and quartiles of the first run's time / each run's, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run(image)
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    ratios = {
        name: [a / b for a, b in zip(first, times, strict=True)] for name, times in seconds.items()
    }
    quartiles = {name: statistics.quantiles(values) for name, values in ratios.items()}
    return {name: f"{q[1]:.2f} ({q[0]:.2f} to {q[2]:.2f})" for name, q in quartiles.items()}


def compare(expected: Tensor, actual: Tensor) -> list[str]:
    """The change, and the percentage of images with the same class."""
    centred = expected - expected.mean(1, keepdim=True)
    change = float((actual - actual.mean(1, keepdim=True) - centred).norm() / centred.norm())
    agreement = 100 * float((expected.argmax(1) == actual.argmax(1)).double().mean())
    return [f"{change:.3f}", f"{agreement:.1f}"]


def write_files(k: int, place: Path) -> tuple[dict[str, lego.Exported], nn.Module, Tensor]:
    """The exports of the network, dense fp32 first; the int8 network, and images to judge by."""
    dense = lego.create(f"local-dir:{SHIPPED}").eval()
    sets = open_image_sets(dense, None)
    ranges, images = (torch.cat([x for x, _ in part.batches(64)]) for part in sets)
    model = lego.convert_(copy.deepcopy(dense), lego.plan(dense, lego.LegoSpec(m=0.5, o=2, k=k)))
    files = {"fp32 dense": lego.export_onnx(model, place / "fp32.onnx", "dense")}
    lego.quantize_(model, ranges[:N_RANGES])
    for form in ONNX_FORMS:
        files[f"int8 {form}"] = lego.export_onnx(model, place / f"{form}.onnx", form)
    return files, model, images


def print_rows(k: int, args: argparse.Namespace) -> None:
    """Write all forms at one k, run them, and print a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        files, model, images = write_files(k, Path(folder))
        with torch.no_grad():
            expected = torch.cat([model(batch) for batch in torch.split(images, 50)])
        for runtime in args.runtimes:
            opened = {name: RUNTIMES[runtime](file.path) for name, file in files.items()}
            runs = {name: run for name, (run, _) in opened.items()}
            image = images[:1].numpy()
            time_runs(runs, image, 10)
            ratios = time_runs(runs, image, args.repeats)
            for name, (run, kinds) in opened.items():
                actual = torch.from_numpy(run(images.numpy()))
                cells = [f"{files[name].bytes / 1e3:.0f}", *compare(expected, actual), kinds]
                print(format_row([runtime, k, name, *cells, ratios[name]]), flush=True)


def main() -> None:
    """Print one line per runtime, number of terms and form."""
    parser = make_parser(__doc__)
    parser.add_argument("--k", type=int, nargs="*", default=[1, 4], help="terms per slot")
    parser.add_argument("--repeats", type=int, default=101, help="runs that are timed")
    parser.add_argument("--runtimes", nargs="*", choices=RUNTIMES, default=list(RUNTIMES))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    columns = ["runtime", "k", "form", "kB", "change", "agreement %", "convs"]
    print(format_head([*columns, "fp32 dense / form"]))
    for k in args.k:
        print_rows(k, args)


if __name__ == "__main__":
    main()
