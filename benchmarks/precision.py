"""What lower precision gives on a CPU, beside Lego filters: speed, bytes and loss of each form.

    python -m benchmarks.precision --weights-dir weights --photos photos --labelled val \
        --class-map classes.txt --results precision.jsonl --plot precision.svg

Claim: int8 and bf16 alone are much faster than our fp32 forms on CPUs that have instructions for
them, and Lego networks in int8 are faster than the dense network in int8. Prints one row per
network and form: speed over --reference, in interleaved runs of one process, bytes of the file that
is shipped, and loss against the original. Int8 forms and ours are calibrated with --photos, without
labels; the loss is measured on --labelled. Networks without a file NETWORK.safetensors in
--weights-dir have random weights, and no loss. Takes some minutes per form of a small network, and
up to an hour for those of ResNet-50 and VGG-16-BN; --quick takes about a fifth. --speed-only
neither calibrates Lego networks nor measures their loss; it takes two minutes per form. Rows in
--results are not measured again; --table prints what is there. The environment variables
LEGOCOMPRESS_ISA (ours) and ONEDNN_MAX_CPU_ISA (OpenVINO) limit the instructions.
Needs `pip install 'legocompress[bench]'`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.common.arguments import make_parser, parse_file, parse_folder
from benchmarks.common.networks import ARCHITECTURES, open_network
from benchmarks.common.precision_tables import format_table, save_plot
from benchmarks.common.results import Results, Row
from legocompress.calibrate.calibration import EPOCHS
from legocompress.deploy.timing import cool_down_seconds, time_interleaved
from legocompress.models.probe import default_input
from legocompress.report.judge import Judge
from legocompress.report.rivals import RIVALS, Runner, check_packages
from legocompress.report.rivals.form import Subject
from legocompress.report.rivals.table import build_rival
from legocompress.report.versus_dense import COOL_DOWN_SECONDS

NETWORKS = (
    "resnet50", "resnet50_embed768", "vgg16_bn", "mobilenet_v2", "tf_efficientnet_lite0",
    "squeezenet1_1",
)  # fmt: skip
REFERENCES = ("OpenVINO", "OpenVINO int8")  # rivals whose speed is 1; the first is in fp32
SHRUNK_MACS = 0.5  # of the dense network's, for pruned and low-rank networks
QUICK = {"images": 32, "judged": 100, "epochs": 0}
SPEED_ONLY = {"images": 16, "judged": 16, "epochs": 0}


@dataclass(frozen=True)
class Form:
    """One row: the network that is made of the original, and what runs it.

    `make` gets the original, the calibration images (N, c, H, W) and the options. `run` builds what
    runs the network, for a batch and the current number of threads.
    """

    name: str
    make: Callable[[nn.Module, Tensor, argparse.Namespace], nn.Module]
    run: Callable[[Subject], Runner]


def keep(original: nn.Module, images: Tensor, options: argparse.Namespace) -> nn.Module:
    """The original as it is."""
    return original


def make_lego(
    spec: lego.LegoSpec, original: nn.Module, images: Tensor, options: argparse.Namespace
) -> nn.Module:
    """Convert, and calibrate unless only the speed counts."""
    network = copy.deepcopy(original)
    lego.convert_(network, lego.plan(network, spec))
    if not options.speed_only:
        lego.calibrate_(network, original, images, epochs=options.epochs)
    return network


def make_int8(
    spec: lego.LegoSpec | None, original: nn.Module, images: Tensor, options: argparse.Namespace
) -> nn.Module:
    """Quantise the original, or the Lego network of a spec."""
    if spec is None:
        network = copy.deepcopy(original)
    else:
        network = make_lego(spec, original, images, options)
    lego.quantize_(network, images)
    record = lego.lego_state(network).quantization
    assert record is not None
    print(f"  error of quantisation {record.error:.3f}, layers in fp32: {len(record.float_layers)}")
    return network


def shrink(
    method: str, original: nn.Module, images: Tensor, options: argparse.Namespace
) -> nn.Module:
    """Shrink to half of the MACs by another method, with the repair of benchmarks/rivals."""
    from benchmarks.rivals.costs import count_macs
    from benchmarks.rivals.repair import Repair, compress, list_planned

    names = list_planned(original, lego.LegoSpec(m=0.5, o=2))
    budget = ("macs", SHRUNK_MACS * count_macs(original))
    network, _ = compress(method, original, names, images, budget, Repair(options.epochs, 0))
    return network


def run_rival(name: str, subject: Subject) -> Runner:
    """Build a rival of `legocompress benchmark`."""
    rival = next(rival for rival in RIVALS if rival.name == name)
    with torch.no_grad():
        built = build_rival(rival, subject, subject.dense(subject.x))
    if isinstance(built, str):
        raise SystemExit(f"{name}: {built}")
    return built


def run_deployed(subject: Subject) -> Runner:
    """Deploy a Lego or quantised network; what is shipped is its compressed folder."""

    def count_bytes() -> int:
        with tempfile.TemporaryDirectory() as folder:
            saved = lego.save(subject.dense, Path(folder) / "lego")
            return sum(path.stat().st_size for path in saved.iterdir())

    network = lego.deploy_(copy.deepcopy(subject.dense), subject.x)
    deployment = lego.lego_state(network).deployment
    for note in () if deployment is None else deployment.notes:
        print(f"  note: {note}")
    return Runner(network, count_bytes=count_bytes)


HALF, QUARTER = lego.LegoSpec(m=0.5, o=2), lego.LegoSpec(m=0.25, o=4)
HALF_4, QUARTER_4 = lego.LegoSpec(m=0.5, o=2, k=4), lego.LegoSpec(m=0.25, o=4, k=4)

# To add a form, add a line.
FORMS = (
    Form("OpenVINO fp32", keep, partial(run_rival, "OpenVINO")),
    Form("OpenVINO bf16", keep, partial(run_rival, "OpenVINO bf16")),
    Form("OpenVINO int8", keep, partial(run_rival, "OpenVINO int8")),
    Form("ONNX Runtime fp32", keep, partial(run_rival, "ONNX Runtime")),
    Form("ONNX Runtime int8", keep, partial(run_rival, "ONNX Runtime int8")),
    Form("PyTorch bf16", keep, partial(run_rival, "PyTorch bf16, jit, frozen")),
    Form("Lego m=0.5 o=2 fp32", partial(make_lego, HALF), run_deployed),
    Form("Lego m=0.25 o=4 fp32", partial(make_lego, QUARTER), run_deployed),
    Form("dense int8", partial(make_int8, None), run_deployed),
    Form("Lego m=0.5 o=2 int8", partial(make_int8, HALF), run_deployed),
    Form("Lego m=0.25 o=4 int8", partial(make_int8, QUARTER), run_deployed),
    Form("Lego m=0.5 o=2 k=4 int8", partial(make_int8, HALF_4), run_deployed),
    Form("Lego m=0.25 o=4 k=4 int8", partial(make_int8, QUARTER_4), run_deployed),
    Form("pruned, OpenVINO int8", partial(shrink, "pruning"), partial(run_rival, "OpenVINO int8")),
    Form("Tucker, OpenVINO int8", partial(shrink, "tucker"), partial(run_rival, "OpenVINO int8")),
    Form("SVD, OpenVINO int8", partial(shrink, "svd"), partial(run_rival, "OpenVINO int8")),
)
BY_NAME = {form.name: form for form in FORMS}


def open_original(name: str, folder: Path) -> tuple[nn.Module, bool]:
    """The network, and whether its weights are trained."""
    path = folder / f"{name}.safetensors"
    if name in ARCHITECTURES and path.is_file():
        return open_network(name, folder).eval(), True
    library_name = ARCHITECTURES[name].name if name in ARCHITECTURES else f"torchvision/{name}"
    trained = path.is_file()
    network = lego.create(library_name, path if trained else None, pretrained=trained)
    return network.eval(), trained


def open_judge(original: nn.Module, options: argparse.Namespace) -> Judge:
    """Photos to calibrate with, and the labelled images that give agreement and top-1."""
    labelled = lego.open_images(
        str(options.labelled),
        original,
        class_map=None if options.class_map is None else str(options.class_map),
    ).sample(options.judged)
    photos = lego.open_images(str(options.photos), original, labels=False)
    n_outputs = original(default_input(original)).shape[1]
    has_classes = options.class_map is None or n_outputs == len(
        options.class_map.read_text().split()
    )
    return Judge(
        original, photos.sample(options.images), labelled, labelled if has_classes else None
    )


@dataclass(frozen=True)
class Source:
    """A network, whether its weights are trained, what judges its forms, and calibration images."""

    original: nn.Module
    trained: bool
    judge: Judge
    images: Tensor


def open_source(network: str, options: argparse.Namespace) -> Source:
    """Open a network once for all of its forms, which share what the judge keeps."""
    original, trained = open_original(network, options.weights_dir)
    with torch.no_grad():
        judge = open_judge(original, options)
    images = torch.cat([images for images, _ in judge.calibration.batches(16)])
    return Source(original, trained, judge, images)


def measure_form(
    form: Form, network: str, options: argparse.Namespace, opener: Callable[[str], Source]
) -> Row:
    """Make the network of a form, time it in every cell, and measure bytes and loss."""
    source = opener(network)
    original, judge, images = source.original, source.judge, source.images
    torch.set_num_threads(max(options.threads))
    made = form.make(original, images, options).eval()
    row: Row = {"cells": {}}
    for threads in options.threads:
        for batch in options.batch:
            print(f"  {network}, {form.name}: batch {batch}, {threads} threads", flush=True)
            torch.set_num_threads(threads)
            x = images[torch.arange(batch) % len(images)]
            runner = form.run(Subject(made, x, network, judge, judge.cache))
            row["cells"][f"{batch}x{threads}"] = time_against_reference(
                runner, Subject(original, x, network, judge, judge.cache), options
            )
            if "bytes" not in row:
                row["bytes"] = None if runner.count_bytes is None else runner.count_bytes()
                has_loss = source.trained and not options.speed_only
                row |= measure_loss(judge, runner, batch) if has_loss else {}
    return row


def measure_loss(judge: Judge, runner: Runner, batch: int) -> Row:
    """Agreement, output error and top-1, and the original's top-1."""
    score = judge.score(runner.predict, batch)
    return {
        "agreement": score.agreement,
        "output_error": score.output_error,
        "top1": score.top1,
        "original_top1": judge.original_score.top1,
    }


