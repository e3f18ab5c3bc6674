"""Do all exports agree with the compressed network, how large are they, how fast do they run?

    python benchmarks/export.py --weights-dir WEIGHTS --out exports --results export.jsonl
    python benchmarks/export.py --out exports --results export.jsonl --latency 31 --threads 1
    python benchmarks/export.py --results export.jsonl --table

The first call converts five networks with real weights and ten with random ones at m=0.5 o=2,
saves them and writes every form; each file's outputs are held against the compressed network's. A
second call goes on where the first ended. The second line times the real networks' ONNX forms, in
interleaved runs, in ONNX Runtime and OpenVINO. The third prints the tables of docs/export.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from coverage import randomise_
from safetensors.torch import load_file
from timm.utils import reparameterize_model
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import ExportError
from legocompress.export.program import differences, example_images
from legocompress.models.factory import build
from legocompress.models.source import source_of

REAL = {
    "squeezenet1_1": ("torchvision/squeezenet1_1", {}),
    "mobilenet_v2": ("torchvision/mobilenet_v2", {}),
    "tf_efficientnet_lite0": ("timm/tf_efficientnet_lite0", {}),
    "resnet50_embed768": ("timm/resnet50", {"num_classes": 768}),
    "vgg16_features": (None, {}),
}
RANDOM = (
    "timm/resnet18",
    "timm/regnety_004",  # grouped convs
    "timm/convnext_atto",  # Linears as 1x1 convs
    "timm/densenet121",
    "timm/mobilenetv3_small_100",
    "timm/tf_efficientnetv2_b0",  # Conv2dSame
    "timm/nf_regnet_b0",  # convs that standardise their weights
    "timm/mobileone_s0",  # has a deployed form
    "torchvision/googlenet",
    "torchvision/shufflenet_v2_x1_0",
)
ONNX_FORMS: tuple[Any, ...] = ("lego", "assemble-at-load", "dense")
PT2_FORMS: tuple[Any, ...] = ("lego", "dense", "fused")
DTYPES = ("fp32", "fp16", "int8")


def open_network(name: str, weights: Path | None) -> tuple[nn.Module, Tensor | None]:
    """A network and the image to export it with, None for its own configuration's."""
    if name not in REAL:
        model = lego.create(name, pretrained=False)
        randomise_(model)
        return model, None
    assert weights is not None
    architecture, args = REAL[name]
    file = weights / f"{name}.safetensors"
    if architecture is not None:
        return lego.create(architecture, weights=file, **args), None
    features = torchvision.models.vgg16().features
    features.load_state_dict({k: v.float() for k, v in load_file(file).items()})
    return features.eval(), torch.zeros(1, 3, 224, 224)


def dense_difference(model: nn.Module, file: Path, images: Tensor) -> float:
    """How far a fresh dense network is that loads the dense export strictly."""
    source = source_of(model)
    if source.library is None:
        fresh: nn.Module = torchvision.models.vgg16().features
    else:
        fresh = build(source)
        if source.reparameterized:
            fresh = reparameterize_model(fresh.eval())
    fresh.load_state_dict(load_file(file), strict=True)
    return outputs_differ(model, fresh, images)


def outputs_differ(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """The largest difference of outputs over the largest output."""
    with torch.no_grad():
        return differences(model.eval()(images), other.eval()(images))[1]


def check(name: str, weights: Path | None, out: Path, dtype: str) -> dict[str, Any]:
    """Convert a network, write every form, and tell sizes and differences."""
    model, image = open_network(name, weights)
    plan = lego.plan(model, lego.LegoSpec(m=0.5, o=2, dtype=dtype), image)
    model = lego.convert_(model, plan)
    place = out / f"{name.replace('/', '-')}-{dtype}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    folder = lego.save(model, place / "checkpoint")
    images = example_images(model, image)
    row: dict[str, Any] = {
        "name": name,
        "dtype": dtype,
        "layers": len(plan.layers),
        "bytes": {"checkpoint": sum(f.stat().st_size for f in folder.iterdir())},
        "difference": {},
    }
    file = lego.export_dense(model, place / "dense.safetensors")
    row["bytes"]["dense"] = file.stat().st_size
    row["difference"]["dense"] = dense_difference(model, file, images)
    try:
        written = lego.export_timm(model, place / "timm")
        loaded = timm.create_model(f"local-dir:{written}", pretrained=True)
        row["difference"]["timm"] = outputs_differ(model, loaded, images)
    except ExportError as error:
        row["timm"] = str(error)
    for form in ONNX_FORMS:
        found = lego.export_onnx(model, place / f"{form}.onnx", form, example_input=image)
        row["bytes"][f"onnx {form}"] = found.bytes
        row["difference"][f"onnx {form}"] = found.relative_difference
    for form in PT2_FORMS:
        try:
            found = lego.export_program(model, place / f"{form}.pt2", form, example_input=image)
        except ExportError as error:
            row[f"pt2 {form}"] = str(error)
            continue
        row["bytes"][f"pt2 {form}"] = found.bytes
        row["difference"][f"pt2 {form}"] = found.relative_difference
        found.path.unlink()
    return row


def onnx_runtime(path: Path, threads: int) -> Callable[[Any], Any]:
    """A file as a function of ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})


def openvino(path: Path, threads: int) -> Callable[[Any], Any]:
    """A file as a function of OpenVINO, in float32."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda image: request.infer([image])


def speed(place: Path, runtime: str, threads: int, repeats: int) -> dict[str, Any]:
    """Time to load, and the median of dense / form over interleaved runs, batch 1."""
    load = {"ONNX Runtime": onnx_runtime, "OpenVINO": openvino}[runtime]
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)).numpy()
    forms: dict[str, Callable[[Any], Any]] = {}
    loading: dict[str, list[float]] = {form: [] for form in reversed(ONNX_FORMS)}  # dense first
    for _ in range(4):
        for form in loading:
            start = time.perf_counter()
            forms[form] = load(place / f"{form}.onnx", threads)
            loading[form].append(time.perf_counter() - start)
    taken: dict[str, list[float]] = {form: [] for form in loading}
    for turn in range(repeats + 2):
        for form, run in forms.items():
            start = time.perf_counter()
            run(image)
            if turn > 1:
                taken[form].append(time.perf_counter() - start)
    ratios = {
        form: [a / b for a, b in zip(taken["dense"], taken[form], strict=True)] for form in forms
    }
    return {
        "runtime": runtime,
        "threads": threads,
        "repeats": repeats,
        "load": {form: min(loading[form]) / min(loading["dense"]) for form in forms},
        "ratio": {form: statistics.median(values) for form, values in ratios.items()},
        "quartiles": {form: statistics.quantiles(values)[::2] for form, values in ratios.items()},
    }


