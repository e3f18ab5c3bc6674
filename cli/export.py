"""`export`: write a compressed folder as files that can be used without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch import nn

import legocompress as lego
from legocompress.checkpoint.hub import is_hub_name
from legocompress.errors import UsageError

from . import render
from .help import SectionedCommand
from .options import force_option, json_option
from .progress import activity_bar

ENDINGS = {"dense": "-dense.safetensors", "timm": "-timm", "onnx": ".onnx", "pt2": ".pt2"}
DENSE_KINDS = ("dense", "timm")


@click.command(cls=SectionedCommand)
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
    "--out",
    type=click.Path(path_type=Path),
    help="File or folder to write. [default: CHECKPOINT with an ending]",
)
@force_option
@json_option
def export(
    checkpoint: Path, kind: str, form: Any, out: Path | None, force: bool, as_json: bool
) -> None:
    """Write a compressed folder as a dense state dict, a timm folder, ONNX or torch.export file."""
    if form and kind in DENSE_KINDS:
        raise UsageError(f"--to {kind} holds dense weights; --form is for onnx and pt2")
    target = out or _default_target(checkpoint, kind, form)
    model = lego.load(checkpoint)
    check: dict[str, Any] = {}
    with activity_bar(f"writing {kind}", as_json):
        if kind in DENSE_KINDS:
            size = _write_dense(model, kind, target, force)
        else:
            size, check = _write_graph(model, kind, form or "lego", target, force)
    if as_json:
        render.print_json({"out": str(target), "bytes": size, **check})
        return
    click.echo(f"{checkpoint} -> {target} ({render.format_size(8 * size)})")
    if check:
        runner = "ONNX Runtime" if kind == "onnx" else "the reloaded program"
        click.echo(
            f"largest difference of outputs, {runner} against the network: "
            f"{check['max_difference']:.1e} ({check['relative_difference']:.1e} of the largest)"
        )


def _default_target(checkpoint: Path, kind: str, form: str | None) -> Path:
    """CHECKPOINT[-FORM] and the kind's ending, beside the folder; here for a hub name."""
    folder = Path(checkpoint.name.replace("@", "-")) if is_hub_name(checkpoint) else checkpoint
    if folder.name in ("", ".."):
        folder = folder.resolve()
    form_suffix = "" if form in (None, "lego") else f"-{form}"
    return folder.with_name(f"{folder.name}{form_suffix}{ENDINGS[kind]}")


def _write_dense(model: nn.Module, kind: str, target: Path, force: bool) -> int:
    """Write dense weights, and return the size of all files in bytes."""
    write = lego.export_dense if kind == "dense" else lego.export_timm
    write(model, target, force)
    return sum(file.stat().st_size for file in (target, *target.glob("*")) if file.is_file())


def _write_graph(
    model: nn.Module, kind: str, form: Any, target: Path, force: bool
) -> tuple[int, dict[str, Any]]:
    """Write an ONNX or torch.export file.

    Returns:
        The size in bytes, and how far the file's outputs are from the network's.
    """
    write = lego.export_onnx if kind == "onnx" else lego.export_program
    exported = write(model, target, form, force)
    check = {
        "form": exported.form,
        "max_difference": exported.max_difference,
        "relative_difference": exported.relative_difference,
    }
    return exported.bytes, check
