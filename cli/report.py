"""`report`: size, cost and error of a compressed folder, theory next to measurement."""

from __future__ import annotations

from pathlib import Path

import click
from timm.utils import reparameterize_model
from torch import nn

import legocompress as lego
from legocompress.checkpoint.hub import local_folder
from legocompress.data.images import read_class_names
from legocompress.errors import UsageError
from legocompress.finetune.run_folder import find_run_folder
from legocompress.models.source import source_of

from . import render
from .help import SectionedCommand
from .html_page import write_page
from .options import (
    check_html_target,
    create_recorded_original,
    device_option,
    force_option,
    html_option,
    json_option,
    open_original,
    original_options,
    read_device,
)
from .progress import activity_bar
from .quantize import print_quantization, quantization_values


@click.command(cls=SectionedCommand)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--repeats",
    type=click.IntRange(0),
    default=0,
    help="Number of timed runs per form, interleaved with the dense network; 0 skips timing.",
)
@html_option
@click.option(
    "--data",
    metavar="PHOTOS",
    help="Photos on which the page compares the network with its original.",
)
@click.option(
    "--class-map",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text file: the names of the classes on the page, in the order of the outputs.",
)
@original_options
@device_option
@force_option
@json_option
def report(
    checkpoint: Path,
    repeats: int,
    html: Path | None,
    data: str | None,
    class_map: Path | None,
    original: str | None,
    original_weights: Path | None,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Report on a compressed folder: params, bits, bytes and MACs per layer, and the checks."""
    if html is None and any(v is not None for v in (data, class_map, original, original_weights)):
        raise UsageError(
            "--data, --class-map, --original and --original-weights are for the page; give --html "
            "FILE, too"
        )
    check_html_target(html, force)
    class_names = None if class_map is None else read_class_names(class_map)
    checkpoint = local_folder(checkpoint)
    model = lego.load(checkpoint).to(read_device(device))
    sources = lego.ReportSources(
        original=_open_original(model, original, original_weights, data is not None),
        photos=None if data is None else lego.open_images(data, model, labels=False),
        class_names=class_names,
        run_folder=find_run_folder(checkpoint),
    )
    baseline = lego.to_dense(model) if repeats else None
    with activity_bar("measuring", as_json):
        result = lego.measure(model, baseline, path=checkpoint, repeats=repeats)
    if html is not None:
        write_page(model, html, result, sources, force, quiet=True)
    record = lego.lego_state(model).calibration
    quantization = lego.lego_state(model).quantization
    if as_json:
        calibration = None if record is None else record.model_dump()
        quantized = None if quantization is None else quantization_values(quantization)
        values = {**result.to_dict(), "calibration": calibration, "quantization": quantized}
        render.print_json(values)
        return
    render.print_report(result)
    if record is not None:
        render.print_calibration(record)
    if quantization is not None:
        print_quantization(quantization)


def _open_original(
    model: nn.Module, name: str | None, weights: Path | None, needed: bool
) -> nn.Module | None:
    """Open the original for the page; without a name the recorded one, but only if it is needed."""
    original = open_original(model, name, weights)
    if original is None and needed:
        original = create_recorded_original(model)
    if original is None:
        return None
    if source_of(model).reparameterized:
        original = reparameterize_model(original)
    return original.to(next(model.parameters()).device)
