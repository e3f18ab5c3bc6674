"""How well and how fast `legocompress.cluster` clusters the filters of a network.

    python benchmarks/clustering.py                      # timm resnet50, random weights
    python benchmarks/clustering.py --weights a.safetensors b.pt --against sklearn faiss

Per layer: the relative weight error sqrt(|F - F'|^2 / |F|^2) of every form, and in the plain form
(k-means) the squared error and the time of each rival over ours, runs interleaved, median of the
repeats. Then the totals, and whether the targets hold (exit status 1 where one does not).
"""

import argparse
import importlib.util
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from legocompress.cluster.clustering import cluster
from legocompress.lego.unit import LegoUnit

WORST_ERROR_RATIO = 1.01  # our squared error over a rival's, on any layer
LEAST_TIME_RATIO = 3.0  # scikit-learn's total time over ours
MOST_SECONDS = {1: 30.0, 4: 120.0}  # in all, by number of terms; stated for ResNet-50
MOST_MEMORY_MB = 2048.0  # of the process, stated without rivals

Rival = Callable[[Tensor, int], Tensor]


@dataclass
class Totals:
    """Sums over the layers of one network."""

    seconds: dict[str, float] = field(default_factory=dict)
    error_ratios: dict[str, list[float]] = field(default_factory=dict)
    rival_seconds: dict[str, float] = field(default_factory=dict)
    rival_ours: dict[str, float] = field(default_factory=dict)


def main() -> int:
    """Run the benchmark; return 1 where a target is missed."""
    options = _parse()
    torch.set_num_threads(options.threads)
    rivals = _rivals(options.against, options.threads)
    cluster(torch.randn(256, 16), 64)  # the first call pays for thread pools and kernels
    good = True
    for name, weights in _networks(options):
        good &= _network(name, weights, options, rivals)
    return 0 if good else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="timm name, where no files are given")
    parser.add_argument("--weights", nargs="+", type=Path, metavar="FILE", help="state dicts")
    parser.add_argument("--m", type=float, default=0.5, help="Lego filters per output channel")
    parser.add_argument("--o", type=int, default=2, help="fragments per filter")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4], help="terms per slot")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs per layer and method")
    parser.add_argument("--against", nargs="*", choices=["sklearn", "faiss"], default=[])
    return parser.parse_args()


# ---------------------------------------------------------------------------------------- input


def _networks(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if options.weights:
        for path in options.weights:
            yield path.stem, _load(path)
        return
    import timm

    torch.manual_seed(0)
    yield f"{options.model} (random weights)", timm.create_model(options.model).state_dict()


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        read: dict[str, Tensor] = load_file(path)
        return read
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def _layers(
    weights: dict[str, Tensor], m: float, o: int
) -> Iterator[tuple[str, list[int], Tensor, int]]:
    """Yield name, filter shape, fragments and n_lego of every conv but the stem and depthwise."""
    for name, weight in weights.items():
        if weight.ndim != 4 or not name.endswith(".weight"):
            continue
        n, c = weight.shape[:2]
        if c <= 4:  # the stem (an image has up to 4 channels) or depthwise
            continue
        padding = -c % o
        padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, 0, 0, padding))
        fragments = padded.reshape(n, o, -1).transpose(0, 1).reshape(n * o, -1)
        yield name.removesuffix(".weight"), list(weight.shape), fragments, max(1, round(m * n))


# --------------------------------------------------------------------------------------- rivals


def _rivals(names: list[str], threads: int) -> dict[str, Rival]:
    rivals: dict[str, Rival] = {}
    for name in names:
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: not compared (pip install scikit-learn faiss-cpu)")
        else:
            rivals[name] = _sklearn() if name == "sklearn" else _faiss(threads)
    return rivals


def _sklearn() -> Rival:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    warnings.simplefilter("ignore", ConvergenceWarning)

    def run(fragments: Tensor, n_lego: int) -> Tensor:
        fitted = KMeans(n_lego, random_state=0).fit(fragments.numpy())
        return torch.from_numpy(fitted.cluster_centers_[fitted.labels_])

    return run


def _faiss(threads: int) -> Rival:
    import faiss

    faiss.omp_set_num_threads(threads)

    def run(fragments: Tensor, n_lego: int) -> Tensor:
        rows = fragments.contiguous().numpy()
        fitted = faiss.Kmeans(rows.shape[1], n_lego, seed=1, min_points_per_centroid=1)
        fitted.train(rows)
        labels = fitted.index.search(rows, 1)[1][:, 0]
        return torch.as_tensor(fitted.centroids)[torch.from_numpy(labels)]

    return run


# ----------------------------------------------------------------------------------- measurement


