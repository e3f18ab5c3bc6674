"""Options that most commands have, such as `--json`, `--force` and `--device`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
import torch

from legocompress.errors import UsageError, first_line

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
