"""`convert` and `inspect`: from a dense network to a compressed folder, and what would happen."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from timm.utils import reparameterize_model
from torch import nn

import legocompress as lego
from legocompress.checkpoint import check_target
from legocompress.compress.plan_types import Plan
from legocompress.compress.planning import plan
from legocompress.errors import UsageError
from legocompress.spec import LegoSpec

from . import calibrate, render
from .options import (
    calibration_options,
    device_option,
    force_option,
    json_option,
    model_options,
    progress,
    read_budget,
    read_create_args,
    read_device,
    read_spec,
    spec_options,
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
    help="Of clustering and weights.",
)
@click.option(
    "--calibrate",
    "photos",
    metavar="DATA",
    help="Repair with unlabelled images: a folder, .npz file or timm data set, or 'synthetic'.",
)
@calibration_options
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@device_option
@force_option
@json_option
def convert(
    model: str,
    out: Path | None,
    seed: int,
    photos: str | None,
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
    settings = calibrate.read_calibration(values)
    target = out or Path(f"{model.rstrip('/').rpartition('/')[2].replace(':', '-')}-lego")
    if not dry_run:
        check_target(target, force)
    network = _open_dense(model, seed, read_device(device), values)
    planned = _plan(network, spec, budget, seed, as_json)
    if dry_run:
        _show_plan(planned, as_json)
        return
    original = None if photos is None else _original(network, planned)
    with progress(as_json) as bar:
        task = bar.add_task("clustering", total=len(planned.layers))
        lego.convert_(network, planned, seed, lambda row: bar.advance(task))
    record = None
    if photos is not None and original is not None:
        request = calibrate.Request(photos, seed=seed, **settings)
        record = calibrate.run(network, original, request, target, as_json)
    lego.save(network, target, force)
    calibrate.finish(target)
    report = lego.measure(network, path=target)
    if as_json:
        found = {"out": str(target), **report.totals(), "skipped": planned.skipped}
        found["calibration"] = None if record is None else record.model_dump()
        render.print_json(found)
        return
    click.echo(
        f"{model} -> {target}: {len(planned.layers)} of {len(planned.rows)} layers converted"
    )
    render.print_skipped(planned.skipped)
    render.print_totals(report)
    if record is not None:
        render.print_calibration(record)
    click.echo(f"\nNext: legocompress report {target}")


@click.command()
@click.argument("model")
@spec_options
@model_options
@json_option
def inspect(model: str, as_json: bool, **values: Any) -> None:
    """Show what `convert` would do to MODEL, layer by layer; nothing is changed or written."""
    spec, budget = read_spec(values), read_budget(values)
    network = _open_dense(model, 0, read_device("cpu"), values)
    _show_plan(_plan(network, spec, budget, 0, as_json), as_json)


def _original(network: nn.Module, planned: Plan) -> nn.Module:
    original = copy.deepcopy(network)
    return reparameterize_model(original) if planned.reparameterize else original


def _open_dense(model: str, seed: int, device: Any, values: dict[str, Any]) -> Any:
    network = lego.open_model(model, seed=seed, **read_create_args(values)).to(device)
    if any(True for _ in lego.lego_modules(network)):
        raise UsageError(f"{model!r} is compressed already; give the original network")
    return network


def _plan(
    network: nn.Module, spec: LegoSpec, budget: dict[str, float], seed: int, quiet: bool
) -> Plan:
    if budget:
        with progress(quiet) as bar:
            task = bar.add_task("sizing layers", total=None)

            def tell(done: int, of: int) -> None:
                bar.update(task, completed=done, total=of)

            spec = lego.allocate(network, spec, **budget, seed=seed, on_layer=tell)
    return plan(network, spec)


def _show_plan(planned: Plan, as_json: bool) -> None:
    if not as_json:
        render.print_plan(planned)
        return
    rows = [
        {
            **asdict(row),
            "spec": None if row.spec is None else row.spec.model_dump(mode="json"),
            "params": row.params,
            "bits": row.bits,
            "macs": row.macs,
            "proxy_params": row.proxy_params,
        }
        for row in planned.rows
    ]
    render.print_json(
        {
            "spec": planned.spec.model_dump(mode="json"),
            "layers": rows,
            "other_params": planned.other_params,
            "other_bits": planned.other_bits,
            "proxy_bytes": planned.proxy_bytes,
            "input_shape": planned.input_shape,
            "reparameterize": planned.reparameterize,
            "note": planned.note,
        }
    )
