"""Does wall clock follow theory? Deployed Lego networks against the strongest dense forms.

    python benchmarks/speed.py --cache DIR --results speed.jsonl --network resnet50 --threads 1
    python benchmarks/speed.py --results speed.jsonl --table

Each call measures the cells that are asked for (network, batch, threads, setting) and not yet in
the results file, one after the other, each in interleaved runs in this process; a second call goes
on where the first ended. Networks are torchvision's at 224, with random weights: time does not
depend on the values, but which Lego filters are used does, so the filters are clustered as ever
and kept in --cache. Beside the dense forms of `legocompress.report.rivals` run the merges that a
Lego network could do without a kernel, all with norms folded and activations fused in the same way:
the dense 1x1 conv of the paper's code, index_select, and embedding_bag.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import legocompress as lego
from legocompress.deploy.graph import trace
from legocompress.deploy.site import ConvSite
from legocompress.report import rivals
from legocompress.report.rivals import AGAINST, Form

NETWORKS = ("resnet50", "vgg16_bn", "mobilenet_v2")
SETTINGS = {"m0.5-o2": (0.5, 2, 1), "m0.25-o4": (0.25, 4, 1),
            "m0.5-o2-k4": (0.5, 2, 4), "m0.25-o4-k4": (0.25, 4, 4)}  # fmt: skip


def compressed(network: str, setting: str, cache: Path) -> nn.Module:
    """The network at a setting, clustered once and kept."""
    folder = cache / f"{network}-{setting}"
    if not folder.exists():
        m, o, k = SETTINGS[setting]
        model = lego.create(f"torchvision/{network}", pretrained=False)
        lego.convert_(model, lego.plan(model, lego.LegoSpec(m=m, o=o, k=k)))
        lego.save(model, folder)
    return lego.load(folder)


def other_merges(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Form]]:
    """The Lego network by merges of plain operators; the layers that are dense run as oneDNN's."""
    yield PAPER, by_sites(model, x, paper_merge)
    yield "merge: index_select", by_sites(model, x, "reference")
    yield "merge: embedding_bag", by_sites(model, x, "table")


def by_sites(model: nn.Module, x: Tensor, route: str | Callable[[ConvSite], object]) -> Form:
    """The network's deployed graph with every Lego layer on one route."""
    graph = trace("", model, (x,))
    for site in graph.convs:
        if not site.is_lego:
            site.prepare("assemble", "nchw", x)
            site.use("assemble", "nchw")
        elif isinstance(route, str):
            site.prepare(route, "nchw", x)  # type: ignore[arg-type]
            site.use(route, "nchw")  # type: ignore[arg-type]
        else:
            site.run = route(site)  # type: ignore[assignment]
    for plain in graph.plains:
        plain.route = "kernel"
    run = graph.runner.forward
    return lambda: run(x)


def paper_merge(site: ConvSite) -> Callable[[Tensor, Tensor | None, bool], Tensor]:
    """Each split by itself: the Lego filters, then a 1x1 conv with the dense (n, m) matrix."""
    shape, filters, index, gains, bias = site.unit
    g = site.geometry
    matrices = []
    for i in range(shape.n_split):
        matrix = torch.zeros(shape.n_out, shape.n_lego)
        values = torch.ones(index[i].shape) if gains is None else gains[i]
        matrices.append(matrix.scatter_add_(1, index[i], values)[:, :, None, None])

    def run(x: Tensor, residual: Tensor | None, spare: bool) -> Tensor:
        x, padding = g.place(x)
        y = None
        for part, matrix in zip(x.split(shape.width, 1), matrices, strict=True):
            z = F.conv2d(part, filters[:, : part.shape[1]], None, g.stride, padding, g.dilation)
            split = F.conv2d(z, matrix)
            y = split if y is None else y.add_(split)
        assert y is not None
        if bias is not None:
            y += bias[:, None, None]
        if residual is not None:
            y += residual
        return torch.relu_(y) if site.activation == "relu" else y

    return run


