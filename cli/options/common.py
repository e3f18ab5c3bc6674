"""Options that most commands have, such as `--json`, `--force` and `--device`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from legocompress.errors import OutputExistsError, UsageError, first_line

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def combine_options(
    options: list[Callable[[CommandT], CommandT]],
) -> Callable[[CommandT], CommandT]:
    """Make one decorator of several option decorators; the help lists them in this order."""

    def decorate(command: CommandT) -> CommandT:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
html_option = click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write an HTML page that shows the network, its layers and its filters.",
)
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Device to compute on: cpu, cuda, cuda:1, ...",
)
workers_option = click.option(
    "-j",
    "--workers",
    type=click.IntRange(0),
    default=0,
    help="Number of processes that read images; 0 reads files and arrays in threads.",
)


def read_device(name: str) -> torch.device:
    """Return the device of this name after checking that it works.

    Raises:
        UsageError: the device is unknown or not available.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name!r} cannot be used here: {first_line(error)}") from error
    return device


def check_html_target(html: Path | None, force: bool, out: Path | None = None) -> None:
    """Check that the HTML page can be written, before anything else is done.

    Args:
        html: the page's path; None if there is to be no page.
        force: an existing page may be replaced.
        out: the folder that the command writes.

    Raises:
        UsageError: the path is that of the folder.
        OutputExistsError: the page exists, and `force` is not given.
    """
    if html is None:
        return
    if out is not None and html.absolute() == out.absolute():
        raise UsageError(f"--html {str(html)!r} is the folder of --out, too; name another file")
    if not force and (html.exists() or html.is_symlink()):
        raise OutputExistsError(
            f"--html {str(html)!r} exists already; name another file, or replace it with --force"
        )
