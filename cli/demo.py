"""`demo`: the whole job on a network and images that the package ships, without any download."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import click
import torch
from safetensors.torch import load_file
from torch import nn

import legocompress as lego
from legocompress.data.images import Images

from . import render
from .help import SectionedCommand
from .progress import progress_bar

EPOCHS = 12
EVALUATION_BATCH = 250
SETTINGS = [lego.LegoSpec(m=0.5, o=2, k=1), lego.LegoSpec(m=0.25, o=4, k=4)]


@dataclass(frozen=True)
class Inputs:
    """The network and the images that the package ships.

    Attributes:
        model: what `create` takes to make the dense network.
        dense: the dense network.
        test: labelled images that accuracy is measured on.
        unlabelled: images to calibrate with.
    """

    model: str
    dense: nn.Module
    test: Images
    unlabelled: Images

    def evaluate(self, network: nn.Module, original: nn.Module | None = None) -> lego.Evaluation:
        """Measure accuracy on the test images, and agreement if the original is given."""
        return lego.evaluate(network, self.test.batches(EVALUATION_BATCH), original)


@dataclass(frozen=True)
class Outcome:
    """The numbers of one setting, for the last table.

    Attributes:
        name: the setting, which is also the folder's name.
        report: of the compressed folder.
        clustered: accuracy by clustering alone.
        calibrated: accuracy after calibration.
    """

    name: str
    report: lego.Report
    clustered: lego.Evaluation
    calibrated: lego.Evaluation


@click.command(cls=SectionedCommand)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to keep the results in.")
def demo(out: Path | None) -> None:
    """Convert, calibrate, evaluate, report and export a shipped Fashion-MNIST network."""
    with as_file(files("legocompress") / "demo") as shipped, _open_folder(out) as folder:
        run_demo(_open_inputs(shipped), folder)


@contextlib.contextmanager
def _open_folder(out: Path | None) -> Iterator[Path]:
    """Make the folder to write to: `out`, or else a temporary one."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        yield out
    else:
        with tempfile.TemporaryDirectory(prefix="legocompress-demo-") as folder:
            yield Path(folder)


def _open_inputs(shipped: Path) -> Inputs:
    model = f"local-dir:{shipped / 'fashion-resnet'}"
    dense = lego.create(model)
    return Inputs(
        model,
        dense,
        test=lego.open_images(str(shipped / "fashion-sample.npz"), dense),
        unlabelled=lego.open_images(str(shipped / "fashion-calibration.npz"), dense, labels=False),
    )


def run_demo(inputs: Inputs, folder: Path) -> None:
    """Do the whole job step by step, and print what each step gained and lost."""
    n_params = sum(parameter.numel() for parameter in inputs.dense.parameters())
    _print_title(
        f"1. inspect: what m=0.5 o=2 would do to a {render.format_count(n_params)}-parameter ResNet"
    )
    render.print_plan(lego.plan(inputs.dense, SETTINGS[0]))

    _print_title(f"2. evaluate the dense network on {inputs.test.size} held-out images")
    dense_evaluation = inputs.evaluate(inputs.dense)
    render.print_evaluation(dense_evaluation)

    _print_title(
        f"3. convert by clustering, and calibrate with {inputs.unlabelled.size} images "
        "without labels"
    )
    outcomes = []
    for spec in SETTINGS:
        outcome = _compress(inputs, spec, folder)
        outcomes.append(outcome)
        click.echo(
            f"{outcome.name}: top-1 {outcome.clustered.top1:.1f} % by clustering alone, "
            f"{outcome.calibrated.top1:.1f} % calibrated, of {dense_evaluation.top1:.1f} %"
        )

    best = max(outcomes, key=lambda outcome: outcome.calibrated.top1 or 0)
    _print_title(f"4. report on {best.name}")
    render.print_report(best.report)

    _print_title(
        f"5. reload {best.name} from its folder alone, and export it as plain dense weights"
    )
    _reload_and_export(inputs, best, folder)

    _print_title("What it gained and lost")
    _print_outcomes(dense_evaluation, outcomes)


def _compress(inputs: Inputs, spec: lego.LegoSpec, folder: Path) -> Outcome:
    """Convert, calibrate, save and evaluate the network by one setting."""
    name = f"m{spec.m:g}-o{spec.o}-k{spec.k}"
    network = lego.create(inputs.model)
    lego.convert_(network, lego.plan(network, spec))
    clustered = inputs.evaluate(network, inputs.dense)
    with progress_bar() as bar:
        task = bar.add_task(name, total=sum(1 for _ in lego.lego_modules(network)))
        joint = bar.add_task("all layers together", total=None)
        images = lego.gather(inputs.unlabelled.batches(64), inputs.unlabelled.size)
        lego.calibrate_(
            network,
            inputs.dense,
            images,
            epochs=EPOCHS,
            on_layer=lambda row: bar.advance(task),
            on_batch=lambda done, total: bar.update(joint, completed=done, total=total),
        )
    path = lego.save(network, folder / name, force=True)
    report = lego.measure(network, path=path)
    return Outcome(name, report, clustered, inputs.evaluate(network, inputs.dense))


def _reload_and_export(inputs: Inputs, outcome: Outcome, folder: Path) -> None:
    """Load a compressed folder, export it, and check both against the network that was saved."""
    reloaded = lego.load(folder / outcome.name)
    evaluation = inputs.evaluate(reloaded)
    path = folder / f"{outcome.name}-dense.safetensors"
    exported = lego.export_dense(reloaded, path, force=True)
    plain = lego.create(inputs.model, pretrained=False)
    plain.load_state_dict(load_file(exported))
    with torch.no_grad():
        batch = next(iter(inputs.test.batches(100)))[0]
        difference = float((plain(batch) - reloaded(batch)).abs().max())
    click.echo(
        f"top-1 after reloading: {evaluation.top1:.2f} % "
        f"(saved with {outcome.calibrated.top1:.2f} %)"
    )
    click.echo(f"dense export loads strictly; largest output difference {difference:.1e}")


def _print_title(title: str) -> None:
    click.secho(f"\n{title}", bold=True)


def _print_outcomes(dense_evaluation: lego.Evaluation, outcomes: list[Outcome]) -> None:
    """Print one row for the dense network, and one row per setting."""
    columns = [
        "network",
        "stored",
        "smaller",
        "MACs",
        "fewer",
        "top-1",
        "clustering alone",
        "agreement",
    ]
    totals = outcomes[0].report.totals()
    dense_row = [
        "dense",
        render.format_size(totals["dense_bits"]),
        "",
        render.format_count(totals["dense_macs"]),
        "",
        f"{dense_evaluation.top1:.1f} %",
        "",
        "",
    ]
    render.print_table(columns, [dense_row, *(_outcome_row(outcome) for outcome in outcomes)])
    click.echo("MACs are theory; `legocompress report FOLDER --repeats 20` measures time.")


def _outcome_row(outcome: Outcome) -> list[str]:
    totals = outcome.report.totals()
    stored_bits = 8 * totals["stored_bytes"]
    return [
        outcome.name,
        render.format_size(stored_bits),
        render.format_ratio(totals["dense_bits"], stored_bits),
        render.format_count(totals["macs"]),
        render.format_ratio(totals["dense_macs"], totals["macs"]),
        f"{outcome.calibrated.top1:.1f} %",
        f"{outcome.clustered.top1:.1f} %",
        f"{outcome.calibrated.agreement:.1f} %",
    ]
