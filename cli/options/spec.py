"""Options that say what to convert and how: the compression spec and the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from legocompress.errors import UsageError
from legocompress.spec import LegoSpec

from .common import CommandT, combine_options

spec_options: Callable[[CommandT], CommandT] = combine_options(
    [
        click.option(
            "--m",
            type=float,
            default=0.5,
            show_default=True,
            help="Ratio of Lego filters to output channels.",
        ),
        click.option(
            "--o",
            type=int,
            default=2,
            show_default=True,
            help="Number of fragments that the input channels are split into.",
        ),
        click.option(
            "--k",
            type=int,
            default=1,
            show_default=True,
            help="Lego filters summed per slot; with a budget, at most this many.",
        ),
        click.option(
            "--max-size",
            type=click.FloatRange(0, 1, min_open=True),
            help="Budget as a share of the dense network's size; chooses m, o and k per layer.",
        ),
        click.option(
            "--max-macs",
            type=click.FloatRange(0, 1, min_open=True),
            help="Budget as a share of the dense network's MACs, without those of unused Lego "
            "filters; chooses m, o and k per layer.",
        ),
        click.option(
            "--coefficients/--binary",
            default=True,
            show_default=True,
            help="Use one coefficient per slot and term, or the paper's binary form without them.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
            default="fp32",
            show_default=True,
            help="Storage dtype of the Lego filters; int8 stores one scale per filter.",
        ),
        click.option(
            "--share",
            type=click.Choice(["layer", "stage", "network"]),
            default="layer",
            show_default=True,
            help="Which layers use one bank: each its own, those of one resolution, or all.",
        ),
        click.option(
            "--rule",
            "rules",
            multiple=True,
            metavar="PATTERN:m=..,o=..,k=..",
            help="Settings for the layers that match an exact name, a glob or re:REGEX; "
            "the first match wins; repeatable.",
        ),
        click.option(
            "--only",
            multiple=True,
            metavar="PATTERN",
            help="Convert only the layers that match; repeatable.",
        ),
        click.option(
            "--skip",
            multiple=True,
            metavar="PATTERN",
            help="Keep the layers that match dense; repeatable.",
        ),
        click.option("--linear", is_flag=True, help="Also convert Linear layers."),
        click.option(
            "--allow-expansion",
            is_flag=True,
            help="Also convert layers that become slower or larger (m > 1, no saving).",
        ),
    ]
)


def read_spec(values: dict[str, Any]) -> LegoSpec:
    """Take the spec options out of a command's values and make the spec."""
    fields = LegoSpec.model_fields.keys() & values.keys()
    return LegoSpec(**{name: values.pop(name) for name in fields})


def read_budget(values: dict[str, Any]) -> dict[str, float]:
    """Take the budget options out of a command's values; empty if no budget is given.

    Raises:
        UsageError: m or o is given together with a budget; o is allowed with shared banks.
    """
    shares = {name: values.pop(name) for name in ("max_size", "max_macs")}
    budget = {name: share for name, share in shares.items() if share is not None}
    get_source = click.get_current_context().get_parameter_source
    is_sharing = click.get_current_context().params.get("share", "layer") != "layer"
    for name in ("m",) if is_sharing else ("m", "o"):
        if budget and get_source(name) is ParameterSource.COMMANDLINE:
            option = next(iter(budget)).replace("_", "-")
            raise UsageError(f"--{option} chooses m and o of every layer; leave out --{name}")
    return budget
