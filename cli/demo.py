"""`demo`: the main job on a network and images that the package ships; no network, no download."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path

import click
import torch
from rich.progress import Progress, TaskID
from safetensors.torch import load_file
from torch import nn

import legocompress as lego

from . import render
from .options import progress

EPOCHS = 12
SETTINGS = [lego.LegoSpec(m=0.5, o=2, k=1), lego.LegoSpec(m=0.25, o=4, k=4)]


@dataclass(frozen=True)
class Outcome:
    """One setting's numbers, as the last table shows them."""

    name: str
    report: lego.Report
    clustered: lego.Evaluation
    evaluation: lego.Evaluation


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Keep the folders here.")
def demo(out: Path | None) -> None:
    """Convert, calibrate, evaluate, report and export a shipped Fashion-MNIST network."""
    with as_file(files("legocompress") / "demo") as shipped, _place(out) as place:
        run(shipped, place)


@contextlib.contextmanager
def _place(out: Path | None) -> Iterator[Path]:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        yield out
    else:
        with tempfile.TemporaryDirectory(prefix="legocompress-demo-") as folder:
            yield Path(folder)


def run(shipped: Path, place: Path) -> None:
    """Do the main job, a step at a time, and print what each step gained and lost."""
    name, sample = f"local-dir:{shipped / 'fashion-resnet'}", str(shipped / "fashion-sample.npz")
    dense = lego.create(name)
    images = lego.open_images(sample, dense)
    unlabelled = lego.open_images(str(shipped / "fashion-calibration.npz"), dense, labels=False)

    _step(
        f"1. inspect: what m=0.5 o=2 would do to a {render.count(_params(dense))}-parameter ResNet"
    )
    render.print_plan(lego.plan(dense, SETTINGS[0]))

    _step(f"2. evaluate the dense network on {images.size} held-out images")
    before = lego.evaluate(dense, images.batches(250))
    render.print_evaluation(before)

    _step(f"3. convert by clustering, and calibrate with {unlabelled.size} images without labels")
    outcomes = []
    for spec in SETTINGS:
        model = lego.create(name)
        lego.convert_(model, lego.plan(model, spec))
        clustered = lego.evaluate(model, images.batches(250), dense)
        with progress() as bar:
            layers = bar.add_task(_folder(spec), total=sum(1 for _ in lego.lego_modules(model)))
            photos = lego.gather(unlabelled.batches(64), unlabelled.size)
            on_layer = partial(_advance, bar, layers)
            lego.calibrate_(model, dense, photos, epochs=EPOCHS, on_layer=on_layer)
        folder = lego.save(model, place / _folder(spec), force=True)
        outcome = Outcome(
            _folder(spec),
            lego.measure(model, path=folder),
            clustered,
            lego.evaluate(model, images.batches(250), dense),
        )
        outcomes.append(outcome)
        click.echo(
            f"{outcome.name}: top-1 {clustered.top1:.1f} % by clustering alone, "
            f"{outcome.evaluation.top1:.1f} % calibrated, of {before.top1:.1f} %"
        )

    best = max(outcomes, key=lambda outcome: outcome.evaluation.top1 or 0)
    _step(f"4. report on {best.name}")
    render.print_report(best.report)

    _step(f"5. reload {best.name} from its folder alone, and export it as plain dense weights")
    reloaded = lego.load(place / best.name)
    again = lego.evaluate(reloaded, images.batches(250))
    exported = lego.export_dense(reloaded, place / f"{best.name}-dense.safetensors", force=True)
    plain = lego.create(name, pretrained=False)
    plain.load_state_dict(load_file(exported))
    with torch.no_grad():
        batch = next(iter(images.batches(100)))[0]
        gap = float((plain(batch) - reloaded(batch)).abs().max())
    click.echo(
        f"top-1 after reloading: {again.top1:.2f} % (saved with {best.evaluation.top1:.2f} %)"
    )
    click.echo(f"dense export loads strictly; largest output difference {gap:.1e}")

    _step("What it gained and lost")
    _print_outcomes(before, outcomes)


def _advance(bar: Progress, task: TaskID, row: object) -> None:
    bar.advance(task)


def _step(title: str) -> None:
    click.secho(f"\n{title}", bold=True)


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _folder(spec: lego.LegoSpec) -> str:
    return f"m{spec.m:g}-o{spec.o}-k{spec.k}"


def _print_outcomes(before: lego.Evaluation, outcomes: list[Outcome]) -> None:
    first = outcomes[0].report.totals()
    rows = [
        ["dense", render.size(first["dense_bits"]), "", render.count(first["dense_macs"]), "",
         f"{before.top1:.1f} %", "", ""]
    ]  # fmt: skip
    for outcome in outcomes:
        t, e = outcome.report.totals(), outcome.evaluation
        rows.append(
            [
                outcome.name,
                render.size(8 * t["stored_bytes"]),
                render.ratio(t["dense_bits"], 8 * t["stored_bytes"]),
                render.count(t["macs"]),
                render.ratio(t["dense_macs"], t["macs"]),
                f"{e.top1:.1f} %",
                f"{outcome.clustered.top1:.1f} %",
                f"{e.agreement:.1f} %",
            ]
        )
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
    render.table(columns, rows)
    click.echo("MACs are theory; `legocompress report FOLDER --repeats 20` measures time.")
