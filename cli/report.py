"""`report`: size, cost and error of a compressed folder, theory next to measurement."""

from __future__ import annotations

from pathlib import Path

import click

import legocompress as lego
from legocompress.checkpoint.hub import local_folder

from . import render
from .options import device_option, json_option, read_device
from .quantize import print_quantization, quantization_values


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--repeats",
    type=click.IntRange(0),
    default=0,
    help="Number of timed runs per form, interleaved with the dense network; 0 skips timing.",
)
@device_option
@json_option
def report(checkpoint: Path, repeats: int, device: str, as_json: bool) -> None:
    """Report on a compressed folder: params, bits, bytes and MACs per layer, and the checks."""
    checkpoint = local_folder(checkpoint)
    model = lego.load(checkpoint).to(read_device(device))
    baseline = lego.to_dense(model) if repeats else None
    result = lego.measure(model, baseline, path=checkpoint, repeats=repeats)
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
