"""`export`: from a compressed folder to weights that need nothing of this package."""

from __future__ import annotations

from pathlib import Path

import click

import legocompress as lego
from legocompress.export import export_dense

from . import render
from .options import force_option, json_option


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(["dense"]), default="dense", help="Form to write.")
@click.option("--out", type=click.Path(path_type=Path), help="File. [default: CHECKPOINT-dense...]")
@force_option
@json_option
def export(checkpoint: Path, form: str, out: Path | None, force: bool, as_json: bool) -> None:
    """Write a compressed folder as a plain state dict of the original architecture."""
    place = checkpoint if checkpoint.name not in ("", "..") else checkpoint.resolve()
    target = out or place.with_name(f"{place.name}-{form}.safetensors")
    export_dense(lego.load(checkpoint), target, force)
    size = target.stat().st_size
    if as_json:
        render.print_json({"out": str(target), "bytes": size})
    else:
        click.echo(f"{checkpoint} -> {target} ({render.size(8 * size)})")
