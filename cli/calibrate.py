"""`calibrate`: repair a compressed folder with unlabelled images, as `convert --calibrate` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from timm.utils import reparameterize_model

import legocompress as lego
from legocompress.checkpoint import check_target
from legocompress.models.source import source_of

from . import render
from .calibration import make_page_sources, open_labelled, remove_journal, run_calibration
from .help import SectionedCommand
from .html_page import write_page
from .json_log import log_json_option
from .options import (
    CalibrationRequest,
    calibration_options,
    check_html_target,
    create_recorded_original,
    device_option,
    force_option,
    html_option,
    json_option,
    open_original,
    original_options,
    read_calibration,
    read_device,
)


@click.command(cls=SectionedCommand)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    help="Image folder, .npz file or timm data set; or 'synthetic' to use no images.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write. [default: CKPT-calibrated]"
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Seed of everything random.")
@calibration_options
@original_options
@log_json_option
@device_option
@html_option
@force_option
@json_option
def calibrate(
    checkpoint: Path,
    data: str,
    out: Path | None,
    seed: int,
    original: str | None,
    original_weights: Path | None,
    device: str,
    html: Path | None,
    force: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Repair the compressed folder CHECKPOINT with unlabelled images, towards its original."""
    request = CalibrationRequest(data, seed=seed, **read_calibration(values))
    target = out or Path(f"{str(checkpoint).rstrip('/')}-calibrated")
    check_target(target, force)
    check_html_target(html, force, target)
    torch_device = read_device(device)
    network = lego.load(checkpoint).to(torch_device)
    teacher = open_original(network, original, original_weights)
    if teacher is None:
        teacher = create_recorded_original(network)
    if source_of(network).reparameterized:
        teacher = reparameterize_model(teacher)
    teacher = teacher.to(torch_device)
    labelled = open_labelled(teacher, request)
    record = run_calibration(network, teacher, request, labelled, target, as_json)
    lego.save(network, target, force)
    remove_journal(target)
    if html is not None:
        sources = make_page_sources(teacher, request)
        write_page(network, html, lego.measure(network, path=target), sources, force, as_json)
    outcome = render.describe_outcome(target, record, source_of(network))
    if as_json:
        render.print_json({"out": str(target), **record.model_dump(), "outcome": outcome.to_dict()})
        return
    render.print_layer_repairs(record)
    render.print_calibration(record)
    render.print_outcome(outcome)