def time_against_reference(
    runner: Runner, reference: Subject, options: argparse.Namespace
) -> dict[str, float]:
    """Median time of the reference / median time of the form, and the spread of the form."""
    x = reference.x
    forms = {"form": runner.bind(x), "reference": run_rival(options.reference, reference).bind(x)}
    with torch.no_grad():
        cool_down = cool_down_seconds(x.device, COOL_DOWN_SECONDS)
        times = time_interleaved(
            forms, x.device, options.rounds, options.seconds, warm=True, cool_down=cool_down
        )
    low, median, high = statistics.quantiles(times["form"])
    return {
        "ratio": statistics.median(times["reference"]) / median,
        "spread": (high - low) / median,
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--weights-dir", type=parse_folder, required=True)
    parser.add_argument("--photos", type=parse_folder, required=True, help="to calibrate with")
    parser.add_argument("--labelled", type=parse_folder, required=True, help="images to judge by")
    parser.add_argument("--class-map", type=parse_file, help="class folders in order of outputs")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--form", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--images", type=int, default=300, help="photos to calibrate with")
    parser.add_argument("--judged", type=int, default=1000, help="labelled images to judge by")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of tuning all layers together")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--quick", action="store_true", help=f"sets {QUICK}")
    parser.add_argument("--reference", choices=REFERENCES, default=REFERENCES[0])
    parser.add_argument("--speed-only", action="store_true", help=f"sets {SPEED_ONLY}")
    parser.add_argument("--results", type=Path, default=Path("precision.jsonl"))
    parser.add_argument("--plot", type=Path, help="SVG file: speed and agreement of each form")
    parser.add_argument("--table", action="store_true", help="only print the table of --results")
    options = parser.parse_args()
    vars(options).update(QUICK if options.quick else {})
    vars(options).update(SPEED_ONLY if options.speed_only else {})
    return options


def main() -> None:
    """Measure what is missing, print the table and draw the plot."""
    options = parse_arguments()
    check_packages(("onnxruntime-int8", "openvino-int8"))
    results = Results(options.results)
    names = ("images", "judged", "epochs", "reference", "speed_only")
    settings = {name: getattr(options, name) for name in names}
    opener = functools.lru_cache(maxsize=1)(partial(open_source, options=options))
    for network in options.network:
        for name in () if options.table else options.form:
            key = {"network": network, "form": name, **settings}
            results.measure(key, partial(measure_form, BY_NAME[name], network, options, opener))
    print(format_table(results.rows))
    if options.plot is not None:
        save_plot(results.rows, options.plot)


if __name__ == "__main__":
    main()
