"""How much accuracy fine-tuning brings back on Fashion-MNIST, by recipe, start and rival.

    python -m benchmarks.finetuning_fashion --data-dir fashion-mnist --out results --rows 4x
    python -m benchmarks.finetuning_fashion --out results --table

Claim: three epochs of the recipe `fashion-mnist` bring the shipped network back to within a point
of dense at 4x. Each row is a start (calibrated, clustered, a rival, ...) and changes of the recipe;
`--list` names them. Prints size, MACs and test accuracy before and after, mean and spread over the
seeds, of all rows in --out. Takes ten minutes or more per row and seed on one core. Rows that --out
holds are not run again, and one that was interrupted goes on. Test accuracy is that of the last
epoch as it is stored; no epoch is chosen by the test images.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

import legocompress as lego
from benchmarks.common.arguments import make_parser, parse_fashion_folder
from benchmarks.common.results import Row
from benchmarks.common.sizing import size_layers
from benchmarks.common.tables import format_head, format_row
from benchmarks.common.tasks import create_shipped
from benchmarks.common.units import FOUR, SIXTEEN
from benchmarks.rivals.costs import COSTS
from benchmarks.rivals.repair import Repair, compress
from legocompress.calibrate.calibration import EPOCHS
from legocompress.data.images import Images, preprocessing
from legocompress.finetune.distill import capture_outputs
from legocompress.finetune.epoch import Epoch
from legocompress.finetune.loop import finetune_
from legocompress.report.measurement import measure
from legocompress.state.conversion import ConversionRecord

STAGES = ("layer1", "layer2", "layer3", "layer4")  # as the Lego rows compare by default
MAX_TERMS = 8  # per slot, where layers are sized
N_CALIBRATION = 2048
TRAINED = (
    "stages=[{epochs: 2, indices: trained, rates: {proxies: 0.1}}, {epochs: 1, indices: frozen}]"
)
LEARNED = (TRAINED, "anchor=0.1")
ADAMW = ("optimizer={name: adamw, lr: 0.002, weight_decay: 1.0e-4}",)
AUGMENTED = ("augment={crop: shift, padding: 4, hflip: 0.5}",)
MIXED = ("mixup={mixup: 1, cutmix: 1, prob: 0.67}",)
PAPER = ("optimizer={name: momentum, lr: 0.1, momentum: 0.9, weight_decay: 5.0e-4}",)
SCRATCH = (*PAPER, *AUGMENTED, TRAINED, "stages.0.rates.proxies=1", "distill=null", "balance=1e-4")


@dataclass(frozen=True)
class Variant:
    """One line of the table: where the network starts, and what the recipe changes."""

    start: str  # dense, calibrated, clustered, kmeans, scratch, or METHOD-BUDGET of a rival
    spec: dict[str, Any]
    changes: tuple[str, ...] = ()
    trains: bool = True


def list_variants() -> dict[str, Variant]:
    """Every line of the table by its name."""
    variants = {
        "dense": Variant("dense", {}, trains=False),
        "dense, trained on": Variant("dense", {}),
    }
    for size, unit in (("4x", FOUR), ("16x", SIXTEEN)):
        four_terms = {**unit, "k": 4}
        variants |= {
            f"{size}": Variant("calibrated", unit),
            f"{size} k=4": Variant("calibrated", four_terms),
            f"{size} k=8": Variant("calibrated", {**unit, "k": 8}),
            f"{size} by layer": Variant("calibrated", {**four_terms, "sized": "both"}),
            f"{size} by layer, bytes": Variant("calibrated", {**four_terms, "sized": "bytes"}),
            f"{size} by layer, MACs": Variant("calibrated", {**four_terms, "sized": "macs"}),
            f"{size} k=4 augmented": Variant("calibrated", four_terms, AUGMENTED),
            f"{size} AdamW": Variant("calibrated", unit, ADAMW),
            f"{size} mixed": Variant("calibrated", unit, MIXED),
            f"{size} trained": Variant("calibrated", unit, LEARNED),
            f"{size} no anchor": Variant("calibrated", unit, (TRAINED,)),
            f"{size} fast N": Variant("calibrated", unit, (*LEARNED, "stages.0.rates.proxies=1")),
            f"{size} logits only": Variant("calibrated", unit, ("distill.features=0",)),
            f"{size} labels only": Variant("calibrated", unit, ("distill=null",)),
            f"{size} clustered": Variant("clustered", unit),
            f"{size} clustered k=4": Variant("clustered", four_terms),
            f"{size} k-means": Variant("kmeans", {**unit, "coefficients": False}),
            f"{size} scratch": Variant("scratch", unit, SCRATCH),
        }
        for method in ("svd", "tucker", "pruning"):
            for kind in COSTS:
                variants[f"{size} {method}, {kind}"] = Variant(f"{method}-{kind}", four_terms)
    return variants


VARIANTS = list_variants()


def make_start(variant: Variant, data_dir: str, seed: int) -> nn.Module:
    """The network that a variant trains."""
    model = create_shipped()
    if variant.start == "dense":
        return model
    unit = {key: value for key, value in variant.spec.items() if key != "sized"}
    sizing = variant.spec.get("sized", "uniform")
    spec = size_layers(model, lego.LegoSpec(**unit), sizing, MAX_TERMS)
    if variant.start == "scratch":
        torch.manual_seed(seed)
        reset_parameters_(model)
    plan = lego.plan(model, spec)
    method, _, kind = variant.start.partition("-")
    if kind:
        costs = lego.convert_(copy.deepcopy(model), plan)
        budget = (kind, COSTS[kind](costs))
        images = open_unlabelled(model, data_dir, seed)
        return compress(method, model, list(plan.layers), images, budget, Repair(EPOCHS, seed))[0]
    lego.convert_(model, plan, seed)
    if variant.start == "calibrated":
        lego.calibrate_(model, create_shipped(), open_unlabelled(model, data_dir, seed))
    return model


def reset_parameters_(model: nn.Module) -> nn.Module:
    """Draw all parameters anew."""
    for module in model.modules():
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return model


def open_unlabelled(model: nn.Module, data_dir: str, seed: int) -> Tensor:
    """2,048 training images as the network takes them."""
    recipe = lego.load_recipe("fashion-mnist", ["data.holdout=0"])
    train, _ = lego.open_training(model, recipe, data_dir)
    transform = preprocessing(model)[0]
    chosen = torch.randperm(55_000, generator=torch.Generator().manual_seed(seed))[:N_CALIBRATION]
    dataset: Any = train.dataset
    return torch.stack([transform(dataset[int(i)][0]) for i in chosen])


def list_comparable_stages(model: nn.Module, teacher: nn.Module, images: Tensor) -> list[str]:
    """The stages whose outputs have the shape of the teacher's."""
    with (
        torch.no_grad(),
        capture_outputs(model, STAGES) as ours,
        capture_outputs(teacher, STAGES) as theirs,
    ):
        model.eval()(images)
        teacher.eval()(images)
    return [name for name in STAGES if ours[name].shape == theirs[name].shape]


