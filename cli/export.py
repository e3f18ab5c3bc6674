"""`export`: from a compressed folder to files that need nothing of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import legocompress as lego
from legocompress.checkpoint.hub import is_hub_name
from legocompress.errors import UsageError

from . import render
from .options import force_option, json_option

ENDINGS = {"dense": "-dense.safetensors", "timm": "-timm", "onnx": ".onnx", "pt2": ".pt2"}


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--to", "kind", type=click.Choice(list(ENDINGS)), default="dense", help="What to write."
)
@click.option(
    "--form",
    type=click.Choice(["lego", "assemble-at-load", "dense", "fused"]),
    help="What an onnx (not fused) or pt2 (not assemble-at-load) file holds. [default: lego]",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="File or folder. [default: CHECKPOINT...]"
)
@force_option
@json_option
def export(
    checkpoint: Path, kind: str, form: Any, out: Path | None, force: bool, as_json: bool
) -> None:
    """Write a compressed folder as a dense state dict, a timm folder, ONNX or torch.export file."""
    if form and kind in ("dense", "timm"):
        raise UsageError(f"--to {kind} holds dense weights; --form is for onnx and pt2")
    hub = is_hub_name(checkpoint)
    place = Path(checkpoint.name.replace("@", "-")) if hub else checkpoint
    place = place if place.name not in ("", "..") else place.resolve()
    middle = f"-{form}" if form not in (None, "lego") else ""
    target = out or place.with_name(f"{place.name}{middle}{ENDINGS[kind]}")
    model = lego.load(checkpoint)
    found: dict[str, Any] = {}
    if kind in ("dense", "timm"):
        (lego.export_dense if kind == "dense" else lego.export_timm)(model, target, force)
        size = sum(f.stat().st_size for f in (target, *target.glob("*")) if f.is_file())
    else:
        write = lego.export_onnx if kind == "onnx" else lego.export_program
        exported = write(model, target, form or "lego", force)
        size = exported.bytes
        found = {
            "form": exported.form,
            "max_difference": exported.max_difference,
            "relative_difference": exported.relative_difference,
        }
    if as_json:
        render.print_json({"out": str(target), "bytes": size, **found})
        return
    click.echo(f"{checkpoint} -> {target} ({render.size(8 * size)})")
    if found:
        runner = "ONNX Runtime" if kind == "onnx" else "the reloaded program"
        click.echo(
            f"largest difference of outputs, {runner} against the network: "
            f"{found['max_difference']:.1e} ({found['relative_difference']:.1e} of the largest)"
        )
