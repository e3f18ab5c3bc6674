"""Compare networks side by side: bytes, MACs, latency, agreement with the first, accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from legocompress.data.datasets import UNLABELLED
from legocompress.data.images import Images
from legocompress.deploy import deploy_
from legocompress.deploy.timing import cool_down_seconds, time_interleaved
from legocompress.errors import DataError, DeployError
from legocompress.lego.surgery import freeze_
from legocompress.report.contestants import Contestant, Kind, check_same_sizes

BATCH_SIZE = 32  # images per batch where scores are measured
SECONDS = 120.0  # after which no new round of timed runs starts
COOL_DOWN_SECONDS = 0.1  # as in versus_dense.py


@dataclass(frozen=True)
class Scores:
    """Percentages on images, each None where it was not measured."""

    agreement: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class ComparisonRow:
    """One network beside the others.

    Attributes:
        name: what the user called it.
        kind: `lego`, `dense` or `onnx`.
        n_bytes: size on disk; for a dense network that of its parameters and buffers.
        macs: multiply-accumulates for one image; None if unknown.
        median_ms: time of one run.
        spread: (upper quartile - lower quartile) / median of these times.
        speedup: median time of the first network / median time of this one.
        agreement: percentage of the images with the class of the first network.
        top1: accuracy in percent on the labelled images.
    """

    name: str
    kind: Kind
    n_bytes: int
    macs: int | None
    median_ms: float
    spread: float
    speedup: float
    agreement: float | None
    top1: float | None


@dataclass(frozen=True)
class Comparison:
    """Networks side by side, and the conditions of the measurement.

    `images` were compared for agreement, and `labelled` for top-1. `notes` say which networks could
    not be deployed.
    """

    rows: tuple[ComparisonRow, ...]
    batch: int
    threads: int
    image_shape: tuple[int, ...]
    rounds: int
    images: int
    labelled: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain JSON values."""
        return asdict(self)


