"""What a calibration repaired."""

from __future__ import annotations

import click

from legocompress.calibrate import Calibration
from legocompress.report.numbers import format_error

from .tables import print_table


def print_layer_repairs(record: Calibration) -> None:
    """Print one row per layer: the error of its output before and after its repair."""
    rows = [
        [repair.name, format_error(repair.before), format_error(repair.after), repair.note or ""]
        for repair in record.layers
    ]
    print_table(["layer", "error before", "after", "note"], rows)


def _print_errors(record: Calibration) -> None:
    """Print the errors that decide for a classifier, and the relative error for other networks."""
    logit_errors = (record.logit_error_before, record.logit_error_after)
    divergences = (record.divergence_before, record.divergence_after)
    if None in (*logit_errors, *divergences):
        _print_change("output error", (record.error_before, record.error_after))
        return
    _print_change("centred logit error", logit_errors)
    _print_change("KL divergence", divergences)


def _print_change(name: str, values: tuple[float | None, float | None]) -> None:
    click.echo(f"{name:<20} {values[0]:>10.3f} -> {values[1]:>10.3f}")


def print_calibration(record: Calibration) -> None:
    """Print what the calibration used, and the network's error and agreement before and after."""
    kind = "synthetic images" if record.synthetic else "unlabelled images"
    if record.crops > 1:
        kind += f" ({record.crops} random crops of each photo)"
    click.echo(
        f"calibrated with {record.images} {kind}; errors and agreement on the fifth of them that "
        "was held out:"
    )
    _print_errors(record)
    if record.agreement_before is not None and record.agreement_after is not None:
        click.echo(
            f"{'agreement':<20} {record.agreement_before:>8.1f} % -> "
            f"{record.agreement_after:>8.1f} %"
        )
    if record.accuracy is not None:
        accuracy = record.accuracy
        click.echo(
            f"{'top-1':<20} {accuracy.before:>8.1f} % -> {accuracy.after:>8.1f} %   "
            f"(original {accuracy.original:.1f} %, {accuracy.images} labelled images)"
        )
