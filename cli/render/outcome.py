"""The last line of a conversion: what is lost until the next step, or what was kept."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from legocompress.state.calibration import Calibration
from legocompress.state.source import Source


@dataclass(frozen=True)
class Outcome:
    """What a conversion leaves the user with.

    Attributes:
        calibrated: whether the network was calibrated.
        message: one sentence: what is lost, or what was kept.
        command: what to run next.
        record: of the calibration, if there was one.
        agreement: percentage of held-out images that get the original's class; None without
            calibration, and for outputs that are not classes.
    """

    calibrated: bool
    message: str
    command: str
    agreement: float | None
    record: Calibration | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields but the record, for `--json`."""
        values = asdict(self)
        del values["record"]
        return values


def describe_outcome(
    target: Path, record: Calibration | None, source: Source, weights: Path | None = None
) -> Outcome:
    """Describe what a conversion or calibration that wrote `target` leaves the user with.

    Args:
        target: the folder that was written.
        record: of the calibration, if there was one.
        source: where the network comes from.
        weights: the weights file that the network was created with, if any.
    """
    folder = shlex.quote(str(target))
    report = f"legocompress report {folder}"
    if record is not None:
        return Outcome(True, _describe_kept(record), report, record.agreement_after, record)
    if source.weights.startswith("random,"):
        message = "The weights are random, so there is no accuracy to lose; next"
        return Outcome(False, message, report, None)
    command = f"legocompress calibrate {folder} --data PHOTOS"
    if weights is not None:
        command += f" --original-weights {shlex.quote(str(weights))}"
    return Outcome(False, "Accuracy is lost until this has run", command, None)


def _describe_kept(record: Calibration) -> str:
    images = "synthetic images" if record.synthetic else "photos"
    if record.agreement_after is None:
        return f"Kept: an output error of {record.error_after:.3f} on held-out {images}"
    return f"Kept: the original's class on {record.agreement_after:.1f} % of the held-out {images}"


def print_outcome(outcome: Outcome) -> None:
    """Print the outcome as the last line, in bold on a terminal."""
    if outcome.calibrated:
        click.echo(f"\nNext: {outcome.command}")
        click.secho(outcome.message, bold=True)
    else:
        click.secho(f"\n{outcome.message}: {outcome.command}", bold=True)
