"""Time a compressed network against the dense one in its strongest forms, in interleaved runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from legocompress import kernels
from legocompress.deploy import Deployment, deploy_, undeploy_
from legocompress.deploy.backends import DENSE_ROUTES
from legocompress.deploy.timing import cool_down_seconds, time_interleaved
from legocompress.errors import UsageError
from legocompress.lego.surgery import to_dense
from legocompress.models.checks import check_network
from legocompress.models.inputs import check_one_input
from legocompress.models.probe import default_input
from legocompress.models.source import source_of
from legocompress.report.measurement import measure
from legocompress.report.memory import measure_peak_bytes
from legocompress.report.results import LayerReport, Report
from legocompress.report.rivals import AGAINST, RIVALS, Against, Form, build_rivals
from legocompress.state.model_state import lego_state

LEGO = "lego"
# After a form has run, its threads keep spinning for a while on the cores that the next form needs.
# So each form runs untimed for this long before it is timed.
COOL_DOWN_SECONDS = 0.1


@dataclass(frozen=True)
class FormTime:
    """The times of one form.

    ratio       median time of the strongest dense form / median time of this form;
                above 1 this form is faster
    spread      (upper quartile - lower quartile) / median
    peak_bytes  by how much one run raises the memory of the process; None if unknown
    """

    form: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float
    spread: float
    peak_bytes: int | None


@dataclass(frozen=True)
class LayerTime:
    """The times of one deployed Lego layer on its route and in its fastest dense form.

    ratio       dense_ms / ms
    bound       the ratio in theory: dense MACs / Lego MACs
    bound_used  the same, if Lego filters that a split does not use are skipped
    """

    name: str
    route: str
    ms: float
    dense_ms: float
    ratio: float
    bound: float
    bound_used: float


@dataclass(frozen=True)
class BenchmarkRun:
    """The times of all forms at one batch size and number of threads.

    `rounds` is how often each form was timed, and `clock` what they were timed with. `strongest`
    names the fastest dense form. `bound` and `bound_used` are as in `LayerTime`, but for the whole
    network. `left_out` gives the reason for each form that could not run.
    """

    batch: int
    threads: int
    input_shape: tuple[int, ...]
    dtype: str
    processor: str
    instructions: str
    clock: str
    rounds: int
    strongest: str
    bound: float
    bound_used: float
    forms: tuple[FormTime, ...]
    left_out: dict[str, str]
    layers: tuple[LayerTime, ...]
    notes: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """How many times as fast the compressed network is as the strongest dense form."""
        return next(form.ratio for form in self.forms if form.form == LEGO)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the ratio, as plain JSON values."""
        return {**asdict(self), "ratio": self.ratio}


def benchmark(
    model: nn.Module,
    batch: int = 1,
    threads: int | None = None,
    against: tuple[Against, ...] = AGAINST,
    rounds: int = 15,
    seconds: float = 120.0,
    image: Tensor | None = None,
    also: Callable[[nn.Module, Tensor], Iterator[tuple[str, Form]]] | None = None,
    on_form: Callable[[str], None] | None = None,
) -> BenchmarkRun:
    """Deploy a compressed network and time it against the dense network with the same weights.

    All forms run in this process, in turns, on the same random images and number of threads. With
    one thread, CPU time is measured, because other processes do not disturb it; with more threads,
    wall-clock time.

    Args:
        model: a converted network on the CPU; it is deployed for this batch and thread count.
        batch: images per run.
        threads: CPU threads; by default torch's current number, which is restored at the end.
        against: groups of rivals, see `legocompress.report.rivals`.
        rounds: timed runs of each form.
        seconds: once the timing has taken this long, no further round starts.
        image: one image (1, c, H, W) that gives the size; the default is the size in the network's
            configuration.
        also: builds further forms of the compressed network for the images, as pairs (name, what
            runs it). They are timed too, but never count as the strongest dense form.
        on_form: called with the name of each form before it is built.

    Raises:
        UsageError: the network is not on the CPU, does not take one input of images, is wrapped,
            compiled or scripted, or holds a lazy layer.
    """
    check_network(model)
    check_one_input(model, "benchmark")
    sample = default_input(model) if image is None else image
    if sample is None or sample.device.type != "cpu":
        raise UsageError("the benchmark runs networks of images on the CPU; move the model there")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        x = _random_images(sample, batch)
        return _run_benchmark(model, x, against, rounds, seconds, also, on_form)
    finally:
        torch.set_num_threads(before)


def _random_images(sample: Tensor, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, *sample.shape[1:], generator=generator).to(sample.dtype)