def _network(
    name: str, weights: dict[str, Tensor], options: argparse.Namespace, rivals: dict[str, Rival]
) -> bool:
    forms = [("plain", 1, False)] + [(f"k={k}", k, True) for k in options.k]
    totals = Totals()
    print(f"\n{name}: m={options.m} o={options.o}, {options.threads} threads, CPU, float32")
    head = [f"{form:>7s} {'s':>6s}" for form, _, _ in forms]
    head += [f"{rival + ' err':>12s} {'time':>6s}" for rival in rivals]
    print(f"{'layer':36s} {'filters':>18s} {'n_lego':>6s} {' '.join(head)}")
    for layer, shape, fragments, n_lego in _layers(weights, options.m, options.o):
        row = []
        for form, k, coefficients in forms:
            error, seconds = _ours(fragments, n_lego, min(k, n_lego), coefficients)
            totals.seconds[form] = totals.seconds.get(form, 0.0) + seconds
            row.append(f"{(error / _energy(fragments)) ** 0.5:7.4f} {seconds:6.2f}")
        for rival, run in rivals.items():
            row.append(_compare(rival, run, fragments, n_lego, options.repeats, totals))
        print(f"{layer[-36:]:36s} {shape!s:>18s} {n_lego:6d} {' '.join(row)}", flush=True)
    return _verdict(totals, forms, bool(rivals))


def _ours(fragments: Tensor, n_lego: int, k: int, coefficients: bool) -> tuple[float, float]:
    start = time.perf_counter()
    factors = cluster(fragments, n_lego, k, coefficients)
    seconds = time.perf_counter() - start
    return _energy(fragments - _assemble(factors)), seconds


def _compare(
    rival: str, run: Rival, fragments: Tensor, n_lego: int, repeats: int, totals: Totals
) -> str:
    if n_lego >= len(fragments):
        return f"{'exact':>12s} {'-':>6s}"
    ours, theirs = [], []
    for _ in range(repeats):
        error, seconds = _ours(fragments, n_lego, 1, False)
        ours.append(seconds)
        start = time.perf_counter()
        fitted = run(fragments, n_lego)
        theirs.append(time.perf_counter() - start)
    ratio = error / max(_energy(fragments - fitted), 1e-30)
    mine, other = statistics.median(ours), statistics.median(theirs)
    totals.error_ratios.setdefault(rival, []).append(ratio)
    totals.rival_seconds[rival] = totals.rival_seconds.get(rival, 0.0) + other
    totals.rival_ours[rival] = totals.rival_ours.get(rival, 0.0) + mine
    return f"{ratio:12.4f} {other / mine:6.2f}"


def _assemble(factors: LegoUnit) -> Tensor:
    slots = factors.lego_filters[factors.index]
    if factors.coefficients is not None:
        slots = slots * factors.coefficients[:, :, None]
    return slots.sum(1)


def _energy(rows: Tensor) -> float:
    return float(rows.square().sum(dtype=torch.float64))


def _verdict(totals: Totals, forms: list[tuple[str, int, bool]], rivals: bool) -> bool:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    checks: list[tuple[str, bool]] = []
    for form, k, _ in forms:
        seconds = totals.seconds.get(form, 0.0)
        most = MOST_SECONDS.get(k)
        if most is None:
            print(f"  {form}: {seconds:.1f} s in all")
        else:
            checks.append((f"{form}: {seconds:.1f} s in all, target {most:.0f}", seconds <= most))
    for rival, ratios in totals.error_ratios.items():
        worst, mean = max(ratios), statistics.mean(ratios)
        text = f"squared error over {rival}'s: worst {worst:.4f}, mean {mean:.4f}"
        checks.append((f"{text}, target {WORST_ERROR_RATIO}", worst <= WORST_ERROR_RATIO))
        faster = totals.rival_seconds[rival] / totals.rival_ours[rival]
        text = f"{rival} {totals.rival_seconds[rival]:.1f} s, ours {totals.rival_ours[rival]:.1f} s"
        if rival == "sklearn":
            text += f", ratio {faster:.2f}, target {LEAST_TIME_RATIO}"
            checks.append((text, faster >= LEAST_TIME_RATIO))
        else:
            print(f"  {text}, ratio {faster:.2f}")
    if rivals:
        print(f"  peak memory {peak:.0f} MB, rivals included")
    else:
        text = f"peak memory {peak:.0f} MB, target {MOST_MEMORY_MB:.0f}"
        checks.append((text, peak <= MOST_MEMORY_MB))
    for text, good in checks:
        print(f"  {'holds ' if good else 'MISSED'} {text}")
    return all(good for _, good in checks)


if __name__ == "__main__":
    sys.exit(main())
