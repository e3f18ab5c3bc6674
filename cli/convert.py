"""`convert` writes a compressed folder from a dense network; `inspect` only shows the plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click
import torch
from timm.utils import reparameterize_model
from torch import nn

import legocompress as lego
from legocompress.checkpoint import check_target
from legocompress.compress.budget import check_budget
from legocompress.errors import UsageError
from legocompress.models.source import source_of
from legocompress.spec import LegoSpec
from legocompress.state.quantization import PRECISIONS

from . import render
from .calibration import (
    SYNTHETIC,
    make_page_sources,
    measure_sensitivity,
    open_calibration_images,
    open_labelled,
    remove_journal,
    run_calibration,
)
from .help import SectionedCommand
from .html_page import write_page
from .json_log import log_json_option
from .options import (
    CalibrationRequest,
    calibration_options,
    check_html_target,
    device_option,
    force_option,
    html_option,
    json_option,
    model_options,
    read_budget,
    read_calibration,
    read_create_args,
    read_device,
    read_spec,
    refuse_calibration_options,
    spec_options,
)
from .progress import progress_bar
from .quantize import (
    check_precision,
    open_photos,
    print_quantization,
    quantization_values,
    run_quantization,
)


@click.command(cls=SectionedCommand)
@click.argument("model")
@spec_options
@model_options
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write. [default: MODEL-lego]"
)
@click.option(
    "--seed",
    type=click.IntRange(-(2**63), 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the clustering and of random weights.",
)
@click.option(
    "--calibrate",
    "calibration_data",
    metavar="DATA",
    help="Calibrate with unlabelled images: a folder, .npz file, timm data set, or 'synthetic'.",
)
@click.option(
    "--spend-by",
    type=click.Choice(["weights", "images"]),
    default="weights",
    help="What a budget is spent by: errors of weights, or losses on the images of --calibrate.",
)
@calibration_options
@click.option(
    "--precision",
    help=f"Quantise, too, by the images of --calibrate: {', '.join(PRECISIONS)}.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@log_json_option
@device_option
@html_option
@force_option
@json_option
def convert(
    model: str,
    out: Path | None,
    seed: int,
    calibration_data: str | None,
    spend_by: str,
    precision: str | None,
    dry_run: bool,
    device: str,
    html: Path | None,
    force: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Convert MODEL and write it as a compressed folder.

    MODEL is a name (resnet50, timm/NAME, torchvision/NAME, hf-hub:USER/REPO) or a timm folder.
    """
    weights = values["weights"]
    spec, budget = read_spec(values), read_budget(values)
    calibration_values = read_calibration(values)
    if calibration_data is None:
        refuse_calibration_options(calibration_values)
    if spend_by == "images" and (calibration_data is None or not budget):
        raise UsageError(
            "--spend-by images needs a budget and images; give --max-size or --max-macs, and "
            "--calibrate DATA"
        )
    _check_precision(precision, calibration_data)
    target = out or Path(f"{model.rstrip('/').rpartition('/')[2].replace(':', '-')}-lego")
    if dry_run and html is not None:
        raise UsageError("--html shows a converted network; leave out --dry-run")
    if not dry_run:
        check_target(target, force)
        check_html_target(html, force, target)
    network = _open_dense(model, seed, read_device(device), values)
    request = images = labelled = sensitivity = None
    if calibration_data is not None:
        request = CalibrationRequest(calibration_data, seed=seed, **calibration_values)
        labelled = open_labelled(network, request)
        if spend_by == "images":
            check_budget(spec, budget)  # before minutes of measuring
            images = open_calibration_images(network, request, as_json)
            sensitivity = measure_sensitivity(
                network, spec, images, request, None if dry_run else target, as_json
            )
    plan = _make_plan(network, spec, budget, seed, as_json, sensitivity)
    if dry_run:
        _print_plan(plan, as_json)
        return
    needs_original = request is not None or html is not None
    original = _copy_original(network, plan) if needs_original else None
    sources = lego.ReportSources(original)
    record = None
    if request is None or original is None:
        _convert(network, plan, seed, as_json)
    else:
        if html is not None:
            sources = make_page_sources(original, request)
        _convert(network, plan, seed, as_json)
        record = run_calibration(network, original, request, labelled, target, as_json, images)
        if precision is not None:
            photos = open_photos(network, request, precision)
            run_quantization(network, photos, precision, request.batch_size, as_json)
    lego.save(network, target, force)
    remove_journal(target)
    expected = None if sensitivity is None else _add_up_losses(network, sensitivity)
    report = lego.measure(network, path=target)
    if html is not None:
        write_page(network, html, report, sources, force, as_json)
    outcome = render.describe_outcome(target, record, source_of(network), weights)
    _print_result(model, target, plan, report, network, expected, outcome, as_json)


