"""Which CNNs of timm and torchvision convert, and whether they still compute the same.

    python -m benchmarks.coverage --jobs 2 --results coverage.jsonl --table docs/coverage.md

Claim: no architecture breaks. Every name is planned without memory for its tensors. Those of up to
--max-params parameters are then built for real, with constant parameters and norm statistics
randomised (zero-initialised norms hide wrong weights), and converted exactly (m' = number of
fragments). Their outputs must equal the original's bit for bit; so must those of a saved and
reloaded copy and of the dense network made from it; and one backward pass must give every Lego
filter and coefficient that took part a finite gradient. Writes the table of docs/coverage.md. Takes
hours; `--filter NAME` checks only names that contain NAME. Results are appended to a file as they
come; a second run goes on where the first ended.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import multiprocessing
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import legocompress as lego
from benchmarks.common.arguments import make_parser
from benchmarks.common.networks import randomise_
from benchmarks.common.results import Row, append_row, read_rows
from benchmarks.common.tables import format_head, format_row
from legocompress.checkpoint import build_skeleton
from legocompress.errors import LegoError
from legocompress.models.factory import build
from legocompress.models.probe import evaluating, model_cfg
from legocompress.models.resolution import default_args
from legocompress.state.source import Source

EXACT = lego.LegoSpec(m=2, o=2, allow_expansion=True)
SIZES = (64, 96, 128, 160, 192, 224, 256)


def list_names() -> list[str]:
    """Every architecture name of both libraries."""
    return [f"timm/{n}" for n in timm.list_models()] + [
        f"torchvision/{n}" for n in torchvision.models.list_models()
    ]


def make_source(name: str) -> Source:
    """What `legocompress.create` builds for this name, as a source."""
    library, _, architecture = name.partition("/")
    assert library in ("timm", "torchvision")
    args = default_args(library, architecture)  # type: ignore[arg-type]
    if any(detector in architecture for detector in ("rcnn", "retinanet", "fcos")):
        args |= {"min_size": 160, "max_size": 256}  # else every image is enlarged to 800
    return Source(library, architecture, args)  # type: ignore[arg-type]


def collect_tensors(output: Any) -> list[Tensor]:
    """All tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [t for part in output for t in collect_tensors(part)]
    return []


def find_input(model: nn.Module, device: str, seed: int = 1) -> tuple[Any, ...]:
    """The smallest input that the network accepts: a batch, a list of images, or a pair.

    Raises:
        RuntimeError: it accepts none.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    named = model_cfg(model).get("input_size")
    channels = first.in_channels if first is not None and first.in_channels <= 4 else 3
    sizes = [size for size in SIZES if not named or size <= max(named[1:])]
    shapes = [(channels, size, size) for size in sizes] + ([tuple(named)] if named else [])
    faults = []
    for shape in dict.fromkeys(shapes):
        x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed)).to(device)
        for args in ((x,), (list(x),), (x, x.flip(-1))):
            try:
                with evaluating(model):
                    outputs = collect_tensors(model(*args))
            # A network may refuse an input in any way; the next one is tried.
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            if outputs:
                return args
    raise RuntimeError(f"no input accepted: {faults[-1] if faults else 'no output'}")


def run_model(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    """Outputs in eval mode; random layers are seeded."""
    torch.manual_seed(0)
    with evaluating(model):
        return collect_tensors(model(*copy.deepcopy(args)))


def are_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two outputs are equal bit for bit."""
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))
        for x, y in zip(a, b, strict=True)
    )


def check_gradients(model: nn.Module, args: tuple[Any, ...]) -> str | None:
    """One backward pass: a Lego layer that took part must have finite gradients everywhere."""
    took_part: set[nn.Module] = set()
    hooks = [
        module.register_forward_hook(lambda m, i, o: took_part.add(m))
        for _, module in lego.lego_modules(model)
    ]
    model.eval()
    outputs = [t for t in collect_tensors(model(*args)) if t.requires_grad]
    for hook in hooks:
        hook.remove()
    if not outputs:
        return None if not any(t.numel() for t in collect_tensors(model(*args))) else "no gradient"
    torch.autograd.backward(torch.stack([t.float().square().sum() for t in outputs]).sum())
    for name, module in lego.lego_modules(model):
        parameters = {"lego_filters": module.lego_filters, "coefficients": module.coefficients}
        for kind, parameter in parameters.items():
            if parameter is None or parameter.grad is None:
                continue
            if not torch.isfinite(parameter.grad).all():
                return f"{name}.{kind} has a gradient that is not finite"
    reached = [m for m in took_part if m.lego_filters.grad is not None]
    return None if reached or not took_part else "no Lego filter has a gradient"


def check_real(name: str, device: str) -> list[str]:
    """Convert one architecture exactly, for real; returns what went wrong."""
    torch.manual_seed(0)
    model = build(make_source(name)).eval()
    randomise_(model)
    lego.lego_state(model).source = make_source(name)  # type: ignore[assignment]
    model.to(device)
    args = find_input(model, device)
    planned = lego.plan(model, EXACT, args)
    if planned.reparameterize:
        model = timm.utils.reparameterize_model(model)
        planned = lego.plan(model, EXACT, args)
    original = copy.deepcopy(model)
    expected = run_model(original, args)
    lego.convert_(model, planned)
    faults = []
    if not are_equal(expected, run_model(model, args)):
        repeats = are_equal(expected, run_model(original, args))
        faults.append("converted: outputs differ" if repeats else "the original is random")
    if not are_equal(expected, run_model(lego.to_dense(model), args)):
        faults.append("to_dense: outputs differ")
    with tempfile.TemporaryDirectory() as folder:
        lego.save(model, Path(folder) / "lego")
        if not are_equal(expected, run_model(lego.load(Path(folder) / "lego").to(device), args)):
            faults.append("reloaded: outputs differ")
    fault = check_gradients(model, args)
    return [*faults, f"backward: {fault}"] if fault else faults


