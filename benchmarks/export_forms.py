"""Whether all exports agree with the compressed network, and how large they are.

    python -m benchmarks.export_forms --weights-dir weights --out exports --results export.jsonl
    python -m benchmarks.export_forms --results export.jsonl --table

Claim: every export (dense weights, timm folder, ONNX, pt2) computes what the compressed network
does, within float rounding, and the Lego forms are as small as the checkpoint. Converts five
networks with real weights (only with --weights-dir) and ten with random ones at m=0.5 o=2, saves
them, writes every form and compares the outputs. Prints the differences and the sizes. Takes about
a minute per network. Rows are appended to --results and not measured again.
"""

from __future__ import annotations

import json
import shutil
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.utils import reparameterize_model
from torch import Tensor, nn

import legocompress as lego
from benchmarks.common.export_files import ONNX_FORMS, get_place, make_export_parser
from benchmarks.common.networks import (
    FEATURES,
    NETWORKS,
    add_weights_folder,
    open_network,
    randomise_,
)
from benchmarks.common.results import Row, append_row, read_rows
from benchmarks.common.tables import format_head, format_row
from legocompress.errors import ExportError
from legocompress.export.interface import make_example_inputs, measure_differences
from legocompress.models.factory import build
from legocompress.models.source import source_of

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
PT2_FORMS: tuple[Any, ...] = ("lego", "dense", "fused")


def open_or_randomise(name: str, weights: Path | None) -> tuple[nn.Module, Tensor | None]:
    """A network and the image to export it with, None for that of its configuration."""
    if name not in NETWORKS:
        model = lego.create(name, pretrained=False)
        randomise_(model)
        return model, None
    if weights is None:
        raise SystemExit(f"{name} needs --weights-dir")
    image = torch.zeros(1, 3, 224, 224) if name == FEATURES else None
    return open_network(name, weights).eval(), image


def compare_dense(model: nn.Module, file: Path, images: Tensor) -> float:
    """The difference to a fresh dense network that loads the dense export strictly."""
    source = source_of(model)
    if source.library is None:
        fresh: nn.Module = torchvision.models.vgg16().features
    else:
        fresh = build(source)
        if source.reparameterized:
            fresh = reparameterize_model(fresh.eval())
    fresh.load_state_dict(load_file(file), strict=True)
    return compare_outputs(model, fresh, images)


def compare_outputs(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """The largest difference of outputs over the largest output."""
    with torch.no_grad():
        return measure_differences(model.eval()(images), other.eval()(images))[1]


def write_dense(model: nn.Module, place: Path, images: Tensor, row: Row) -> None:
    """Write the dense weights and the timm folder; adds sizes and differences to the row."""
    file = lego.export_dense(model, place / "dense.safetensors")
    row["bytes"]["dense"] = file.stat().st_size
    row["difference"]["dense"] = compare_dense(model, file, images)
    try:
        written = lego.export_timm(model, place / "timm")
        loaded = timm.create_model(f"local-dir:{written}", pretrained=True)
        row["difference"]["timm"] = compare_outputs(model, loaded, images)
    except ExportError as error:
        row["timm"] = str(error)


def write_graphs(model: nn.Module, place: Path, image: Tensor | None, row: Row) -> None:
    """Write the ONNX and pt2 forms; adds sizes and differences to the row."""
    for form in ONNX_FORMS:
        export = lego.export_onnx(model, place / f"{form}.onnx", form, example_input=image)
        row["bytes"][f"onnx {form}"] = export.bytes
        row["difference"][f"onnx {form}"] = export.relative_difference
    for form in PT2_FORMS:
        try:
            export = lego.export_program(model, place / f"{form}.pt2", form, example_input=image)
        except ExportError as error:
            row[f"pt2 {form}"] = str(error)
            continue
        row["bytes"][f"pt2 {form}"] = export.bytes
        row["difference"][f"pt2 {form}"] = export.relative_difference
        export.path.unlink()


def check_network(name: str, weights: Path | None, out: Path, dtype: str) -> Row:
    """Convert a network and write every form; sizes and differences."""
    model, image = open_or_randomise(name, weights)
    spec = lego.LegoSpec.model_validate({"m": 0.5, "o": 2, "dtype": dtype})
    plan = lego.plan(model, spec, image)
    model = lego.convert_(model, plan)
    place = get_place(out, name, dtype)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    folder = lego.save(model, place / "checkpoint")
    (images,) = make_example_inputs(model, image)
    size = sum(f.stat().st_size for f in folder.iterdir())
    row: Row = {"name": name, "dtype": dtype, "layers": len(plan.layers)}
    row |= {"bytes": {"checkpoint": size}, "difference": {}}
    write_dense(model, place, images, row)
    write_graphs(model, place, image, row)
    return row


def print_versions() -> None:
    """Print the versions of the packages that take part."""
    names = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} is not installed")
    print(", ".join(versions), "\n")


def print_tables(rows: list[Row]) -> None:
    """Print the differences, then the sizes."""
    columns = ["dense", "timm", *(f"onnx {form}" for form in ONNX_FORMS)]
    columns += [f"pt2 {form}" for form in PT2_FORMS]
    print(format_head(["network", *columns]))
    checked = [row for row in rows if "difference" in row]
    for row in (row for row in checked if row["dtype"] == "fp32"):
        values = [row["difference"].get(column) for column in columns]
        cells = ["" if value is None else f"{value:.0e}" for value in values]
        print(format_row([row["name"], *cells]))
    sizes = ["checkpoint", "onnx lego", "over it", *columns[3:]]
    print(f"\n{format_head(['network', 'filters', *sizes])}")
    for row in checked:
        size = row["bytes"]
        cells = [f"{size[key] / 1e6:.2f} MB" if key in size else "" for key in sizes]
        cells[2] = f"{size['onnx lego'] / size['checkpoint']:.3f}x"
        print(format_row([row["name"], row["dtype"], *cells]))


def main() -> None:
    """Check what is missing and print the tables."""
    parser = make_export_parser(__doc__)
    text = "folder of NETWORK.safetensors; without it only networks with random weights are checked"
    add_weights_folder(parser, required=False, text=text)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    rows = read_rows(args.results)
    done = {(r["name"], r["dtype"]) for r in rows if "difference" in r}
    pretrained = NETWORKS if args.weights_dir else ()
    jobs = [(n, d) for d in args.dtype for n in (args.only or [*pretrained, *RANDOM])]
    for name, dtype in [] if args.table else jobs:
        if (name, dtype) in done:
            continue
        row = check_network(name, args.weights_dir, args.out, dtype)
        append_row(args.results, row)
        rows.append(row)
        print(json.dumps(row), flush=True)
    print_versions()
    print_tables(rows)


if __name__ == "__main__":
    main()
