"""How long `evaluate` takes on photos, against ONNX Runtime on the same photos.

    python -m benchmarks.evaluate_speed --photos photos --class-map classes.txt --weights-dir w

Claim: with default options `evaluate` takes at most 1.3 times as long as ONNX Runtime for the same
dense network and JPEG files, decoding included on both sides. ONNX Runtime runs the exported
network with default session options on batches of 1 and of 32, and a pool of as many threads as
PyTorch computes with decodes ahead of it; the faster batch size counts. Its session is created
beforehand, whereas the form that `evaluate` runs is built within its time. Prints ratios of medians
of interleaved runs in one process, their spread over rounds, the ratio of CPU time (which includes
waiting in loops), and both accuracies. Networks without
a weights file have random values. Takes about a minute per network and round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import legocompress as lego
from benchmarks.common.arguments import make_parser, parse_file, parse_folder
from benchmarks.common.networks import add_weights_folder
from benchmarks.common.tables import format_head, format_row
from legocompress.data.images import Images, preprocessing

BATCH_SIZES = (1, 32)  # of ONNX Runtime
EVALUATE_BATCH = 64  # the default of the command


class OnnxEvaluation:
    """Top-1 accuracy of an exported network in ONNX Runtime, by a pool that decodes ahead."""

    def __init__(self, network: nn.Module, paths: list[tuple[str, int]], threads: int) -> None:
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dense.onnx"
            lego.export_onnx(network, path, form="dense")
            self.session = onnxruntime.InferenceSession(
                str(path), providers=["CPUExecutionProvider"]
            )
        transform: Any = preprocessing(network)[0]
        *self.resizing, _, normalise = transform.transforms
        self.mean, self.std = (
            np.asarray(value, np.float32).reshape(3, 1, 1)
            for value in (normalise.mean, normalise.std)
        )
        self.paths, self.threads = paths, threads

    def decode(self, path: str) -> Any:
        """Pixels (3, H, W), normalised."""
        with Image.open(path) as file:
            image = file.convert("RGB")
        for step in self.resizing:
            image = step(image)
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1)
        return (pixels / 255 - self.mean) / self.std

    def decode_ahead(self, batch_size: int) -> Iterator[Any]:
        """Yield batches (N, 3, H, W) while the pool decodes the next ones."""
        ahead = max(2 * batch_size, 4 * self.threads)
        with ThreadPoolExecutor(self.threads) as pool:
            pending: deque[Future[Any]] = deque()
            remaining = iter(self.paths)
            while True:
                for path, _ in remaining:
                    pending.append(pool.submit(self.decode, path))
                    if len(pending) >= ahead:
                        break
                if not pending:
                    return
                count = min(batch_size, len(pending))
                yield np.stack([pending.popleft().result() for _ in range(count)])

    def run(self, batch_size: int) -> float:
        """Percentage of images whose first class is their label."""
        name = self.session.get_inputs()[0].name
        outputs = [
            self.session.run(None, {name: batch})[0].argmax(1)
            for batch in self.decode_ahead(batch_size)
        ]
        labels = np.asarray([label for _, label in self.paths])
        return float(100 * (np.concatenate(outputs) == labels).mean())


def run_evaluate(network: nn.Module, images: Images) -> float:
    """Top-1 accuracy by `evaluate` with its defaults."""
    top1 = lego.evaluate(network, images.batches(EVALUATE_BATCH)).top1
    assert top1 is not None
    return top1


def list_paths(images: Images) -> list[tuple[str, int]]:
    """The files of a sample and their labels, in order."""
    sample: Any = images.dataset
    return [sample.dataset.items[position] for position in sample.indices]


def measure_network(name: str, options: argparse.Namespace) -> list[str]:
    """The row of one network."""
    torch.manual_seed(0)
    weights = options.weights_dir / f"{name}.safetensors" if options.weights_dir else None
    has_weights = weights is not None and weights.is_file()
    network = lego.create(f"torchvision/{name}", weights if has_weights else None)
    opened = lego.open_images(str(options.photos), network, class_map=str(options.class_map))
    images = opened.sample(options.images)
    onnx = OnnxEvaluation(network, list_paths(images), torch.get_num_threads())
    forms: dict[str, Callable[[], float]] = {"evaluate": partial(run_evaluate, network, images)}
    for batch_size in BATCH_SIZES:
        forms[f"batch {batch_size}"] = partial(onnx.run, batch_size)
    accuracies = {}
    times: dict[str, list[float]] = {form: [] for form in forms}
    cpu_times: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(options.rounds):
        for form, run in forms.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            accuracies[form] = run()
            times[form].append(time.perf_counter() - start)
            cpu_times[form].append(time.process_time() - cpu_start)
    medians = {form: statistics.median(values) for form, values in times.items()}
    best = min((form for form in forms if form != "evaluate"), key=medians.__getitem__)
    cpu = [statistics.median(cpu_times[form]) for form in ("evaluate", best)]
    ratios = [a / b for a, b in zip(times["evaluate"], times[best], strict=True)]
    return [
        name if has_weights else f"{name} (random)",
        f"{images.size}",
        f"{torch.get_num_threads()}",
        f"**{medians['evaluate'] / medians[best]:.2f}**",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"{cpu[0] / cpu[1]:.2f}",
        best,
        f"{accuracies['evaluate']:.2f} %",
        f"{accuracies[best]:.2f} %",
    ]


def main() -> None:
    """Measure each network and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--photos", type=parse_folder, required=True, help="one folder per class")
    parser.add_argument(
        "--class-map", type=parse_file, required=True, help="class folders in the outputs' order"
    )
    add_weights_folder(parser, False, "folder of NETWORK.safetensors")
    parser.add_argument("--network", nargs="+", default=["mobilenet_v2", "resnet18", "resnet50"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    columns = ["network", "photos", "threads", "evaluate / ONNX Runtime", "rounds", "CPU"]
    print(format_head([*columns, "its batch", "top-1, evaluate", "top-1, ONNX Runtime"]))
    for name in options.network:
        print(format_row(measure_network(name, options)), flush=True)


if __name__ == "__main__":
    main()
