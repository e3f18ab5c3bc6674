"""Write the HTML page of a network, with a progress bar."""

from __future__ import annotations

from pathlib import Path

import click
from torch import nn

import legocompress as lego
from legocompress.report.html import MAX_PHOTOS

from .progress import progress_bar


def write_page(
    network: nn.Module,
    html: Path,
    report: lego.Report,
    sources: lego.ReportSources,
    force: bool,
    quiet: bool,
) -> None:
    """Write the page and print its path.

    Args:
        network: the compressed network.
        html: path of the page.
        report: the measurement of the network.
        sources: what else the page shows.
        force: replace an existing page.
        quiet: print nothing.
    """
    photos = sources.photos
    with progress_bar(quiet) as bar:
        total = None if photos is None else min(photos.size, MAX_PHOTOS)
        task = bar.add_task("comparing photos", total=total, visible=photos is not None)

        def on_photos(n_photos: int) -> None:
            bar.advance(task, n_photos)

        lego.write_html_report(network, html, report, sources, force, on_photos)
    if not quiet:
        click.echo(f"{html}: {html.stat().st_size:,} bytes")