def open_start(variant: Variant, args: argparse.Namespace, seed: int) -> nn.Module:
    """As `make_start`; a calibrated network is stored in --out for the rows that share it."""
    seed = seed if args.start_seed is None else args.start_seed
    if variant.start != "calibrated":
        return make_start(variant, args.data_dir, seed)
    label = "-".join(f"{key}{value}" for key, value in variant.spec.items())
    folder: Path = args.out / "starts" / f"{label}-s{seed}"
    if not folder.exists():
        lego.save(make_start(variant, args.data_dir, seed), folder)
    return lego.load(folder)


def open_data(
    model: nn.Module, recipe: Any, args: argparse.Namespace
) -> tuple[Images, Images, Images]:
    """Images to train with (the first --images of them), for validation, and for the test."""
    train, validation = lego.open_training(model, recipe, args.data_dir)
    if args.images is not None:
        chosen = range(min(args.images, train.size))
        train = replace(train, dataset=Subset(train.dataset, chosen), size=len(chosen))
    whole = lego.load_recipe("fashion-mnist", ["data.holdout=0"])
    return train, validation, lego.open_training(model, whole, args.data_dir)[1]


def run_variant(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train one variant with one seed and write its row."""
    variant = VARIANTS[name]
    label = f"{name.replace(' ', '-').replace(',', '').replace('=', '')}-s{seed}"
    file: Path = args.out / f"{label}.json"
    if file.exists():
        return
    changes = [*variant.changes, f"seed={seed}", *args.set]
    model = open_start(variant, args, seed)
    is_lego = isinstance(lego.lego_state(model).conversion, ConversionRecord)
    if not is_lego:
        layers = list_comparable_stages(model, create_shipped(), torch.zeros(1, 1, 56, 56))
        changes.append(f"distill.layers=[{', '.join(layers)}]" if layers else "distill.features=0")
    recipe = lego.load_recipe("fashion-mnist", changes)
    train, validation, test = open_data(model, recipe, args)
    before = lego.evaluate(model, test.batches(250)).top1
    epochs: list[Row] = []
    if variant.trains:
        out = args.out / label if is_lego else None
        on_epoch = make_epoch_printer(label, epochs)
        finetune_(
            model, recipe, train, validation, create_shipped(), out, resume=True, on_epoch=on_epoch
        )
    after = lego.evaluate(model, test.batches(250)).top1
    costs = measure(model).totals()
    result = {"row": name, "seed": seed, "before": before, "after": after, "epochs": epochs}
    result |= {"changes": args.set, "images": train.size}
    result |= {"bytes": costs["bits"] / 8, "macs": costs["macs"]}
    file.write_text(json.dumps(result) + "\n")


def make_epoch_printer(label: str, epochs: list[Row]) -> Callable[[Epoch], None]:
    """A function that prints one line per epoch and appends its numbers to `epochs`."""
    started = time.perf_counter()

    def on_epoch(epoch: Epoch) -> None:
        progress = epoch.progress
        epochs.append({"top1": epoch.top1, "loss": progress.loss, "changed": progress.changed})
        print(
            f"{label}: epoch {progress.epoch} loss {progress.loss:.4f} "
            f"validation {epoch.top1:.2f} % changed {progress.changed} "
            f"after {time.perf_counter() - started:.0f} s",
            flush=True,
        )

    return on_epoch


def print_table(out: Path) -> None:
    """Print every variant that has been run: mean over its seeds."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    of_dense = [r["after"] for r in results if r["row"] == "dense"]
    trained = [r for r in results if VARIANTS[r["row"]].trains]
    budgets = sorted({f"{len(r['epochs'])} epochs of {r['images']:,} images" for r in trained})
    changes = sorted({change for r in trained for change in r["changes"]})
    print("; ".join([*budgets, *(f"--set {change}" for change in changes)]) + "\n")
    columns = ["row", "ideal size", "MACs", "test top-1 before", "after", "below dense", "seeds"]
    print(format_head(columns))
    for name in VARIANTS:
        runs = [r for r in results if r["row"] == name]
        if not runs:
            continue
        before, after = (statistics.fmean(r[key] for r in runs) for key in ("before", "after"))
        spread = f" ± {statistics.stdev(r['after'] for r in runs):.2f}" if len(runs) > 1 else ""
        below = f"{of_dense[0] - after:.2f}" if of_dense else "?"
        sizes = [f"{runs[0]['bytes'] / 1e3:.0f} kB", f"{runs[0]['macs'] / 1e6:.2f}M"]
        print(format_row([name, *sizes, f"{before:.2f}", f"{after:.2f}{spread}", below, len(runs)]))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--data-dir", help="folder of Fashion-MNIST's four idx.gz files")
    parser.add_argument("--out", type=Path, help="folder of results, one file per row and seed")
    parser.add_argument("--rows", nargs="*", default=[], choices=list(VARIANTS), metavar="ROW")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--start-seed", type=int, help="calibrate with this seed for all --seeds")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the recipe")
    parser.add_argument("--images", type=int, help="train on the first N images only")
    parser.add_argument("--table", action="store_true", help="only print what --out holds")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.out is None and not args.list:
        parser.error("--out is missing: the folder of results")
    if args.rows and not args.table:
        if args.data_dir is None:
            parser.error("--data-dir is missing: the folder of Fashion-MNIST's four idx.gz files")
        try:
            parse_fashion_folder(args.data_dir)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--data-dir: {error}")
    return args


def main() -> None:
    """Run what is missing and print the table."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.list:
        print("\n".join(VARIANTS))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in [] if args.table else args.rows:
            run_variant(name, seed, args)
    print_table(args.out)


if __name__ == "__main__":
    main()
