"""Does any model break? Converts every CNN name of timm and torchvision and checks each thoroughly.

    python benchmarks/coverage.py --jobs 2 --results coverage.jsonl --table docs/coverage.md

Every name is planned without memory for its tensors. Those of up to --max-params parameters are
then built for real, with constant parameters and norm statistics randomised (zero-initialised norms
hide wrong weights), and converted exactly (m' = number of fragments). Their outputs must equal the
original's bit for bit; so must those of a saved and reloaded copy and of the dense network made
from it; and one backward pass must give every Lego filter and coefficient that took part a finite
gradient. Results are appended to a file as they come; a second run goes on where the first ended.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
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
from legocompress.checkpoint import skeleton_of
from legocompress.errors import LegoError
from legocompress.models.factory import build
from legocompress.models.probe import evaluating, model_cfg
from legocompress.models.resolution import default_args
from legocompress.state.source import Source

EXACT = lego.LegoSpec(m=2, o=2, allow_expansion=True)
SIZES = (64, 96, 128, 160, 192, 224, 256)


def names() -> list[str]:
    """Every architecture name of both libraries."""
    return [f"timm/{n}" for n in timm.list_models()] + [
        f"torchvision/{n}" for n in torchvision.models.list_models()
    ]


def source(name: str) -> Source:
    """What `legocompress.create` builds for this name."""
    library, _, architecture = name.partition("/")
    assert library in ("timm", "torchvision")
    args = default_args(library, architecture)  # type: ignore[arg-type]
    if any(detector in architecture for detector in ("rcnn", "retinanet", "fcos")):
        args |= {"min_size": 160, "max_size": 256}  # else every image is enlarged to 800
    return Source(library, architecture, args)  # type: ignore[arg-type]


def randomise_(model: nn.Module, seed: int = 0) -> None:
    """Give values to parameters and statistics that are constant after initialisation."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * noise(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.mul_(1 + 0.2 * noise(buffer).clamp(-2, 2))


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a nested output."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [t for part in output for t in tensors(part)]
    return []


def inputs(model: nn.Module, device: str, seed: int = 1) -> tuple[Any, ...]:
    """The smallest input that the network accepts, in its own kind: batch, list of images, or pair.

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
                    found = tensors(model(*args))
            # A network may refuse an input in any way; the next one is tried.
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            if found:
                return args
    raise RuntimeError(f"no input accepted: {faults[-1] if faults else 'no output'}")


def run(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    """Outputs in eval mode; random layers are seeded."""
    torch.manual_seed(0)
    with evaluating(model):
        return tensors(model(*copy.deepcopy(args)))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit equality of two outputs."""
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))
        for x, y in zip(a, b, strict=True)
    )


def check_gradients(model: nn.Module, args: tuple[Any, ...]) -> str | None:
    """One backward pass: a Lego layer that took part must have finite gradients everywhere."""
    took_part = set()
    hooks = [
        module.register_forward_hook(lambda m, i, o: took_part.add(m))
        for _, module in lego.lego_modules(model)
    ]
    model.eval()
    outputs = [t for t in tensors(model(*args)) if t.requires_grad]
    for hook in hooks:
        hook.remove()
    if not outputs:
        return None if not any(t.numel() for t in tensors(model(*args))) else "no gradient"
    torch.stack([t.float().square().sum() for t in outputs]).sum().backward()
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
    model = build(source(name)).eval()
    randomise_(model)
    model.lego_source = source(name)  # type: ignore[assignment]
    model.to(device)
    args = inputs(model, device)
    planned = lego.plan(model, EXACT, args)
    if planned.reparameterize:
        model = timm.utils.reparameterize_model(model)
        planned = lego.plan(model, EXACT, args)
    original = copy.deepcopy(model)
    expected = run(original, args)
    lego.convert_(model, planned)
    faults = []
    if not same(expected, run(model, args)):
        steady = same(expected, run(original, args))
        faults.append("converted: outputs differ" if steady else "the original is not steady")
    if not same(expected, run(lego.to_dense(model), args)):
        faults.append("to_dense: outputs differ")
    with tempfile.TemporaryDirectory() as folder:
        lego.save(model, Path(folder) / "lego")
        if not same(expected, run(lego.load(Path(folder) / "lego").to(device), args)):
            faults.append("reloaded: outputs differ")
    fault = check_gradients(model, args)
    return [*faults, f"backward: {fault}"] if fault else faults


