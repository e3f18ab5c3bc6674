"""What each layer costs the outputs, and the settings that spend a budget by it."""

from __future__ import annotations

import click

from legocompress.calibrate import Calibration
from legocompress.compress.losses import LayerSensitivity, Sensitivity
from legocompress.compress.plan_types import Plan
from legocompress.report.numbers import format_error
from legocompress.spec import LegoSpec, Rule

from .tables import print_table


def print_sensitivity(found: Sensitivity, plan: Plan) -> None:
    """Print one row per layer, the one that costs most first."""
    order = sorted(found.layers, key=_first_loss, reverse=True)
    kind = "KL" if found.divergence else "error²"
    columns = ["layer", "share of MACs", "m/o/k", "weight error", "output error"]
    columns += [kind, f"{kind}, run", "agrees", "note"]
    print_table(columns, [_layer_row(layer, plan) for layer in order])
    click.echo(
        f"Each layer alone, after a fit to its inputs; all others dense. {found.images} images, no "
        "labels." + (" KL(original || compressed) in nats." if found.divergence else "")
    )


def _first_loss(layer: LayerSensitivity) -> float:
    return layer.correction * layer.forms[0].loss if layer.forms else 0.0


def _layer_row(layer: LayerSensitivity, plan: Plan) -> list[str]:
    macs = plan.layers[layer.name].dense_macs if layer.name in plan.layers else None
    share = f"{100 * macs / plan.dense_macs:.1f} %" if macs and plan.dense_macs else ""
    if not layer.forms:
        return [layer.name, share, *[""] * 6, layer.note or ""]
    first = layer.forms[0]
    return [
        layer.name,
        share,
        f"{first.m:.3g}/{first.o}/{first.k}",
        format_error(first.weight_error),
        format_error(first.output_error),
        f"{first.loss:.4f}",
        "" if layer.measured_loss is None else f"{layer.measured_loss:.4f}",
        "" if layer.agreement is None else f"{layer.agreement:.1f} %",
        layer.note or "",
    ]


def print_rules(spec: LegoSpec) -> None:
    """Print the options of `convert` that give each layer its settings."""
    lines = [f"--rule '{format_rule(rule)}'" for rule in spec.rules]
    lines += [f"--skip '{name}'" for name in spec.skip]
    click.echo("\nOptions for `legocompress convert`:\n\n    " + " \\\n    ".join(lines))


def print_sum(predicted: float, record: Calibration | None, divergence: bool) -> None:
    """Print the sum of the layers' losses beside the loss of the whole network."""
    kind = "KL" if divergence else "squared output error"
    text = f"{kind} expected from the layers, each alone: {predicted:.3f}"
    if record is not None:
        whole = record.divergence_after if divergence else record.error_after**2
        if whole is not None:
            text += f"; measured, all together after calibration: {whole:.3f}"
    click.echo(text)


def format_rule(rule: Rule) -> str:
    """Write a rule as `Rule.parse` reads it; m with as many digits as give the same size again."""
    settings = {"m": rule.m, "o": rule.o, "k": rule.k}
    return f"{rule.pattern}:" + ",".join(
        f"{key}={value:g}" for key, value in settings.items() if value is not None
    )