def compare_networks(
    contestants: Sequence[Contestant],
    images: Images | None = None,
    labelled: Images | None = None,
    batch: int = 1,
    rounds: int = 15,
    workers: int = 0,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Compare networks with the first of them.

    Scores are measured first. Then PyTorch networks are deployed for this machine, in place, ONNX
    files run in ONNX Runtime, and all are timed in interleaved runs on random images.

    Args:
        contestants: what `open_contestants` returned, at least two.
        images: to measure the agreement on; by default the labelled images, if given.
        labelled: images with labels, to measure top-1 on.
        batch: images per timed run.
        rounds: timed runs of each network.
        workers: processes that read images.
        on_step: called with the name of the step, and how much of it is done, of how much.

    Raises:
        DataError: the networks differ in the number of classes, or a label is beyond them.
    """
    announce = on_step or (lambda step, done, total: None)
    image_size = check_same_sizes({each.name: each.image_size for each in contestants})
    example = torch.rand(batch, *image_size, generator=torch.Generator().manual_seed(0))
    n_classes = _check_same_classes(contestants, example)
    for contestant in contestants:
        if isinstance(contestant.network, nn.Module):
            freeze_(contestant.network)
    scores = [Scores() for _ in contestants]
    for data, has_labels in ((labelled, True), (images, False)):
        if data is not None:
            scored = _score(contestants, data, has_labels, n_classes, workers, announce)
            scores = [_update(old, new) for old, new in zip(scores, scored, strict=True)]
    notes = _deploy(contestants, example, announce)
    announce("timing", 0, 1)
    times = _time(contestants, example, rounds)
    agreed_on = images or labelled
    return Comparison(
        rows=tuple(_make_rows(contestants, times, scores)),
        batch=batch,
        threads=torch.get_num_threads(),
        image_shape=(batch, *image_size),
        rounds=min(map(len, times)),
        images=0 if agreed_on is None else agreed_on.size,
        labelled=0 if labelled is None else labelled.size,
        notes=tuple(notes),
    )


def _check_same_classes(contestants: Sequence[Contestant], example: Tensor) -> int:
    """Return the number of classes of all networks.

    Raises:
        DataError: they differ.
    """
    first = contestants[0]
    expected = first.classify(example).shape[1]
    for contestant in contestants[1:]:
        n_classes = contestant.classify(example).shape[1]
        if n_classes != expected:
            raise DataError(
                f"{first.name!r} has {expected} classes and {contestant.name!r} has {n_classes}; "
                "compare networks of the same classes"
            )
    return expected


def _score(
    contestants: Sequence[Contestant],
    images: Images,
    has_labels: bool,
    n_classes: int,
    workers: int,
    announce: Callable[[str, int, int], None],
) -> list[Scores]:
    """Measure agreement with the first network, and top-1 where `has_labels`.

    Raises:
        DataError: a label is beyond the classes, or the class folders are not all classes.
    """
    if has_labels and images.n_classes not in (None, n_classes):
        raise DataError(
            f"the data has {images.n_classes} class folders and the networks {n_classes} classes, "
            "so the folders' order cannot be the classes'; give --class-map FILE, which lists the "
            "folders of all classes in their order"
        )
    n_same = [0] * len(contestants)
    n_correct = [0] * len(contestants)
    n_images = n_labelled = 0
    step = "labelled images" if has_labels else "images"
    for batch, labels in images.batches(BATCH_SIZE, workers):
        if has_labels and int(labels.max()) >= n_classes:
            raise DataError(f"label {int(labels.max())} is beyond the {n_classes} classes")
        classes = [contestant.classify(batch).argmax(1) for contestant in contestants]
        has_label = labels != UNLABELLED
        n_images, n_labelled = n_images + len(batch), n_labelled + int(has_label.sum())
        for position, chosen in enumerate(classes):
            n_same[position] += int((chosen == classes[0]).sum())
            n_correct[position] += int((chosen == labels)[has_label].sum())
        announce(step, n_images, images.size)
    return [
        Scores(
            100 * same / n_images,
            100 * correct / n_labelled if has_labels and n_labelled else None,
        )
        for same, correct in zip(n_same, n_correct, strict=True)
    ]


def _update(old: Scores, new: Scores) -> Scores:
    return Scores(new.agreement, old.top1 if new.top1 is None else new.top1)


def _deploy(
    contestants: Sequence[Contestant], example: Tensor, announce: Callable[[str, int, int], None]
) -> list[str]:
    """Deploy the PyTorch networks in place; return a note for each that cannot be deployed."""
    notes = []
    for number, contestant in enumerate(contestants):
        announce("deploying", number, len(contestants))
        if isinstance(contestant.network, nn.Module):
            try:
                deploy_(contestant.network, example)
            except DeployError as error:
                notes.append(f"{contestant.name} runs undeployed: {error}")
    return notes


def _time(contestants: Sequence[Contestant], example: Tensor, rounds: int) -> list[list[float]]:
    """Time the networks in turns; seconds per run."""

    def run(network: Any) -> Callable[[], object]:
        return lambda: network(example)

    # Numbers, since two networks may have the same name.
    forms = {str(number): run(each.network) for number, each in enumerate(contestants)}
    cool_down = cool_down_seconds(example.device, COOL_DOWN_SECONDS)
    with torch.no_grad():
        times = time_interleaved(
            forms, example.device, rounds, SECONDS, warm=True, cool_down=cool_down
        )
    return list(times.values())


def _make_rows(
    contestants: Sequence[Contestant], times: list[list[float]], scores: list[Scores]
) -> Iterable[ComparisonRow]:
    first = statistics.median(times[0])
    for contestant, seconds, score in zip(contestants, times, scores, strict=True):
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        yield ComparisonRow(
            name=contestant.name,
            kind=contestant.kind,
            n_bytes=contestant.n_bytes,
            macs=contestant.macs,
            median_ms=1e3 * median,
            spread=(high - low) / median,
            speedup=first / median,
            agreement=score.agreement,
            top1=score.top1,
        )