def read(results: Path) -> list[dict[str, Any]]:
    """What earlier calls found."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def print_tables(rows: list[dict[str, Any]]) -> None:
    """The tables of docs/export.md."""
    names = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino")
    print(", ".join(f"{name} {version(name)}" for name in names), "\n")
    columns = ["dense", "timm", *(f"onnx {form}" for form in ONNX_FORMS)]
    columns += [f"pt2 {form}" for form in PT2_FORMS]
    print("| network |", " | ".join(columns), "|\n|---|" + "---|" * len(columns))
    checked = [row for row in rows if "difference" in row]
    for row in (row for row in checked if row["dtype"] == "fp32"):
        values = [row["difference"].get(column) for column in columns]
        cells = ["" if value is None else f"{value:.0e}" for value in values]
        print(f"| {row['name']} |", " | ".join(cells), "|")
    sizes = ["checkpoint", "onnx lego", "over it", *columns[3:]]
    print("\n| network | filters |", " | ".join(sizes), "|\n|" + "---|" * (2 + len(sizes)))
    for row in checked:
        size = row["bytes"]
        cells = [f"{size[key] / 1e6:.2f} MB" if key in size else "" for key in sizes]
        cells[2] = f"{size['onnx lego'] / size['checkpoint']:.3f}x"
        print(f"| {row['name']} | {row['dtype']} |", " | ".join(cells), "|")
    print("\n| network | filters | runtime | assemble-at-load | loads in | lego |\n|" + "---|" * 6)
    for row in (row for row in rows if "ratio" in row):
        cells = [
            f"{row['ratio'][form]:.2f}x ({row['quartiles'][form][0]:.2f} to "
            f"{row['quartiles'][form][1]:.2f})"
            for form in ("assemble-at-load", "lego")
        ]
        print(
            f"| {row['name']} | {row['dtype']} | {row['runtime']} | {cells[0]} "
            f"| {row['load']['assemble-at-load']:.1f}x | {cells[1]} |"
        )


def main() -> None:
    """Check, time, or print, as the options say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--weights-dir", type=Path, help="Real weights; without it, random nets.")
    parser.add_argument("--out", type=Path, default=Path("exports"), help="Where files are kept.")
    parser.add_argument("--results", type=Path, default=Path("export.jsonl"))
    parser.add_argument("--latency", type=int, default=0, help="Timed runs of each form.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=["fp32"])
    parser.add_argument("--only", nargs="*", help="Networks, by name.")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = read(args.results)
    if args.table:
        print_tables(rows)
        return
    real = list(REAL) if args.weights_dir or args.latency else []
    jobs = [(n, d) for d in args.dtype for n in (args.only or [*real, *RANDOM])]
    torch.set_num_threads(args.threads)
    with args.results.open("a") as file:

        def note(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)

        for name, dtype in jobs:
            done = {(r["name"], r["dtype"], r.get("runtime")) for r in rows}
            if not args.latency:
                if (name, dtype, None) not in done:
                    note(check(name, args.weights_dir, args.out, dtype))
                continue
            place = args.out / f"{name.replace('/', '-')}-{dtype}"
            for runtime in ("ONNX Runtime", "OpenVINO"):
                if (name, dtype, runtime) not in done and place.is_dir() and name in REAL:
                    found = speed(place, runtime, args.threads, args.latency)
                    note({"name": name, "dtype": dtype, **found})


if __name__ == "__main__":
    main()
