"""Fine-tune the shipped network on Fashion-MNIST, and what else a user might do with the budget.

    python benchmarks/finetuning.py --data-dir fashion-mnist --out results --rows dense 4x --seeds 0
    python benchmarks/finetuning.py --out results --table

A row that `--out` holds already is not run again, and one that was interrupted goes on. Test
accuracy is that of the last epoch as it is stored; no epoch is chosen by the test images.
`--step-cost 10` times a training step against the dense network's.
`--transfer FILE --weights FILE` runs the transfer of squeezenet1_1 to emoji64 instead.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import fashion
import rivals
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

import legocompress as lego
from legocompress.calibrate.calibration import EPOCHS
from legocompress.data.images import preprocessing
from legocompress.finetune.distill import capture_outputs
from legocompress.finetune.epoch import Epoch
from legocompress.finetune.loop import finetune_
from legocompress.finetune.optimize import add_anchor_
from legocompress.report.measurement import measure
from legocompress.state.conversion import ConversionRecord

SHIPPED = Path(str(files("legocompress"))) / "demo"
FOUR, SIXTEEN = {"m": 0.5, "o": 2}, {"m": 0.25, "o": 4}
STAGES = ("layer1", "layer2", "layer3", "layer4")  # as the Lego rows compare by default
MOST_TERMS = 8  # a slot, where layers are sized
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
class Row:
    """One line of the table: where the network starts, and what the recipe changes."""

    start: str  # dense, calibrated, clustered, kmeans, scratch, or METHOD-BUDGET of `rivals`
    spec: dict[str, Any]
    changes: tuple[str, ...] = ()
    trains: bool = True


ROWS = {
    "dense": Row("dense", {}, trains=False),
    "dense, trained on": Row("dense", {}),
}
for size, unit in (("4x", FOUR), ("16x", SIXTEEN)):
    ROWS |= {
        f"{size}": Row("calibrated", unit),
        f"{size} k=4": Row("calibrated", {**unit, "k": 4}),
        f"{size} k=8": Row("calibrated", {**unit, "k": 8}),
        f"{size} by layer": Row("calibrated", {**unit, "k": 4, "sized": "both"}),
        f"{size} by layer, bytes": Row("calibrated", {**unit, "k": 4, "sized": "bytes"}),
        f"{size} by layer, MACs": Row("calibrated", {**unit, "k": 4, "sized": "macs"}),
        f"{size} k=4 augmented": Row("calibrated", {**unit, "k": 4}, AUGMENTED),
        f"{size} AdamW": Row("calibrated", unit, ADAMW),
        f"{size} mixed": Row("calibrated", unit, MIXED),
        f"{size} trained": Row("calibrated", unit, LEARNED),
        f"{size} no anchor": Row("calibrated", unit, (TRAINED,)),
        f"{size} fast N": Row("calibrated", unit, (*LEARNED, "stages.0.rates.proxies=1")),
        f"{size} logits only": Row("calibrated", unit, ("distill.features=0",)),
        f"{size} labels only": Row("calibrated", unit, ("distill=null",)),
        f"{size} clustered": Row("clustered", unit),
        f"{size} clustered k=4": Row("clustered", {**unit, "k": 4}),
        f"{size} k-means": Row("kmeans", {**unit, "coefficients": False}),
        f"{size} scratch": Row("scratch", unit, SCRATCH),
    }
    for method in ("svd", "tucker", "pruning"):
        for kind in rivals.COSTS:
            ROWS[f"{size} {method}, {kind}"] = Row(f"{method}-{kind}", {**unit, "k": 4})


def dense() -> nn.Module:
    """The shipped network."""
    return lego.create(f"local-dir:{SHIPPED / 'fashion-resnet'}")


def start_of(row: Row, data_dir: str, seed: int) -> nn.Module:
    """The network that a row trains."""
    model = dense()
    if row.start == "dense":
        return model
    unit = {key: value for key, value in row.spec.items() if key != "sized"}
    spec = fashion.sized(model, lego.LegoSpec(**unit), row.spec.get("sized", "uniform"), MOST_TERMS)
    if row.start == "scratch":
        torch.manual_seed(seed)
        for module in model.modules():
            reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    plan = lego.plan(model, spec)
    method, _, kind = row.start.partition("-")
    if kind:
        costs = lego.convert_(copy.deepcopy(model), plan)
        budget = (kind, rivals.COSTS[kind](costs))
        images = unlabelled(model, data_dir, seed)
        return rivals.compress(method, model, list(plan.layers), images, budget, EPOCHS, seed)[0]
    lego.convert_(model, plan, seed)
    if row.start == "calibrated":
        lego.calibrate_(model, dense(), unlabelled(model, data_dir, seed))
    return model


def unlabelled(model: nn.Module, data_dir: str, seed: int) -> Tensor:
    """2,048 training images as the network takes them."""
    recipe = lego.load_recipe("fashion-mnist", ["data.holdout=0"])
    train, _ = lego.open_training(model, recipe, data_dir)
    transform = preprocessing(model)[0]
    chosen = torch.randperm(55_000, generator=torch.Generator().manual_seed(seed))[:2048]
    dataset: Any = train.dataset
    return torch.stack([transform(dataset[int(i)][0]) for i in chosen])


def taught_layers(model: nn.Module, teacher: nn.Module, images: Tensor) -> list[str]:
    """Those of the stages whose outputs have kept their shape."""
    with (
        torch.no_grad(),
        capture_outputs(model, STAGES) as ours,
        capture_outputs(teacher, STAGES) as theirs,
    ):
        model.eval()(images)
        teacher.eval()(images)
    return [name for name in STAGES if ours[name].shape == theirs[name].shape]


def kept_start(row: Row, args: argparse.Namespace, seed: int) -> nn.Module:
    """As `start_of`; a calibrated network is kept in --out for the rows that share it."""
    seed = seed if args.start_seed is None else args.start_seed
    if row.start != "calibrated":
        return start_of(row, args.data_dir, seed)
    told = "-".join(f"{key}{value}" for key, value in row.spec.items())
    folder = args.out / "starts" / f"{told}-s{seed}"
    if not folder.exists():
        lego.save(start_of(row, args.data_dir, seed), folder)
    return lego.load(folder)


def run(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train one row with one seed, and note what it gave."""
    row = ROWS[name]
    label = f"{name.replace(' ', '-').replace(',', '').replace('=', '')}-s{seed}"
    note = args.out / f"{label}.json"
    if note.exists():
        return
    changes = [*row.changes, f"seed={seed}", *args.set]
    model = kept_start(row, args, seed)
    is_lego = isinstance(getattr(model, "lego_record", None), ConversionRecord)
    if not is_lego:
        layers = taught_layers(model, dense(), torch.zeros(1, 1, 56, 56))
        changes.append(f"distill.layers=[{', '.join(layers)}]" if layers else "distill.features=0")
    recipe = lego.load_recipe("fashion-mnist", changes)
    train, validation = lego.open_training(model, recipe, args.data_dir)
    if args.images is not None:
        chosen = range(min(args.images, train.size))
        train = replace(train, dataset=Subset(train.dataset, chosen), size=len(chosen))
    tests = lego.open_training(model, lego.load_recipe("fashion-mnist", ["data.holdout=0"]),
                               args.data_dir)[1]  # fmt: skip
    before = lego.evaluate(model, tests.batches(250)).top1
    started, epochs = time.perf_counter(), []

    def on_epoch(epoch: Epoch) -> None:
        epochs.append({"top1": epoch.top1, "loss": epoch.progress.loss,
                       "changed": epoch.progress.changed})  # fmt: skip
        print(f"{label}: epoch {epoch.progress.epoch} loss {epoch.progress.loss:.4f} "
              f"validation {epoch.top1:.2f} % changed {epoch.progress.changed} "
              f"after {time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip

    if row.trains:
        out = args.out / label if is_lego else None
        finetune_(model, recipe, train, validation, dense(), out, resume=True, on_epoch=on_epoch)
    after = lego.evaluate(model, tests.batches(250)).top1
    found = measure(model).totals()
    result = {"row": name, "seed": seed, "before": before, "after": after, "epochs": epochs,
              "changes": args.set, "images": train.size, "bytes": found["bits"] / 8,
              "macs": found["macs"]}  # fmt: skip
    note.write_text(json.dumps(result) + "\n")


def print_table(out: Path) -> None:
    """Every row that has been run: mean over its seeds."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    of_dense = [r["after"] for r in results if r["row"] == "dense"]
    trained = [r for r in results if ROWS[r["row"]].trains]
    budgets = sorted({f"{len(r['epochs'])} epochs of {r['images']:,} images" for r in trained})
    changes = sorted({change for r in trained for change in r["changes"]})
    print("; ".join([*budgets, *(f"--set {change}" for change in changes)]) + "\n")
    print("| row | ideal size | MACs | test top-1 before | after | below dense | seeds |")
    print("|---|---|---|---|---|---|---|")
    for name in ROWS:
        runs = [r for r in results if r["row"] == name]
        if not runs:
            continue
        before, after = (statistics.fmean(r[key] for r in runs) for key in ("before", "after"))
        spread = f" ± {statistics.stdev(r['after'] for r in runs):.2f}" if len(runs) > 1 else ""
        below = f"{of_dense[0] - after:.2f}" if of_dense else "?"
        print(f"| {name} | {runs[0]['bytes'] / 1e3:.0f} kB | {runs[0]['macs'] / 1e6:.2f}M "
              f"| {before:.2f} | {after:.2f}{spread} | {below} | {len(runs)} |")  # fmt: skip


def step_cost(args: argparse.Namespace) -> None:
    """A training step of the shipped network over the dense one's, in turns in one process."""
    print("| unit | indices | step over the dense step, median | quartiles |\n|---|---|---|---|")
    x = torch.randn(args.batch, 1, 56, 56)
    for unit in ({**FOUR, "k": 1}, {**SIXTEEN, "k": 1}, {**SIXTEEN, "k": 4}):
        frozen = lego.convert_(dense(), lego.plan(dense(), lego.LegoSpec(**unit)))
        networks = {"dense": dense(), "frozen": frozen,
                    "trained": lego.train_indices_(copy.deepcopy(frozen))}  # fmt: skip
        optimizers = {
            form: torch.optim.SGD(network.train().parameters(), 1e-4, momentum=0.9)
            for form, network in networks.items()
        }
        times: dict[str, list[float]] = {form: [] for form in networks}
        for _ in range(args.step_cost + 1):
            for form, network in networks.items():
                started = time.perf_counter()
                optimizers[form].zero_grad()
                torch.autograd.backward(network(x).square().mean())
                if form == "trained":
                    add_anchor_(network, 0.1)
                optimizers[form].step()
                times[form].append(time.perf_counter() - started)
        told = " ".join(f"{key}={value}" for key, value in unit.items())
        for form in ("frozen", "trained"):
            pairs = zip(times[form][1:], times["dense"][1:], strict=True)
            low, middle, high = statistics.quantiles([ours / its for ours, its in pairs], n=4)
            print(f"| {told} | {form} | {middle:.2f} | {low:.2f} to {high:.2f} |", flush=True)
    print(f"\n{args.step_cost} steps of {args.batch} images, {args.threads} thread(s), fp32, CPU")


def least_squares() -> None:
    """A trained layer's filters as target: what learning the index adds, and an anchor."""
    weight = dense().get_submodule("layer3.0.conv2").weight
    assert isinstance(weight, Tensor)
    target = weight.detach()
    print("| unit | wrong slots | frozen | N free | anchor 0.3 | anchor 1 | anchor 3 |")
    print("|---|---|---|---|---|---|---|")
    for unit in ({**FOUR, "k": 1}, {**SIXTEEN, "k": 4}):
        for wrong in (0.0, 0.3):
            cells = []
            for anchor in (None, 0.0, 0.3, 1.0, 3.0):
                torch.manual_seed(0)
                conv = nn.Conv2d(64, 64, 3, bias=False)
                conv.weight = nn.Parameter(target.clone())
                spec = lego.LegoSpec(**unit, only=("",))
                model = lego.convert_(conv, lego.plan(conv, spec))
                (_, module), *_ = lego.lego_modules(model)
                o, n, k = module.index.shape
                drawn = torch.rand(o, n, module.lego_shape.n_lego).argsort(2)[:, :, :k]
                chosen = torch.rand(o, n) < wrong
                module.index[chosen] = drawn[chosen]
                if anchor is not None:
                    lego.train_indices_(model)
                optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
                for step in range(200):
                    optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
                    optimizer.zero_grad()
                    torch.autograd.backward(0.5 * (module.weight - target).square().sum())
                    add_anchor_(model, anchor or 0.0)
                    optimizer.step()
                lego.freeze_indices_(model)
                error = (module.weight.detach() - target).norm() / target.norm()
                cells.append(f"{error:.3f}")
            told = " ".join(f"{key}={value}" for key, value in unit.items())
            print(f"| {told} | {wrong:.0%} | {' | '.join(cells)} |", flush=True)


def transfer(args: argparse.Namespace) -> None:
    """squeezenet1_1 to the classes of emoji64: dense, compressed before and compressed after."""
    pixels = {"mean": (123.68 / 255, 116.779 / 255, 103.939 / 255), "std": (1 / 255,) * 3,
              "input_size": (64, 64), "crop_pct": 1.0}  # fmt: skip
    changes = ["data.holdout=0", *args.set]
    recipe = lego.load_recipe("finetune-small-data", changes)
    taught = lego.load_recipe("finetune-small-data", [*changes, "distill={}"])

    def fresh() -> nn.Module:
        return lego.create("torchvision/squeezenet1_1", weights=args.weights, preprocess=pixels)

    def tell(model: nn.Module, label: str) -> nn.Module:
        top1 = lego.evaluate(model, lego.open_training(model, recipe, data)[1].batches(64)).top1
        size = measure(model).totals()["bits"] / 8e6
        print(f"| {label} | {size:.2f} MB | {top1:.2f} |", flush=True)
        return model

    def tune(model: nn.Module, teacher: nn.Module | None = None) -> nn.Module:
        by = recipe if teacher is None else taught
        return finetune_(model, by, *lego.open_training(model, by, data), teacher)

    def convert(model: nn.Module) -> nn.Module:
        return lego.convert_(model, lego.plan(model, lego.LegoSpec(m=0.5, o=2, k=args.k)))

    data = str(args.transfer)
    print("| network | ideal size | test top-1 |\n|---|---|---|")
    teacher = tell(tune(lego.reset_classifier_(fresh(), 9)), "dense")
    tell(tune(lego.reset_classifier_(convert(fresh()), 9)), "compressed, then transferred")
    clustered = tell(convert(copy.deepcopy(teacher)), "transferred, then compressed")
    calibrated = copy.deepcopy(clustered)
    tell(tune(clustered), "the same, trained on")
    images, transform = lego.open_training(teacher, recipe, data)[0], preprocessing(teacher)[0]
    dataset: Any = images.dataset
    lego.calibrate_(calibrated, teacher, torch.stack([transform(image) for image, _ in dataset]))
    tell(calibrated, "transferred, then compressed and calibrated")
    tell(tune(calibrated, teacher), "the same, trained on, the transferred network teaching")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", help="folder of Fashion-MNIST's four idx.gz files")
    parser.add_argument("--out", type=Path, help="folder of results, a file a row and seed")
    parser.add_argument("--rows", nargs="*", default=[], choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--start-seed", type=int, help="calibrate with this seed for all --seeds")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the recipe")
    parser.add_argument("--images", type=int, help="train on the first N images only")
    parser.add_argument("--table", action="store_true", help="print what --out holds")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step-cost", type=int, metavar="N", help="time N steps of each form")
    parser.add_argument("--least-squares", action="store_true", help="fit one layer's filters")
    parser.add_argument("--batch", type=int, default=128, help="images of a timed step")
    parser.add_argument("--transfer", type=Path, help="emoji64.npz")
    parser.add_argument("--weights", type=Path, help="squeezenet1_1's ImageNet weights")
    parser.add_argument("--k", type=int, default=4, help="terms a slot in the transfer run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.list:
        print("\n".join(ROWS))
    if args.least_squares:
        least_squares()
    if args.step_cost:
        step_cost(args)
    if args.transfer:
        transfer(args)
    if args.rows:
        args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.rows:
            run(name, seed, args)
    if args.table:
        print_table(args.out)


if __name__ == "__main__":
    main()
