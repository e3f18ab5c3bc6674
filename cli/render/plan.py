"""What a plan would convert, and what stays dense."""

from __future__ import annotations

from collections import Counter

import click

from legocompress.compress.plan_types import LayerPlan, Plan
from legocompress.report.numbers import (
    format_change,
    format_shape,
    format_short_count,
    format_short_size,
    format_size,
)

from .tables import print_table


def print_plan(plan: Plan) -> None:
    """Print one row per layer (what it becomes, or why it stays dense) and the totals."""
    rows = [_plan_row(row) for row in plan.rows]
    rows.append(["(other)", "", "", format_short_size(plan.other_bits), "", "norms, biases"])
    print_table(
        ["layer", "weight", "m'/o/k", "ideal size", "MACs", "stays dense because"],
        rows,
        [
            "total",
            f"{len(plan.layers)} of {len(plan.rows)} layers",
            "",
            format_change(format_short_size, plan.dense_bits, plan.bits),
            format_change(format_short_count, plan.dense_macs, plan.macs),
            "",
        ],
    )
    click.echo(
        f"Training the indices needs {format_size(8 * plan.proxy_bytes)} of memory for the proxy N "
        "in fp32, and as much again\nfor its gradient and for each state of the optimiser; frozen "
        "indices need none."
    )
    if plan.reparameterize:
        click.echo(
            "The network has blocks in their training form; they are fused before conversion."
        )
    if plan.note:
        click.echo(f"Note: {plan.note}")


def _plan_row(row: LayerPlan) -> list[str]:
    shape = row.shape
    return [
        row.name or "(root)",
        format_shape(row.weight_shape, row.groups),
        "" if shape is None else f"{shape.n_lego}/{shape.n_split}/{shape.n_terms}",
        format_change(format_short_size, row.dense_bits, row.bits),
        format_change(format_short_count, row.dense_macs, row.macs),
        row.reason or "",
    ]


def print_skipped(skipped: dict[str, str]) -> None:
    """Print how many layers stay dense for each reason."""
    reasons = Counter(reason.partition(":")[0] for reason in skipped.values())
    for reason, number in reasons.most_common():
        click.echo(f"  {number:>4} stay dense: {reason}")
