"""Accuracy, and agreement with the original network."""

from __future__ import annotations

import click

from legocompress.data.evaluation import Evaluation


def print_evaluation(evaluation: Evaluation) -> None:
    """Print one line per number that was measured."""
    click.echo(f"images       {evaluation.images}")
    _print_percentage("top-1", evaluation.top1, evaluation.original_top1)
    _print_percentage("top-5", evaluation.top5, evaluation.original_top5)
    _print_percentage("agreement", evaluation.agreement, None)
    if evaluation.logit_error is not None:
        click.echo(f"logit error  {evaluation.logit_error:.4f} (relative, of centred logits)")
        click.echo(f"divergence   {evaluation.divergence:.4f} (KL of original and compressed)")
    elif evaluation.output_error is not None:
        click.echo(
            f"output error {evaluation.output_error:.4f} (relative to the original's outputs)"
        )


def _print_percentage(name: str, value: float | None, original: float | None) -> None:
    if value is not None:
        original_value = "" if original is None else f"   (original {original:.2f} %)"
        click.echo(f"{name:<12} {value:.2f} %{original_value}")