def measured(path: Path) -> list[dict[str, object]]:
    """The records of the results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(records: list[dict[str, object]]) -> str:
    """A row a cell: measured ratio, its spread, theory, and what the other forms reach."""
    columns = ["network", "setting", "batch", "threads", "Lego",
               "Lego, of the strongest that is not our own", "spread", "fastest quarter",
               "theory, all filters",
               "theory, used ones", "strongest dense", "slowest layer", "layers < 1",
               "peak memory, of the least dense", "embedding_bag", "index_select", "1x1 merge",
               "own dense Winograd"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for record in sorted(records, key=lambda r: tuple(str(r[k]) for k in KEY)):
        run: dict = record["run"]  # type: ignore[assignment,type-arg]
        forms = {form["form"]: form for form in run["forms"]}
        dense = {n: f for n, f in forms.items() if n != "lego" and not n.startswith("merge:")}
        others = min(form["median_ms"] for name, form in dense.items() if name not in OURS)
        least = min((f["peak_bytes"] for f in dense.values() if f["peak_bytes"]), default=None)
        ratios = [layer["ratio"] for layer in run["layers"]]
        peaks = forms["lego"]["peak_bytes"], least
        quarter = min(form["quartiles_ms"][0] for form in dense.values())

        def speed(name: str, forms: dict = forms) -> str:  # type: ignore[type-arg]
            return f"{forms[name]['ratio']:.2f}" if name in forms else ""

        cells = [
            record["network"], record["setting"], run["batch"], run["threads"],
            f"**{run['ratio']:.2f}**", f"{others / forms['lego']['median_ms']:.2f}",
            f"{100 * forms['lego']['spread']:.0f} %",
            f"{quarter / forms['lego']['quartiles_ms'][0]:.2f}", f"{run['bound']:.2f}",
            f"{run['bound_used']:.2f}", run["strongest"], f"{min(ratios):.2f}",
            f"{sum(r < 1 for r in ratios)} of {len(ratios)}",
            f"{peaks[0] / peaks[1]:.2f}" if all(peaks) else "?",
            speed("merge: embedding_bag"), speed("merge: index_select"), speed(PAPER),
            speed("own Winograd"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


PAPER = "merge: dense 1x1 conv (paper's code)"


def parts(records: list[dict[str, object]]) -> str:
    """What the time is made of: for each kind of layer its share of the network's and its speed."""
    columns = ["network", "setting", "batch", "threads", "layers", "share of the time", "speed",
               "theory, used ones"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for record in sorted(records, key=lambda r: tuple(str(r[k]) for k in KEY)):
        run: dict = record["run"]  # type: ignore[assignment,type-arg]
        layers = run["layers"]
        total = next(form["median_ms"] for form in run["forms"] if form["form"] == "lego")
        kinds: dict[str, list[dict]] = {}  # type: ignore[type-arg]
        for layer in layers:
            words = [word for word in layer["name"].split(".") if not word.isdigit()]
            kinds.setdefault(words[-1], []).append(layer)
        for kind, some in kinds.items():
            ours, dense = (sum(layer[key] for layer in some) for key in ("ms", "dense_ms"))
            theory = dense / sum(layer["dense_ms"] / layer["bound_used"] for layer in some)
            numbers = f"{100 * ours / total:.0f} %", f"{dense / ours:.2f}", f"{theory:.2f}"
            cells = [*(record[key] for key in KEY), f"{len(some)} x {kind}", *numbers]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        rest = 1 - sum(layer["ms"] for layer in layers) / total
        cells = [*(record[key] for key in KEY), "all else", f"{100 * rest:.0f} %", "", ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


OURS = ("own Winograd", "deployed dense")
KEY = ("network", "setting", "batch", "threads")


def told(form: str) -> None:
    """A line a form, with the time."""
    print(f"  {time.strftime('%X')} {form}", flush=True)


def main() -> None:
    """Measure what is asked for and missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("speed-cache"))
    parser.add_argument("--results", type=Path, default=Path("speed.jsonl"))
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--setting", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--against", nargs="*", choices=AGAINST, default=list(AGAINST))
    parser.add_argument("--compile-seconds", type=int, default=240, help="limit of torch.compile")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--convert", action="store_true", help="fill the cache and stop")
    parser.add_argument("--again", action="store_true", help="measure cells that are there, too")
    parser.add_argument("--table", action="store_true", help="print the table of the results file")
    args = parser.parse_args()
    if args.table:
        latest = {tuple(r[k] for k in KEY): r for r in measured(args.results)}
        print(table(list(latest.values())), parts(list(latest.values())), sep="\n\n")
        return
    rivals.COMPILE_SECONDS = args.compile_seconds
    done = {tuple(record[key] for key in KEY) for record in measured(args.results)}
    cells = [
        (network, setting, batch, threads)
        for network in args.network
        for setting in args.setting
        for batch in args.batch
        for threads in args.threads
    ]
    for cell in cells:
        network, setting, batch, threads = cell
        if cell in done and not args.again:
            continue
        model = compressed(network, setting, args.cache)
        if args.convert:
            continue
        run = lego.benchmark(
            model, batch, threads, tuple(args.against), args.rounds, args.seconds,
            also=other_merges, on_form=told,
        )  # fmt: skip
        record = {**dict(zip(KEY, cell, strict=True)), "run": run.to_dict()}
        with args.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        shown = {form.form: round(form.ratio, 3) for form in run.forms}
        slow = statistics.median(layer.ratio for layer in run.layers)
        print(cell, f"{run.ratio:.3f} of {run.bound:.2f}, {run.bound_used:.2f}", shown, flush=True)
        print("  median layer", round(slow, 2), "left out:", run.left_out, flush=True)


if __name__ == "__main__":
    main()
