"""`push`: upload a compressed folder to a repository on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

import legocompress as lego
from legocompress.export.hub_upload import MESSAGE, model_card

from . import render
from .help import SectionedCommand
from .options import json_option


@click.command(cls=SectionedCommand)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("repo", metavar="USER/REPO")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--message", default=MESSAGE, show_default=True, help="Message of the commit.")
@click.option("--dry-run", is_flag=True, help="Print the model card and upload nothing.")
@json_option
def push(
    checkpoint: Path, repo: str, private: bool, message: str, dry_run: bool, as_json: bool
) -> None:
    """Upload a compressed folder to the hub, with a model card; run `hf auth login` first."""
    if dry_run:
        click.echo(model_card(checkpoint, repo), nl=False)
        return
    url = lego.push(checkpoint, repo, private, message)
    if as_json:
        render.print_json({"url": url})
    else:
        click.echo(f"{checkpoint} -> {url}")