def _check_precision(precision: str | None, calibration_data: str | None) -> None:
    """Raise UsageError for a precision that does not exist, or without photos."""
    if precision is None:
        return
    check_precision(precision)
    if calibration_data in (None, SYNTHETIC):
        raise UsageError("--precision needs photos to measure ranges on; give --calibrate PHOTOS")


@click.command(cls=SectionedCommand)
@click.argument("model")
@spec_options
@model_options
@json_option
def inspect(model: str, as_json: bool, **values: Any) -> None:
    """Show what `convert` would do to MODEL, layer by layer; nothing is changed or written."""
    spec, budget = read_spec(values), read_budget(values)
    network = _open_dense(model, 0, read_device("cpu"), values)
    _print_plan(_make_plan(network, spec, budget, 0, as_json), as_json)


def _open_dense(model: str, seed: int, device: torch.device, values: dict[str, Any]) -> nn.Module:
    """Open a network on a device.

    Raises:
        UsageError: it is a compressed network already.
    """
    network = lego.open_model(model, seed=seed, **read_create_args(values)).to(device)
    if any(True for _ in lego.lego_modules(network)):
        raise UsageError(f"{model!r} is compressed already; give the original network")
    return network


def _add_up_losses(network: nn.Module, sensitivity: lego.Sensitivity) -> tuple[float, bool]:
    """The sum of the losses of all converted layers, and whether they are KL divergences."""
    errors = {
        name: layer.weight_error
        for name, layer in lego.lego_modules(network)
        if layer.weight_error is not None
    }
    return sensitivity.add_up(errors), sensitivity.divergence


def _make_plan(
    network: nn.Module,
    spec: LegoSpec,
    budget: dict[str, float],
    seed: int,
    quiet: bool,
    sensitivity: lego.Sensitivity | None = None,
) -> lego.Plan:
    """Plan the conversion; with a budget, first choose m, o and k of every layer."""
    if budget:
        with progress_bar(quiet) as bar:
            task = bar.add_task("sizing layers", total=None)

            def on_layer(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            spec = lego.allocate(
                network, spec, **budget, seed=seed, sensitivity=sensitivity, on_layer=on_layer
            )
    return lego.plan(network, spec)


def _copy_original(network: nn.Module, plan: lego.Plan) -> nn.Module:
    """Copy the dense network before its conversion; fused, if the conversion fuses it."""
    original = copy.deepcopy(network)
    return reparameterize_model(original) if plan.reparameterize else original


def _convert(network: nn.Module, plan: lego.Plan, seed: int, quiet: bool) -> None:
    with progress_bar(quiet) as bar:
        task = bar.add_task("clustering", total=len(plan.layers))
        lego.convert_(network, plan, seed, lambda row: bar.advance(task))


def _print_plan(plan: lego.Plan, as_json: bool) -> None:
    if as_json:
        render.print_plan_json(plan)
    else:
        render.print_plan(plan)


def _print_result(
    model: str,
    target: Path,
    plan: lego.Plan,
    report: lego.Report,
    network: nn.Module,
    expected: tuple[float, bool] | None,
    outcome: render.Outcome,
    as_json: bool,
) -> None:
    record, quantization = outcome.record, lego.lego_state(network).quantization
    if as_json:
        values = {"out": str(target), **report.totals(), "skipped": plan.skipped}
        values["calibration"] = None if record is None else record.model_dump()
        values["quantization"] = None
        if quantization is not None:
            values["quantization"] = quantization_values(quantization)
        values["expected_loss"] = None if expected is None else expected[0]
        values["outcome"] = outcome.to_dict()
        render.print_json(values)
        return
    click.echo(f"{model} -> {target}: {len(plan.layers)} of {len(plan.rows)} layers converted")
    render.print_skipped(plan.skipped)
    render.print_totals(report)
    if record is not None:
        render.print_calibration(record)
    if expected is not None:
        render.print_sum(expected[0], record, expected[1])
    if quantization is not None:
        print_quantization(quantization)
    render.print_outcome(outcome)