def _run_benchmark(
    model: nn.Module,
    x: Tensor,
    against: tuple[Against, ...],
    rounds: int,
    seconds: float,
    also: Callable[[nn.Module, Tensor], Iterator[tuple[str, Form]]] | None,
    on_form: Callable[[str], None] | None,
) -> BenchmarkRun:
    announce = on_form or (lambda name: None)
    announce(LEGO)
    architecture = source_of(model).architecture
    dense = to_dense(model).eval()
    theory = measure(model, example_input=x)
    with torch.no_grad():
        extra = dict(also(undeploy_(model), x)) if also is not None else {}
    deploy_(model, x, remeasure=True)
    deployment: Deployment = lego_state(model).deployment  # type: ignore[assignment]
    rivals: dict[str, Form] = {}
    left_out: dict[str, str] = {}
    for name, form in build_rivals(dense, architecture, x, against, announce):
        if isinstance(form, str):
            left_out[name] = form
        else:
            rivals[name] = form
    forms: dict[str, Form] = {LEGO: lambda: model(x), **extra, **rivals}
    with torch.no_grad():
        cool_down = cool_down_seconds(x.device, COOL_DOWN_SECONDS)
        form_times = time_interleaved(
            forms, x.device, rounds, seconds, warm=True, cool_down=cool_down
        )
        peaks = {name: _measure_peak(name, form) for name, form in forms.items()}
    return _summarize_run(x, theory, deployment, form_times, peaks, list(rivals), left_out)


def _summarize_run(
    x: Tensor,
    theory: Report,
    deployment: Deployment,
    form_times: dict[str, list[float]],
    peaks: dict[str, int | None],
    rival_names: list[str],
    left_out: dict[str, str],
) -> BenchmarkRun:
    """Reduce the `form_times` (seconds, by form) to the figures of the report."""
    medians = {name: statistics.median(times) for name, times in form_times.items()}
    strongest = min(rival_names or [LEGO], key=lambda name: medians[name])
    totals = theory.totals()
    machine = deployment.choices.machine
    return BenchmarkRun(
        batch=x.shape[0],
        threads=machine.threads,
        input_shape=tuple(x.shape),
        dtype=machine.dtype,
        processor=machine.processor,
        instructions=machine.instructions,
        clock="CPU time" if machine.threads == 1 else "wall clock",
        rounds=min(map(len, form_times.values())),
        strongest=strongest,
        bound=totals["dense_macs"] / totals["macs"],
        bound_used=totals["dense_macs"] / totals["macs_used_only"],
        forms=tuple(
            _form_time(name, times, medians[strongest], peaks[name])
            for name, times in form_times.items()
        ),
        left_out=left_out,
        layers=tuple(_layer_times(deployment, theory.rows)),
        notes=(*deployment.notes, *_kernel_notes()),
    )


def _kernel_notes() -> tuple[str, ...]:
    why = kernels.why_unavailable()
    return () if why is None else (f"the fused kernel is missing: {why}",)


def _measure_peak(name: str, form: Callable[[], object]) -> int | None:
    """Measure the peak memory of a form, unless its runtime keeps memory from run to run."""
    if any(rival.keeps_memory for rival in RIVALS if rival.name == name):
        return None
    return measure_peak_bytes(form)


def _form_time(name: str, times: list[float], strongest: float, peak: int | None) -> FormTime:
    """Reduce the times of one form; all times are in seconds."""
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return FormTime(
        form=name,
        median_ms=1e3 * median,
        quartiles_ms=(1e3 * low, 1e3 * high),
        ratio=strongest / median,
        spread=(high - low) / median,
        peak_bytes=peak,
    )


def _layer_times(deployment: Deployment, rows: tuple[LayerReport, ...]) -> Iterator[LayerTime]:
    """Yield the times of the Lego layers that `deploy_` has timed.

    A layer that runs several times is timed as 'name', 'name#2' and so on.
    """
    choices = deployment.choices
    theory = {row.name: row for row in rows if row.n_lego is not None and row.macs}
    for name, times in deployment.milliseconds.items():
        row = theory.get(name.partition("#")[0])
        if row is None:
            continue
        # Formats are chosen per traced graph; the layer is in the innermost one that contains it.
        graphs = [g for g in choices.formats if not g or name == g or name.startswith(f"{g}.")]
        route, layout = choices.routes[name], choices.formats[max(graphs, key=len)]
        ms = times[f"{route}, {layout}"]
        dense = [t for form, t in times.items() if form.partition(",")[0] in DENSE_ROUTES]
        assert row.dense_macs is not None
        yield LayerTime(
            name=name,
            route=route,
            ms=ms,
            dense_ms=min(dense, default=ms),
            ratio=min(dense, default=ms) / ms,
            bound=row.dense_macs / (row.macs or 1),
            bound_used=row.dense_macs / (row.macs_used_only or 1),
        )