def check(name: str, max_params: int, device: str = "cpu") -> dict[str, Any]:
    """Plan one architecture without memory, and check it for real where it is small enough."""
    start = time.perf_counter()
    result: dict[str, Any] = {"name": name, "status": "planned", "faults": [], "skipped": {}}
    try:
        skeleton = skeleton_of(source(name))
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


def _quiet() -> None:
    torch.set_num_threads(1)
    # Bit equality asks for the same algorithm at every call.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _job(task: tuple[str, int, str]) -> dict[str, Any]:
    return check(*task)


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[Callable[..., Any]]:
    with multiprocessing.get_context("spawn").Pool(jobs, _quiet, maxtasksperchild=25) as pool:
        yield pool.imap_unordered


def write_table(results: list[dict[str, Any]], path: Path, max_params: int) -> None:
    """Write the findings as a page of the documentation."""
    lines = [
        "# Coverage",
        "",
        f"From `python benchmarks/coverage.py --max-params {max_params:g}`, in resumed runs: timm "
        f"{timm.__version__}, torchvision {torchvision.__version__}, torch {torch.__version__}.",
        "",
        "*Checked*: converted exactly with random weights and statistics; outputs equal those of",
        "the original bit for bit, also reloaded and as dense network; gradients are finite.",
        f"*Planned*: more than {max_params / 1e6:.0f}M parameters, planned without memory only.",
        "",
        "| library | names | checked | planned | nothing to convert | no Conv2d | failures |",
        "|---|---|---|---|---|---|---|",
    ]
    for library in ("timm", "torchvision"):
        own = [r for r in results if r["name"].startswith(library + "/")]
        sound = Counter(r["status"] for r in own if not r["faults"])
        columns = [sound[s] for s in ("checked", "planned", "nothing to convert", "no Conv2d")]
        bad = sum(bool(r["faults"]) for r in own)
        lines.append(f"| {library} | {len(own)} | {' | '.join(map(str, columns))} | {bad} |")
    skipped: Counter[str] = Counter()
    for result in results:
        skipped.update(result["skipped"])
    lines += ["", "| layers | number |", "|---|---|"]
    lines += [f"| converted | {sum(r.get('converted', 0) for r in results)} |"]
    lines += [f"| dense: {reason} | {number} |" for reason, number in skipped.most_common()]
    failures = [r for r in results if r["faults"]]
    if failures:
        lines += ["", "| failing name | what happens |", "|---|---|"]
        lines += [f"| {r['name']} | {'; '.join(r['faults'])} |" for r in failures]
    text = "\n".join(lines) + "\n"
    print(text)
    path.write_text(text)


def main() -> None:
    """Run the coverage and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("coverage.jsonl"))
    parser.add_argument("--table", type=Path, default=Path("docs/coverage.md"))
    parser.add_argument("--max-params", type=float, default=30e6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--filter", default="", help="only names that contain this")
    args = parser.parse_args()
    _quiet()
    results = []
    if args.results.exists():
        results = [json.loads(line) for line in args.results.read_text().splitlines()]
    known = {r["name"] for r in results}
    todo = [n for n in names() if args.filter in n and n not in known]
    with args.results.open("a") as log, _workers(args.jobs) as imap:
        tasks = [(name, int(args.max_params), args.device) for name in todo]
        for done, result in enumerate(imap(_job, tasks), 1):
            results.append(result)
            log.write(json.dumps(result) + "\n")
            log.flush()
            state = "; ".join(result["faults"]) or result["status"]
            print(f"{done}/{len(todo)} {result['name']}: {state}", flush=True)
    write_table(sorted(results, key=lambda r: r["name"]), args.table, int(args.max_params))


if __name__ == "__main__":
    main()
