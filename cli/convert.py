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
from legocompress.errors import UsageError
from legocompress.spec import LegoSpec
from legocompress.state.quantization import PRECISIONS

from . import render
from .calibration import SYNTHETIC, open_labelled, remove_journal, run_calibration
from .options import (
    CalibrationRequest,
    calibration_options,
    device_option,
    force_option,
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


@click.command()
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
@calibration_options
@click.option(
    "--precision",
    help=f"Quantise, too, by the images of --calibrate: {', '.join(PRECISIONS)}.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@device_option
@force_option
@json_option
def convert(
    model: str,
    out: Path | None,
    seed: int,
    calibration_data: str | None,
    precision: str | None,
    dry_run: bool,
    device: str,
    force: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Convert MODEL and write it as a compressed folder.

    MODEL is a name (resnet50, timm/NAME, torchvision/NAME, hf-hub:USER/REPO) or a timm folder.
    """
    spec, budget = read_spec(values), read_budget(values)
    calibration_values = read_calibration(values)
    if calibration_data is None:
        refuse_calibration_options(calibration_values)
    _check_precision(precision, calibration_data)
    target = out or Path(f"{model.rstrip('/').rpartition('/')[2].replace(':', '-')}-lego")
    if not dry_run:
        check_target(target, force)
    network = _open_dense(model, seed, read_device(device), values)
    plan = _make_plan(network, spec, budget, seed, as_json)
    if dry_run:
        _print_plan(plan, as_json)
        return
    if calibration_data is None:
        _convert(network, plan, seed, as_json)
        record = None
    else:
        request = CalibrationRequest(calibration_data, seed=seed, **calibration_values)
        original = _copy_original(network, plan)
        labelled = open_labelled(original, request)
        _convert(network, plan, seed, as_json)
        record = run_calibration(network, original, request, labelled, target, as_json)
        if precision is not None:
            photos = open_photos(network, request, precision)
            run_quantization(network, photos, precision, request.batch_size, as_json)
    lego.save(network, target, force)
    remove_journal(target)
    _print_result(model, target, plan, lego.measure(network, path=target), network, record, as_json)


def _check_precision(precision: str | None, calibration_data: str | None) -> None:
    """Raise UsageError for a precision that does not exist, or without photos."""
    if precision is None:
        return
    check_precision(precision)
    if calibration_data in (None, SYNTHETIC):
        raise UsageError("--precision needs photos to measure ranges on; give --calibrate PHOTOS")


@click.command()
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


def _make_plan(
    network: nn.Module, spec: LegoSpec, budget: dict[str, float], seed: int, quiet: bool
) -> lego.Plan:
    """Plan the conversion; with a budget, first choose m, o and k of every layer."""
    if budget:
        with progress_bar(quiet) as bar:
            task = bar.add_task("sizing layers", total=None)

            def on_layer(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            spec = lego.allocate(network, spec, **budget, seed=seed, on_layer=on_layer)
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
    record: lego.Calibration | None,
    as_json: bool,
) -> None:
    quantization = lego.lego_state(network).quantization
    if as_json:
        values = {"out": str(target), **report.totals(), "skipped": plan.skipped}
        values["calibration"] = None if record is None else record.model_dump()
        values["quantization"] = None
        if quantization is not None:
            values["quantization"] = quantization_values(quantization)
        render.print_json(values)
        return
    click.echo(f"{model} -> {target}: {len(plan.layers)} of {len(plan.rows)} layers converted")
    render.print_skipped(plan.skipped)
    render.print_totals(report)
    if record is not None:
        render.print_calibration(record)
    if quantization is not None:
        print_quantization(quantization)
    click.echo(f"\nNext: legocompress report {target}")
