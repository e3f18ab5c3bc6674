"""A compressed network against the dense one in its strongest forms, in interleaved runs."""

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
from legocompress.models.probe import default_input
from legocompress.models.source import source_of
from legocompress.report.measurement import measure
from legocompress.report.memory import peak_bytes
from legocompress.report.results import LayerReport
from legocompress.report.rivals import AGAINST, Against, Form, rivals
from legocompress.state.model_state import lego_state

LEGO = "lego"
# The threads of a form keep spinning after it, on the cores of the next form.
COOL_DOWN_SECONDS = 0.1


@dataclass(frozen=True)
class FormTime:
    """One form's interleaved runs.

    `ratio` is the median of the strongest dense form over this one's, above 1 where this one is
    faster; `spread` the distance of the quartiles over the median; `peak_bytes` how far one run
    raises the memory of the process.
    """

    form: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float
    spread: float
    peak_bytes: int | None


@dataclass(frozen=True)
class LayerTime:
    """One deployed Lego layer: the route it took, and the best dense form of the same layer.

    `ratio` is dense over Lego time; `bound` and `bound_used` are the ratios of multiply-accumulates
    with all Lego filters and with those that are used.
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
    """All forms at one batch size and number of threads."""

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
        """How many times faster the compressed network is than the strongest dense form."""
        return next(form.ratio for form in self.forms if form.form == LEGO)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
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

    All forms run in this process, in turns, on the same random images and number of threads. At one
    thread CPU time is form_times, which other processes cannot spoil, else wall clock.

    Args:
        model: a converted network on the CPU; it is deployed for the batch and threads.
        batch: images a run.
        threads: of the CPU; by default those that torch has now. Torch gets its own number back.
        against: groups of rivals, see `legocompress.report.rivals`.
        rounds: timed runs of each form.
        seconds: no further round starts once the timing has form_times this much.
        image: one image (1, c, H, W) for the size; by default as the configuration names it.
        also: makes further forms of the compressed network, (name, what runs it), for the images;
            they are timed too, and never form_times for the strongest dense form.
        on_form: called with the name of each form before it is built.

    Raises:
        UsageError: the network is not on the CPU, takes no images, is wrapped, compiled or
            scripted, or holds a lazy layer.
    """
    check_network(model)
    sample = default_input(model) if image is None else image
    if sample is None or sample.device.type != "cpu":
        raise UsageError("the benchmark runs networks of images on the CPU; move the model there")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        return _benchmark(model, _images(sample, batch), against, rounds, seconds, also, on_form)
    finally:
        torch.set_num_threads(before)


def _images(sample: Tensor, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, *sample.shape[1:], generator=generator).to(sample.dtype)


def _benchmark(
    model: nn.Module,
    x: Tensor,
    against: tuple[Against, ...],
    rounds: int,
    seconds: float,
    also: Callable[[nn.Module, Tensor], Iterator[tuple[str, Form]]] | None,
    on_form: Callable[[str], None] | None,
) -> BenchmarkRun:
    def told(name: str) -> None:
        if on_form is not None:
            on_form(name)

    told(LEGO)
    architecture = source_of(model).architecture
    dense = to_dense(model).eval()
    theory = measure(model, example_input=x)
    with torch.no_grad():
        extra = dict(also(undeploy_(model), x)) if also is not None else {}
    deploy_(model, x, remeasure=True)
    deployment: Deployment = lego_state(model).deployment  # type: ignore[assignment]
    forms: dict[str, Form] = {LEGO: lambda: model(x), **extra}
    left_out = {}
    for name, form in rivals(dense, architecture, x, against, told):
        if isinstance(form, str):
            left_out[name] = form
        else:
            forms[name] = form
    with torch.no_grad():
        cool_down = cool_down_seconds(x.device, COOL_DOWN_SECONDS)
        form_times = time_interleaved(
            forms, x.device, rounds, seconds, warm=True, cool_down=cool_down
        )
        peaks = {name: _peak(name, form) for name, form in forms.items()}
    medians = {name: statistics.median(times) for name, times in form_times.items()}
    rival_names = [name for name in forms if name != LEGO and name not in extra]
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
        notes=(*deployment.notes, *_kernel_note()),
    )


def _kernel_note() -> tuple[str, ...]:
    why = kernels.why_unavailable()
    return () if why is None else (f"the fused kernel is missing: {why}",)


def _peak(name: str, form: Callable[[], object]) -> int | None:
    """The peak of forms whose memory PyTorch gives back; the others keep an arena of their own."""
    return None if name in ("ONNX Runtime", "OpenVINO") else peak_bytes(form)


def _form_time(name: str, times: list[float], strongest: float, peak: int | None) -> FormTime:
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return FormTime(
        form=name,
        median_ms=1e3 * middle,
        quartiles_ms=(1e3 * low, 1e3 * high),
        ratio=strongest / middle,
        spread=(high - low) / middle,
        peak_bytes=peak,
    )


def _layer_times(deployment: Deployment, rows: tuple[LayerReport, ...]) -> Iterator[LayerTime]:
    """The Lego layers that were timed, each against its own best dense form."""
    choices = deployment.choices
    theory = {row.name: row for row in rows if row.n_lego is not None and row.macs}
    for name, times in deployment.milliseconds.items():
        row = theory.get(name.partition("#")[0])
        if row is None:
            continue
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