def check_architecture(name: str, max_params: int, device: str = "cpu") -> Row:
    """Plan one architecture without memory, and check it for real where it is small enough."""
    start = time.perf_counter()
    result: Row = {"name": name, "status": "planned", "faults": [], "skipped": {}}
    try:
        skeleton = build_skeleton(make_source(name))
        result["params"] = sum(p.numel() for p in skeleton.parameters())
        if not any(isinstance(m, nn.Conv2d) for m in skeleton.modules()):
            return {**result, "status": "no Conv2d"}
        planned = lego.plan(skeleton, lego.LegoSpec())
        reasons = (reason.partition(":")[0] for reason in planned.skipped.values())
        result |= {"converted": len(planned.layers), "skipped": Counter(reasons)}
        if not planned.layers:
            return {**result, "status": "nothing to convert"}
        if result["params"] <= max_params:
            result |= {"status": "checked", "faults": check_real(name, device)}
    # Whatever a model does to us is a finding to write down, not an end of the run.
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        kind = "refused" if isinstance(error, LegoError) else "broke"
        result["faults"] = [f"{kind}: {text}"]
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def _silence() -> None:
    torch.set_num_threads(1)
    # Bit equality asks for the same algorithm at every call.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _run_task(task: tuple[str, int, str]) -> Row:
    return check_architecture(*task)


@contextlib.contextmanager
def _open_workers(jobs: int) -> Iterator[Callable[..., Any]]:
    with multiprocessing.get_context("spawn").Pool(jobs, _silence, maxtasksperchild=25) as pool:
        yield pool.imap_unordered


def count_names(results: list[Row]) -> list[str]:
    """Lines of the table of names per library."""
    columns = ["library", "names", "checked", "planned", "nothing to convert", "no Conv2d"]
    lines = [format_head([*columns, "failures"])]
    for library in ("timm", "torchvision"):
        rows = [r for r in results if r["name"].startswith(library + "/")]
        sound = Counter(r["status"] for r in rows if not r["faults"])
        bad = sum(bool(r["faults"]) for r in rows)
        lines.append(format_row([library, len(rows), *(sound[c] for c in columns[2:]), bad]))
    return lines


def count_layers(results: list[Row]) -> list[str]:
    """Lines of the table of layers: converted, and dense by reason."""
    skipped: Counter[str] = Counter()
    for result in results:
        skipped.update(result["skipped"])
    lines = [format_head(["layers", "number"])]
    lines.append(format_row(["converted", sum(r.get("converted", 0) for r in results)]))
    return lines + [format_row([f"dense: {why}", number]) for why, number in skipped.most_common()]


def list_failures(results: list[Row]) -> list[str]:
    """Lines of the table of names that fail; none where all hold."""
    failures = [format_row([r["name"], "; ".join(r["faults"])]) for r in results if r["faults"]]
    return ["", format_head(["failing name", "what happens"]), *failures] if failures else []


def write_table(results: list[Row], path: Path, max_params: int) -> None:
    """Print the results and write them as a page of the documentation."""
    lines = [
        "# Coverage",
        "",
        f"From `python -m benchmarks.coverage --max-params {max_params:g}`, in resumed runs: timm "
        f"{timm.__version__}, torchvision {torchvision.__version__}, torch {torch.__version__}.",
        "",
        "*Checked*: converted exactly with random weights and statistics; outputs equal those of",
        "the original bit for bit, also reloaded and as dense network; gradients are finite.",
        f"*Planned*: more than {max_params / 1e6:.0f}M parameters, planned without memory only.",
        "",
    ]
    lines += [*count_names(results), "", *count_layers(results), *list_failures(results)]
    text = "\n".join(lines) + "\n"
    print(text)
    path.write_text(text)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("coverage.jsonl"))
    parser.add_argument("--table", type=Path, default=Path("docs/coverage.md"))
    parser.add_argument("--max-params", type=float, default=30e6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--filter", default="", help="only names that contain this")
    return parser.parse_args()


def main() -> None:
    """Check what is missing and write the table."""
    args = parse_arguments()
    _silence()
    results = read_rows(args.results)
    done = {r["name"] for r in results}
    todo = [n for n in list_names() if args.filter in n and n not in done]
    with _open_workers(args.jobs) as imap:
        tasks = [(name, int(args.max_params), args.device) for name in todo]
        for number, result in enumerate(imap(_run_task, tasks), 1):
            results.append(result)
            append_row(args.results, result)
            state = "; ".join(result["faults"]) or result["status"]
            print(f"{number}/{len(todo)} {result['name']}: {state}", flush=True)
    write_table(sorted(results, key=lambda r: r["name"]), args.table, int(args.max_params))


if __name__ == "__main__":
    main()
